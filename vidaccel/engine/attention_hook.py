"""The interface through which an engine tells about its run to whatever makes attention sparse."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vidaccel.engine.block_proxies import BlockArguments
from vidaccel.engine.parallel import SequenceParallelMode
from vidaccel.engine.report import AttentionReport
from vidaccel.engine.state import CallContext

_NOTHING: AbstractContextManager[None] = nullcontext()


class AttentionCall:
    """Is told of one running call of the transformer; this one leaves attention alone."""

    def block(
        self, position: int, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Around one block that runs.

        Args:
            position: the place of the block, in the order in which all blocks are walked.
            named, args, kwargs: its arguments.
        """
        return _NOTHING

    def end(self) -> None:
        """The call has ended."""


class AttentionHook:
    """Is told by an engine about its runs; this one leaves attention alone.

    Several generations may run at once, in turns or in threads: each is named by a number.

    Args:
        note: the reason, for reports; empty when nobody asked for anything else.
    """

    def __init__(self, note: str = "") -> None:
        self._note = note

    def attach(self) -> None:
        """Start intercepting."""

    def detach(self) -> None:
        """Leave every attention module as it was before `attach`."""

    def forget(self, generation: int | None = None) -> None:
        """Drop what was kept of a generation, or of all."""

    def restart(self, generation: int) -> None:
        """A generation begins: nothing that was kept under its number belongs to it."""

    def begin(
        self,
        generation: int,
        context: CallContext,
        *,
        refreshes: bool,
        parallel_mode: SequenceParallelMode | None = None,
        video_rows: tuple[int, int] | None = None,
    ) -> AttentionCall:
        """A call of the transformer begins.

        Args:
            generation: the number of its generation.
            context: its place in it.
            refreshes: what it computes is kept and used again by later steps.
            parallel_mode: how its tokens are split over processes, if they are.
            video_rows: first and last + 1 of the video rows of a packed sequence.

        Returns:
            What is told of the rest of the call.
        """
        return AttentionCall()

    def report(self) -> AttentionReport | None:
        """Return what was sparse since `attach`; waits for the device."""
        return AttentionReport(self._note) if self._note else None
