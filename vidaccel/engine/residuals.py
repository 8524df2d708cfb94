"""Residuals of computed steps, kept per guidance branch until no later step can ask for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.spec import Head
from vidaccel.plans.forecast import weights

Place = Literal["device", "cpu"]


@dataclass(frozen=True)
class Residual:
    """One computed step: what the reused blocks added, one tensor per stream."""

    step: int
    sigma: float
    tensors: list[torch.Tensor]


class Residuals:
    """The kept residuals of one transformer.

    Args:
        place: "device" keeps them where they were computed, "cpu" in host memory, pinned where
            there is a GPU.
    """

    def __init__(self, place: Place = "device") -> None:
        self._place = place
        self._kept: dict[str, list[Residual]] = {}  # by branch, oldest first

    def last_step(self, branch: str) -> int | None:
        """The step of the newest residual of a branch; None when it has none."""
        kept = self._kept.get(branch)
        return kept[-1].step if kept else None

    def branches(self) -> list[str]:
        """Return the branches of which something is kept."""
        return [branch for branch, kept in self._kept.items() if kept]

    def add(self, branch: str, step: int, sigma: float, tensors: list[torch.Tensor]) -> None:
        """Keep the residual of a computed step."""
        stored = [self._stored(tensor) for tensor in tensors]
        self._kept.setdefault(branch, []).append(Residual(step, sigma, stored))

    def trim(self, branch: str, count: int) -> None:
        """Forget all but the newest `count` residuals of a branch."""
        kept = self._kept.get(branch, [])
        del kept[: max(0, len(kept) - count)]

    def forecast(
        self,
        branch: str,
        index: int,
        sigma: float,
        order: int,
        device: torch.device,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """The residual of stream `index` at the noise level `sigma` of a reused step."""
        kept = self._kept[branch]
        coefficients = weights([residual.sigma for residual in kept], sigma, order, scale)
        *older, last = [
            (coefficient, residual.tensors[index].to(device, non_blocking=True))
            for coefficient, residual in zip(coefficients, kept, strict=True)
            if coefficient
        ]
        if not older and last[0] == 1.0:
            return last[1]
        # Slopes are differences of nearly equal tensors: summed in float32.
        total = last[1].float() * last[0]
        for coefficient, tensor in older:
            total = total.add(tensor.float(), alpha=coefficient)
        return total

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    @property
    def bytes_held(self) -> int:
        """Bytes of all residuals that are kept at this moment."""
        held = [residual for kept in self._kept.values() for residual in kept]
        return sum(tensor.nbytes for residual in held for tensor in residual.tensors)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._place == "device" or tensor.device.type == "cpu":
            return tensor
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        # The copy back is queued behind this one on the same stream.
        return pinned.copy_(tensor, non_blocking=True)


def entry_of(
    entry: Mapping[str, torch.Tensor],
    streams: Sequence[str],
    given: torch.Tensor,
    head: Head | None,
    transformer: nn.Module,
) -> torch.Tensor:
    """Return what has gone into the first middle block, laid out as what comes out of the last.

    Args:
        entry: the streams at the first middle block.
        streams: those that `given` continues.
        given: what comes out.
        head: the module that it goes into, if it is one.
        transformer: the transformer, for the message.

    Raises:
        UnsupportedPipelineError: the shapes differ.
    """
    parts = [entry[name].to(given.device) for name in streams]
    start = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if head is not None and head.tail:
        start = start[:, -given.shape[1] :]
    if start.shape != given.shape:
        raise UnsupportedPipelineError(
            f"the blocks of {type(transformer).__name__} take {tuple(start.shape)} but "
            f"{head.module if head else 'the last of them'} gets {tuple(given.shape)}"
        )
    return start
