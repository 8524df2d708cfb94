"""Adds up how far each segment would move the latents, while a generation runs whole.

Reusing from step i until step j changes the output of each step in between; the sampler adds these
changes up, each times how far it goes in that step. Both sums are kept for every segment that is
still open, at a sample of the tokens: around the held residual, and around those along lines
through earlier steps. What the changed latents change in turn is left out: it is of second order
within a segment.

All of it is linear in what the head makes of each residual, so a step takes one small matrix of
coefficients for all segments together.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vidaccel.plans.edge import Line, Segment
from vidaccel.plans.forecast import damped_scales

# How many steps before its start a line takes its other point from; the rest is interpolated.
LINE_GAPS = (1, 2, 4, 8)
# A held segment and one along each line.
_WAYS = 1 + len(LINE_GAPS)


class Deviations:
    """The sums of one generation.

    Args:
        sigmas: noise level of each step, over which lines are drawn.
        weights: how far the sampler goes in each step, per unit of the output.
        max_skip: longest segment.
        guided: as `plans.forecast.damped_scales` takes it.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        weights: Sequence[float],
        max_skip: int,
        *,
        guided: bool = True,
    ) -> None:
        self._sigmas, self._weights, self.max_skip = sigmas, weights, max_skip
        self._guided = guided
        self._first = 0  # no segment and no line starts before
        self._step, self._added = -1, torch.zeros(0)  # coefficients of the running step
        self._sums: dict[str, torch.Tensor] = {}  # by branch: [max_skip * ways, M]
        self._found: list[tuple[int, list[int], list[list[int]], torch.Tensor]] = []

    def needed(self, step: int) -> list[int]:
        """Return the steps whose residuals are evaluated in a step, itself first."""
        starts = self._open(step)
        points = {start - gap for start in starts for gap in self._gaps(start)}
        return [step, *sorted(points.union(starts), reverse=True)]

    def add(self, branch: str, step: int, outputs: torch.Tensor) -> None:
        """Add what a step becomes around the residuals of `needed` [R, M], for one branch."""
        if step != self._step:
            self._step, self._added = step, torch.from_numpy(self._coefficients(step)).to(outputs)
        sums = self._sums.get(branch)
        if sums is None:
            sums = outputs.new_zeros(self.max_skip * _WAYS, outputs.shape[1])
            self._sums[branch] = sums
        place = step % self.max_skip * _WAYS
        sums[place : place + _WAYS] = 0.0  # a segment that starts here
        sums.addmm_(self._added, outputs)

    def close(self, end: int, branches: dict[str, float]) -> None:
        """Read the segments that end at a step, before anything of it is added.

        Args:
            end: the step; T after the last.
            branches: branch -> its weight in the guided output.
        """
        starts = list(range(end - 2, max(self._first, end - self.max_skip) - 1, -1))
        if not starts or not branches:
            return
        total = sum(self._sums[branch] * weight for branch, weight in branches.items())
        assert isinstance(total, torch.Tensor)  # [max_skip * ways, M]
        points = [self._points(start) for start in starts]
        mixed = np.zeros((len(starts) * _WAYS, len(total)), dtype=np.float32)
        for row, (start, before) in enumerate(zip(starts, points, strict=True)):
            place = start % self.max_skip * _WAYS
            for way in range(_WAYS):
                share = self._damped(before[way - 1], start, end) if way else 0.0
                mixed[row * _WAYS + way, place] += 1.0 - share
                mixed[row * _WAYS + way, place + way] += share
        table = (torch.from_numpy(mixed).to(total) @ total).abs().mean(1)
        self._found.append((end, starts, points, table.view(len(starts), _WAYS)))

    def restart(self, step: int) -> None:
        """Let no segment and no line reach back before a step: another transformer takes over."""
        self._first, self._sums = step, {}

    def result(self) -> tuple[dict[Segment, float], dict[Line, float]]:
        """Return the mean absolute deviation of each held segment, and of each along a line.

        A line is damped as the generic schedule has it, see `plans.forecast.damped_scales`.
        """
        holds: dict[Segment, float] = {}
        lines: dict[Line, float] = {}
        for end, starts, points, table in self._found:
            for start, before, row in zip(starts, points, table.tolist(), strict=True):
                holds[start, end] = row[0]
                for position, point in enumerate(before):
                    if point < start:
                        lines[start, end, point] = row[1 + position]
        return holds, lines

    def _coefficients(self, step: int) -> NDArray[np.float32]:
        """Return what each sum gains in a step per unit of `needed` [max_skip * ways, R]."""
        needed = self.needed(step)
        places = {known: place for place, known in enumerate(needed)}
        found = np.zeros((self.max_skip * _WAYS, len(needed)), dtype=np.float32)
        for start in self._open(step):
            first = start % self.max_skip * _WAYS
            found[first : first + _WAYS, places[start]] += 1.0
            found[first : first + _WAYS, places[step]] -= 1.0
            for way, point in enumerate(self._points(start), 1):
                reach = self._reach(start, point, step)
                found[first + way, places[start]] += reach
                found[first + way, places[point]] -= reach
        return found * np.float32(self._weights[step])

    def _open(self, step: int) -> list[int]:
        """Return the starts of the segments that may reuse in a step."""
        return list(range(step - 1, max(self._first, step - self.max_skip + 1) - 1, -1))

    def _gaps(self, start: int) -> list[int]:
        return [gap for gap in LINE_GAPS if start - gap >= self._first]

    def _points(self, start: int) -> list[int]:
        """Return the earlier step of each line; the start itself where there is none."""
        known = self._gaps(start)
        return [start - gap if gap in known else start for gap in LINE_GAPS]

    def _reach(self, start: int, point: int, step: int) -> float:
        """Return how far a line through two steps goes beyond the later one, in their distance."""
        apart = self._sigmas[point] - self._sigmas[start]
        return (self._sigmas[start] - self._sigmas[step]) / apart if apart > 1e-6 else 0.0

    def _damped(self, point: int, start: int, end: int) -> float:
        if point == start:
            return 0.0
        steps = (point, start) if end == len(self._sigmas) else (point, start, end)
        return damped_scales(steps, self._sigmas, guided=self._guided)[1]
