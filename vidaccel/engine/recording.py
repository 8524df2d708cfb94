"""Records the output of a transformer at each step, to run a later part of a generation again.

A generation is run again from step i by letting the pipeline walk through its loop from the start
while the transformer gives back what it gave before: latents, random numbers and every scheduler's
history come out exactly as they were, and no code of this project has to know them.
"""

from collections.abc import Callable
from typing import Any

import torch

from vidaccel.engine.observer import Observer
from vidaccel.engine.state import CallContext, RunningCall
from vidaccel.errors import VidaccelError


class Recording(Observer):
    """The outputs and residuals of one generation, which answer for the first steps of others.

    Attributes:
        replay_until: steps before this one are replayed; None while the recording is made.
    """

    def __init__(self, replay_until: int | None = None) -> None:
        self.replay_until = replay_until
        self._outputs: dict[tuple[int, str], Any] = {}
        self._residuals: dict[tuple[int, str], list[torch.Tensor]] = {}

    def wants_residuals(self, context: CallContext) -> bool:
        return self.replay_until is None

    def replays(self, context: CallContext) -> bool:
        return self.replay_until is not None and context.step < self.replay_until

    def after_call(self, call: RunningCall, output: Any) -> None:
        """Keep the output and the residuals in host memory while the recording is made."""
        if self.replay_until is not None:
            return
        key = call.context.step, call.context.branch
        self._outputs[key] = _mapped(lambda tensor: tensor.detach().cpu().clone(), output)
        # Nothing writes into a residual once it is made, so one in host memory is not copied.
        self._residuals[key] = [residual.detach().cpu() for residual in call.residuals]

    def replayed(self, context: CallContext, device: torch.device) -> Any:
        """Return the recorded output.

        Raises:
            VidaccelError: this step and branch were not recorded.
        """
        step, branch = context.step, context.branch
        if (step, branch) not in self._outputs:
            raise VidaccelError(f"step {step} of branch {branch!r} was not recorded")
        return _mapped(lambda tensor: tensor.to(device, copy=True), self._outputs[step, branch])

    def residuals(self, context: CallContext, device: torch.device) -> list[torch.Tensor]:
        """Return the recorded residuals, one per head or stream.

        Raises:
            VidaccelError: they were not recorded.
        """
        step, branch = context.step, context.branch
        if not self._residuals.get((step, branch)):
            raise VidaccelError(f"no residual of step {step} of branch {branch!r} was recorded")
        return [residual.to(device) for residual in self._residuals[step, branch]]

    @property
    def bytes_held(self) -> int:
        """Bytes of the residuals that are kept."""
        return sum(tensor.nbytes for tensors in self._residuals.values() for tensor in tensors)


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """The same structure (tensor, tuple or Diffusers' output class) with other tensors."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, tuple | list):
        return type(output)(_mapped(function, item) for item in output)
    if isinstance(output, dict):  # BaseOutput is an OrderedDict
        return type(output)(**{name: _mapped(function, item) for name, item in output.items()})
    return output
