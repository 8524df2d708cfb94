"""Attention as the model computes it, and whether something makes it sparse instead."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vidaccel.clock import Tick
from vidaccel.errors import AttentionError
from vidaccel.hosts import HostSpec
from vidaccel.ledger import AttentionReport
from vidaccel.parallel import Spread
from vidaccel.shadow import BlockArguments
from vidaccel.svg2 import SVG2

_NOTHING: AbstractContextManager[None] = nullcontext()


class Attention:
    """What an engine tells about its run to whom makes attention sparse; this one leaves it alone.

    Args:
        note: why, for reports; empty when nobody asked for anything else.
    """

    def __init__(self, note: str = "") -> None:
        self._note = note

    def attach(self) -> None:
        """Start intercepting."""

    def detach(self) -> None:
        """Leave every attention module as it was before `attach`."""

    def forget(self) -> None:
        """Drop what was kept: a generation has ended, or another one begins."""

    def restart(self) -> None:
        """A generation begins."""

    def begin(self, tick: Tick, *, refreshes: bool, spread: Spread | None = None) -> None:
        """A call of the transformer begins.

        Args:
            tick: its place in the generation.
            refreshes: what it computes is kept and used again by later steps.
            spread: how its tokens are spread over processes, if they are.
        """

    def block(
        self, position: int, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Around one block that runs.

        Args:
            position: of the block, in the order in which all blocks are walked.
            named, args, kwargs: its arguments.
        """
        return _NOTHING

    def end(self) -> None:
        """The call has ended."""

    def report(self) -> AttentionReport | None:
        """What was sparse since `attach`; waits for the device."""
        return AttentionReport(self._note) if self._note else None


def attention_of(attention: Any, transformer: nn.Module, host: HostSpec) -> Attention:
    """What `accelerate(attention=...)` takes, for one transformer.

    Args:
        attention: None leaves attention alone; an `SVG2` makes it sparse; "auto" does so with
            `SVG2()` where there is a GPU and the model allows it.

    Raises:
        AttentionError: it is none of these, or this attention cannot be made sparse.
    """
    if attention is None:
        return Attention()
    if attention != "auto" and not isinstance(attention, SVG2):
        raise AttentionError(
            f"attention is 'auto', None or an SVG2, found {type(attention).__name__}"
        )
    if attention == "auto" and not torch.cuda.is_available():
        return Attention()
    # Only here, since Triton and Diffusers' attention take seconds to import.
    from vidaccel.sparse import SparseAttention, why_dense

    if isinstance(attention, SVG2):
        return SparseAttention(transformer, host, attention)
    if reason := why_dense(transformer, host):
        return Attention(f"dense, since {reason}")
    return SparseAttention(transformer, host, SVG2(), gpu_only=True)
