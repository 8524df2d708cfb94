"""A row of the table of supported transformer classes: where its blocks and its result are."""

from dataclasses import dataclass, replace
from typing import Any, Literal

# The forms in which a pipeline gives its transformer the time, made of its scheduler's tables.
Time = Literal["t", "t - 1", "t / 1000", "1 - t / 1000", "sigma", "sigma / (sigma + 1)"]


@dataclass(frozen=True)
class BlockList:
    """A list of blocks that the transformer's forward walks through.

    Attributes:
        name: the attribute of the transformer that holds the list.
        returns: the streams that a block returns, in order, by the names of the block's own
            arguments: a block that is not run gives these arguments back, so the walk goes on with
            unchanged streams.
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
        module: the dotted name of the module in the transformer.
        streams: the block arguments that the input continues; several when the model concatenates
            them along the token dimension before the head.
        tail: whether the input is the last tokens only, those that are being generated.
    """

    module: str
    streams: tuple[str, ...] = ("hidden_states",)
    tail: bool = False


@dataclass(frozen=True)
class HostSpec:
    """A supported transformer class: its blocks, its result, and how pipelines call it.

    Attributes:
        transformer: the name of the class.
        pipelines: the pipelines it is tested in.
        untested: other pipelines that run it, each with the reason why it is not tested.
        blocks: its block lists, in the order in which they run.
        heads: the modules that read the result, one per output stream, in the order in which they
            run; none where the result is the last block's own output, because it reaches the head
            in another layout.
        family: the name of the model that people know.
        guidance: the calls that a step of classifier-free guidance makes: "sequential" (one per
            branch), "batched" (one for all) or "embedded" (one; a second branch only on demand).
        tokens: the kinds of tokens in the self-attention, in order.
        attention: the path of the video self-attention inside a block; None where it is no full
            attention over a grid of video tokens, for the reason in `attention_note`.
        attention_note: the reason why `attention` is None.
        video_rows: the forward argument with the places of the video rows in a packed sequence, the
            generated ones last: a run of rows, for which attention is sparse, and all others are
            text to it; None where `tokens` tells.
        mask: the meaning of that attention's mask: "none" is ever given, or "keys" [B, 1, 1, S] or
            "pairs" [B, 1, S, S] of the tokens that are no padding, which the video never is.
        threshold: the threshold of `DBCache` when none is given; None where none is published.
        threshold_origin: the source of that number.
        interleaved: the lists take turns, a block of each at a time, and change the layout of the
            tokens meanwhile: probe and corrector blocks are counted in such rounds.
        no_corrector: the reason why `DBCache` cannot run its corrector blocks; empty where it can.
        main: the stream that becomes the result, by the name of the blocks' argument.
        sample, timestep: the forward arguments that carry the latents (a tensor, or a list of
            them) and the time.
        prompt: the forward argument that carries the prompt (a tensor, or a list of them); None
            where there is none.
        times: the forms in which pipelines give the time.
        levels: the time argument holds each noise level of a call once, in any order, and not a
            time per sample: one sequence with sound and conditioning at levels of their own.
        aside: the forward argument and its value in calls that fill a cache for others, before the
            first step or in it; they run as they are.
        branches: the components that each run one guidance branch alone, with its name: two of the
            class run in every step. Empty where one runs all branches.
        only: that branch, in the row of such a component.
        left_out: the forward argument that, where it is true, has one block of the list left out,
            and the index of that block.
        since: the first version of diffusers that has the class.
        unsupported: the reason why it is refused; empty for supported classes.
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
    video_rows: str | None = None
    mask: Literal["none", "keys", "pairs"] = "none"
    threshold: float | None = None
    threshold_origin: str = ""
    interleaved: bool = False
    no_corrector: str = ""
    main: str = "hidden_states"
    sample: str = "hidden_states"
    timestep: str = "timestep"
    prompt: str | None = "encoder_hidden_states"
    times: tuple[Time, ...] = ("t",)
    levels: bool = False
    aside: tuple[str, Any] | None = None
    branches: tuple[tuple[str, str], ...] = ()
    only: str = ""
    left_out: tuple[str, int] | None = None
    since: str = "0.38"
    untested: tuple[tuple[str, str], ...] = ()
    unsupported: str = ""

    @property
    def streams(self) -> set[str]:
        """The streams that blocks hand on: those of the heads and of the last blocks."""
        last = self.blocks[-1]
        named = [name for head in self.heads for name in head.streams]
        return {*named, *last.returns, *last.joins}

    @property
    def is_left_out(self) -> bool:
        """It stands for no pipeline, and says no more than why the class is refused."""
        return bool(self.unsupported) and not self.pipelines

    @property
    def unit(self) -> int:
        """The number of blocks that `DBCache` counts as one."""
        return len(self.blocks) if self.interleaved else 1

    def block_count(self, transformer: Any) -> int:
        """Count the blocks that one call of the transformer runs."""
        return sum(len(getattr(transformer, blocks.name)) for blocks in self.blocks)

    def of_component(self, name: str) -> "HostSpec":
        """Return the row of a component of a pipeline, by its name."""
        only = dict(self.branches).get(name, "")
        return replace(self, only=only) if only else self

    @property
    def guided_calls(self) -> int:
        """Calls per step that classifier-free guidance explains."""
        return len(self._known)

    def branch(self, position: int) -> str:
        """Name the `position`-th call of a step for a pipeline that does not name its calls."""
        return self._known[position] if position < len(self._known) else f"call {position}"

    @property
    def _known(self) -> tuple[str, ...]:
        """The branches of unnamed calls, in their order within a step."""
        if self.only:
            return (self.only,)
        return ("cond_uncond",) if self.guidance == "batched" else ("cond", "uncond")
