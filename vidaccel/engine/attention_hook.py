"""The interface through which an engine tells about its run to whatever makes attention sparse."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vidaccel.engine.block_proxies import BlockArguments
from vidaccel.engine.parallel import SequenceParallelMode
from vidaccel.engine.report import AttentionReport
from vidaccel.engine.state import CallContext

_NOTHING: AbstractContextManager[None] = nullcontext()


class AttentionHook:
    """Is told by an engine about its run; this one leaves attention alone.

    Args:
        note: the reason, for reports; empty when nobody asked for anything else.
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

    def begin(
        self,
        context: CallContext,
        *,
        refreshes: bool,
        parallel_mode: SequenceParallelMode | None = None,
    ) -> None:
        """A call of the transformer begins.

        Args:
            context: its place in the generation.
            refreshes: what it computes is kept and used again by later steps.
            parallel_mode: how its tokens are split over processes, if they are.
        """

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

    def report(self) -> AttentionReport | None:
        """Return what was sparse since `attach`; waits for the device."""
        return AttentionReport(self._note) if self._note else None
