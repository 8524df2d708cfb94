"""The supported transformer classes: one row of data each.

A row says where the transformer's blocks are, what they return, and which module reads the result
after the last block. `engine.py` needs nothing else to know about a model.
"""

from dataclasses import dataclass
from typing import Any, Literal

from vidaccel.errors import UnsupportedPipelineError


@dataclass(frozen=True)
class BlockList:
    """A list of blocks that the transformer's forward walks through.

    Attributes:
        name: the attribute of the transformer that holds it.
        returns: what a block returns, in order, by the names of the block's own arguments: a block
            that is not run gives these arguments back, so the walk goes on with unchanged streams.
        beside: the blocks make additions to the main stream (control hints), which the last blocks
            need and a reused step does not have; corrector blocks are refused then.
    """

    name: str
    returns: tuple[str, ...] = ("hidden_states",)
    beside: bool = False


@dataclass(frozen=True)
class Head:
    """The module that reads the last block's output.

    Attributes:
        module: its dotted name in the transformer.
        streams: the block arguments that its input continues; several when the model concatenates
            them along the token dimension before the head.
    """

    module: str
    streams: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class HostSpec:
    """One supported transformer class.

    Attributes:
        transformer: name of the class.
        pipelines: the pipelines it is tested in.
        blocks: its block lists, in the order in which they run.
        heads: where the result is read, one per output stream.
        guidance: how the pipelines call it for classifier-free guidance: "sequential" (one call
            per branch), "batched" (one call for all) or "embedded" (one call, no second branch).
        tokens: what the self-attention sees, in order.
        threshold: of `DBCache` when none is given; None where nobody has published one.
        sample, timestep: names of the forward arguments that carry the latents and the time.
    """

    transformer: str
    pipelines: tuple[str, ...]
    blocks: tuple[BlockList, ...]
    heads: tuple[Head, ...] = (Head("norm_out"),)
    guidance: Literal["sequential", "batched", "embedded"] = "sequential"
    tokens: tuple[str, ...] = ("video",)
    threshold: float | None = None
    sample: str = "hidden_states"
    timestep: str = "timestep"

    @property
    def streams(self) -> set[str]:
        """Names of the streams that blocks hand on: those of the heads and of the last blocks."""
        return {name for head in self.heads for name in head.streams} | set(self.blocks[-1].returns)

    def block_count(self, transformer: Any) -> int:
        """Blocks that one call of the transformer runs."""
        return sum(len(getattr(transformer, blocks.name)) for blocks in self.blocks)

    def branch(self, position: int) -> str:
        """Name of the `position`-th call of a step when the pipeline does not name its calls."""
        names = {"sequential": ("cond", "uncond"), "batched": ("cond_uncond",), "embedded": ()}
        known = names[self.guidance]
        return known[position] if position < len(known) else f"call {position}"


# Blocks of joint attention return both of their streams.
_JOINT = ("hidden_states", "encoder_hidden_states")

HOSTS = {
    row.transformer: row
    for row in (
        HostSpec(
            "WanTransformer3DModel",
            ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
            (BlockList("blocks"),),
        ),
        HostSpec(
            "WanVACETransformer3DModel",
            ("WanVACEPipeline",),
            # The hint blocks run first; their hints are added between the main blocks.
            (
                BlockList(
                    "vace_blocks", ("control_hidden_states", "control_hidden_states"), beside=True
                ),
                BlockList("blocks"),
            ),
        ),
        HostSpec(
            "SkyReelsV2Transformer3DModel",
            ("SkyReelsV2Pipeline",),
            (BlockList("blocks"),),
        ),
        HostSpec(
            "HunyuanVideoTransformer3DModel",
            ("HunyuanVideoPipeline",),
            (
                BlockList("transformer_blocks", _JOINT),
                BlockList("single_transformer_blocks", _JOINT),
            ),
            tokens=("video", "text"),
        ),
        HostSpec(
            "HunyuanVideo15Transformer3DModel",
            ("HunyuanVideo15Pipeline",),
            (BlockList("transformer_blocks", _JOINT),),
            tokens=("video", "text"),
        ),
        HostSpec(
            "CogVideoXTransformer3DModel",
            ("CogVideoXPipeline",),
            (BlockList("transformer_blocks", _JOINT),),
            (Head("norm_final"),),
            guidance="batched",
            tokens=("text", "video"),
        ),
        HostSpec(
            "LTXVideoTransformer3DModel",
            ("LTXPipeline",),
            (BlockList("transformer_blocks"),),
            guidance="batched",
        ),
        HostSpec(
            "MochiTransformer3DModel",
            ("MochiPipeline",),
            (BlockList("transformer_blocks", _JOINT),),
            guidance="batched",
            tokens=("video", "text"),
        ),
    )
}


def find_transformers(pipe: Any) -> dict[str, tuple[Any, HostSpec]]:
    """The transformers of a pipeline with their rows, by component name.

    Raises:
        UnsupportedPipelineError: when `pipe` is no pipeline or none of its components has a row.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedPipelineError(
            f"accelerate() takes a Diffusers pipeline, found {type(pipe).__name__}"
        )
    found = {
        name: (module, row)
        for name, module in components.items()
        if (row := _row_of(module)) is not None
    }
    if not found:
        denoisers = [
            f"{name} ({type(module).__name__})"
            for name, module in components.items()
            if module is not None and name.startswith(("transformer", "unet", "prior"))
        ]
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no transformer that vidaccel supports; "
            f"found {', '.join(denoisers) or 'no denoiser'}; supported: {', '.join(HOSTS)}"
        )
    return found


def _row_of(module: Any) -> HostSpec | None:
    # A module compiled as a whole is found under its original class, to be refused by name.
    cls = type(getattr(module, "_orig_mod", module))
    return next((HOSTS[base.__name__] for base in cls.__mro__ if base.__name__ in HOSTS), None)
