"""Tiny random pipelines of every supported family, built from a configuration, no download."""

from tiny import cogvideo, cosmos, hunyuan, images, ltx, others, wan
from tiny.base import LAYERS, STEPS, Build, Case, embeds, generator

__all__ = ["CASES", "CORE", "LAYERS", "SINCE", "STEPS", "Build", "Case", "embeds", "generator"]

_MODULES = (wan, hunyuan, cogvideo, ltx, cosmos, others, images)

CASES: dict[str, Build] = {build.__name__: build for module in _MODULES for build in module.CASES}

# One of each kind, for what does not need every family.
CORE = (
    "wan",
    "wan_unipc",
    "wan_expand_timesteps",
    "wan22",
    "wan_v2v",
    "wan_vace",
    "hunyuan",
    "hunyuan_true_cfg",
    "hunyuan15",
    "cogvideox",
    "ltx",
    "mochi",
)

# Families that need a later diffusers than the oldest supported one: name of the case -> version.
SINCE = {
    "cosmos3": "0.39",
    "motif": "0.39",
    "motif_decoder": "0.39",
    "anyflow": "0.39",
    "kandinsky6": "0.42",
    "kandinsky6_silent": "0.42",
}
