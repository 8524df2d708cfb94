"""Image models with labels for prompts, text in cross-attention, or streams that skip blocks."""

from tiny.base import Case, built, case
from tiny.images import rotary, shifted_vae


def bria() -> Case:
    transformer = built("BriaTransformer2DModel", **rotary())
    return case("BriaPipeline", transformer, {}, vae=shifted_vae(1))


CASES = (bria,)
