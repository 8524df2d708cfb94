"""The interface for looking on while an engine runs, and answering for its transformer."""

from collections.abc import Sequence
from typing import Any

import torch

from vidaccel.engine.state import CallContext, RunningCall


class Observer:
    """Is told what an engine does; this one, which every accelerated pipeline has, does nothing.

    Measuring what reuse costs takes three things that a run does not: the output and residuals of
    every call, the residuals of the probe blocks, and calls that are answered with the output of an
    earlier run. A subclass overrides those that it wants.

    Attributes:
        notes: sentences for reports.
    """

    notes: Sequence[str] = ()

    def wants_residuals(self, context: CallContext) -> bool:
        """Tell whether the residuals of a computed call are wanted though no later step is."""
        return False

    def replays(self, context: CallContext) -> bool:
        """Tell whether `replayed` answers a call, so that no block of it has to run."""
        return False

    def replayed(self, context: CallContext, device: torch.device) -> Any:
        """Return the output of a call that `replays` has claimed."""
        raise NotImplementedError

    def residuals(self, context: CallContext, device: torch.device) -> list[torch.Tensor]:
        """Return the residuals of a call that `replays` has claimed, one per head or stream."""
        raise NotImplementedError

    def after_probe(self, context: CallContext, residual: torch.Tensor) -> None:
        """The probe blocks of a call have run and added `residual` [B, S, C] to the main stream."""

    def after_call(self, call: RunningCall, output: Any) -> None:
        """A call has run and returned `output`; `call.residuals` are those it has added, if any."""

    def after_exception(self) -> None:
        """A call has ended with an exception, and most likely the run with it."""
