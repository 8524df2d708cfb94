"""Times the parts of a computation on the time line of the device that runs it."""

import time
from collections.abc import Iterable
from typing import Any

import torch

from vidaccel.engine.stats import elapsed


def moment(device: torch.device) -> Any:
    """Return a moment on the device's own time line, without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    # Of this device: another one may be current.
    event.record(torch.cuda.current_stream(device))
    return event


class Stopwatch:
    """Notes when each phase of a computation ends, without waiting for the device.

    Args:
        device: the one that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[str, Any]] = [("", moment(device))]

    def lap(self, phase: str) -> None:
        """A phase has ended, which began where the one before it ended."""
        self._laps.append((phase, moment(self._device)))

    def seconds(self) -> Iterable[tuple[str, float]]:
        """Return each phase and its seconds; waits for the device."""
        for (_, before), (phase, after) in zip(self._laps, self._laps[1:], strict=False):
            yield phase, elapsed(before, after)
