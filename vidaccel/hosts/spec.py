"""What a row of the table of supported transformer classes says."""

from dataclasses import dataclass
from typing import Any, Literal

# What a pipeline tells its transformer about the time, made of the tables of its scheduler.
Time = Literal["t", "t / 1000", "1 - t / 1000", "sigma", "sigma / (sigma + 1)"]


@dataclass(frozen=True)
class BlockList:
    """A list of blocks that the transformer's forward walks through.

    Attributes:
        name: the attribute of the transformer that holds it.
        returns: what a block returns, in order, by the names of the block's own arguments: a block
            that is not run gives these arguments back, so the walk goes on with unchanged streams.
        joins: the streams of the first list that the main one of this list continues, joined along
            the tokens in this order; empty when it continues the one of its own name.
    """

    name: str
    returns: tuple[str, ...] = ("hidden_states",)
    joins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """The module that reads the last block's output.

    Attributes:
        module: its dotted name in the transformer.
        streams: the block arguments that its input continues; several when the model concatenates
            them along the token dimension before the head.
        tail: it gets the last tokens only, those that are being generated.
    """

    module: str
    streams: tuple[str, ...] = ("hidden_states",)
    tail: bool = False


@dataclass(frozen=True)
class HostSpec:
    """One supported transformer class.

    Attributes:
        transformer: name of the class.
        pipelines: the pipelines it is tested in.
        untested: others that run it, with the reason why they are not among the tested ones.
        blocks: its block lists, in the order in which they run.
        heads: where the result is read, one per output stream, in the order in which they run;
            none where the last block's own output is the place to take it, because it reaches the
            head in another layout.
        family: how people call the model.
        guidance: how the pipelines call it for classifier-free guidance: "sequential" (one call
            per branch), "batched" (one call for all) or "embedded" (one call; a second branch
            only on demand).
        tokens: what the self-attention sees, in order.
        attention: path of the video self-attention inside a block; None where it is no full
            attention over a grid of video tokens, for the reason in `attention_note`.
        mask: what the mask of that attention means: "none" is ever given, or "keys" [B, 1, 1, S] or
            "pairs" [B, 1, S, S] of the tokens that are no padding, which the video never is.
        threshold: of `DBCache` when none is given; None where nobody has published one.
        threshold_origin: where that number comes from.
        interleaved: the lists take turns, a block of each at a time, and change the layout of the
            tokens meanwhile: probe and corrector blocks are counted in such rounds.
        no_corrector: why `DBCache` cannot run its corrector blocks; empty where it can.
        main: the stream that becomes the result, by the name of the blocks' argument.
        sample, timestep: names of the forward arguments that carry the latents (a tensor, or a
            list of them) and the time.
        times: what pipelines tell it about the time.
        since: the first version of diffusers that has the class.
        unsupported: why it is refused; empty for supported classes.
    """

    transformer: str
    pipelines: tuple[str, ...]
    blocks: tuple[BlockList, ...] = ()
    heads: tuple[Head, ...] = (Head("norm_out"),)
    family: str = ""
    guidance: Literal["sequential", "batched", "embedded"] = "sequential"
    tokens: tuple[str, ...] = ("video",)
    attention: str | None = "attn1"
    attention_note: str = ""
    mask: Literal["none", "keys", "pairs"] = "none"
    threshold: float | None = None
    threshold_origin: str = ""
    interleaved: bool = False
    no_corrector: str = ""
    main: str = "hidden_states"
    sample: str = "hidden_states"
    timestep: str = "timestep"
    times: tuple[Time, ...] = ("t",)
    since: str = "0.38"
    untested: tuple[tuple[str, str], ...] = ()
    unsupported: str = ""

    @property
    def streams(self) -> set[str]:
        """Names of the streams that blocks hand on: those of the heads and of the last blocks."""
        last = self.blocks[-1]
        named = [name for head in self.heads for name in head.streams]
        return {*named, *last.returns, *last.joins}

    @property
    def unit(self) -> int:
        """Blocks that `DBCache` counts as one."""
        return len(self.blocks) if self.interleaved else 1

    def block_count(self, transformer: Any) -> int:
        """Blocks that one call of the transformer runs."""
        return sum(len(getattr(transformer, blocks.name)) for blocks in self.blocks)

    def branch(self, position: int) -> str:
        """Name of the `position`-th call of a step when the pipeline does not name its calls."""
        known = ("cond_uncond",) if self.guidance == "batched" else ("cond", "uncond")
        return known[position] if position < len(known) else f"call {position}"
