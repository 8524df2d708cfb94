"""What a transformer gave at each step of a generation, to run a later part of it again.

A generation is run again from step i by letting the pipeline walk through its loop from the start
while the transformer gives back what it gave before: latents, random numbers and every scheduler's
history come out exactly as they were, and no code of this project has to know them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vidaccel.errors import VidaccelError


class Tape:
    """Records the outputs of one generation, then plays back the first steps of others.

    Attributes:
        recording: outputs are kept and nothing is played back.
        play_until: steps before this one are played back.
    """

    def __init__(self) -> None:
        self.recording = True
        self.play_until = 0
        self._outputs: dict[tuple[int, str], Any] = {}
        self._residuals: dict[tuple[int, str], list[torch.Tensor]] = {}

    def plays(self, step: int) -> bool:
        """Whether `step` is played back."""
        return not self.recording and step < self.play_until

    def record(
        self, step: int, branch: str, output: Any, residuals: Sequence[torch.Tensor] = ()
    ) -> None:
        """Keep what the transformer returned and its residuals at the heads, in host memory."""
        self._outputs[step, branch] = _mapped(lambda tensor: tensor.detach().cpu().clone(), output)
        # Nothing writes into a residual once it is made, so one in host memory is not copied.
        self._residuals[step, branch] = [residual.detach().cpu() for residual in residuals]

    def played(self, step: int, branch: str, device: torch.device) -> Any:
        """What the transformer returned then.

        Raises:
            VidaccelError: this step and branch were not recorded.
        """
        if (step, branch) not in self._outputs:
            raise VidaccelError(f"step {step} of branch {branch!r} was not recorded")
        return _mapped(lambda tensor: tensor.to(device, copy=True), self._outputs[step, branch])

    def residual(self, step: int, branch: str, device: torch.device) -> list[torch.Tensor]:
        """The residuals at the heads then, one per head.

        Raises:
            VidaccelError: they were not recorded.
        """
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
