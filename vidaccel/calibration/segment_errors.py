"""The errors of segments: what reusing each of them costs, on any pipeline the engine supports.

The error of a segment i -> j is the outcome error of LeMiCa (arXiv 2511.00090, section 3): the
mean absolute difference of the final latents between a run in which only the steps between i and
j are reused and one in which every step is computed, with the same prompt and noise.

- `exact` runs the pipeline again for every segment, from step j on: T - j forwards each.
- `gain` measures how far each segment moves the latents of step j, which costs only the embedding
  and head of the reused steps, and multiplies it with how much a deviation at j grows until the
  end, which a few exact segments tell (interpolated log-linearly over j).

Both can also tell what *lines* cost: segments whose reused steps go part of the way along the line
through the residuals of the two computed steps before. Their deviation is measured too, and grows
like that of the held segment with the same end.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from vidaccel.calibration.replay import Replayer
from vidaccel.plans.edge import SCALES, Line, Segment

# Every how many steps the gain is measured.
GAIN_INTERVAL = 4
# How many steps before its start a line takes its other point from; the rest is interpolated.
LINE_GAPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Errors:
    """Outcome errors of one sample.

    Attributes:
        holds: the error of each segment that holds the last residual.
        lines: the errors of each segment along a line, one for each of `SCALES`.
    """

    holds: dict[Segment, float] = field(default_factory=dict)
    lines: dict[Line, tuple[float, ...]] = field(default_factory=dict)

    def corrected(self, exact: Mapping[Segment, float]) -> "Errors":
        """With the exact errors of some held segments, and their lines in the same proportion."""
        lines = {
            line: tuple(error * _ratio(exact.get(line[:2]), self.holds[line[:2]]) for error in row)
            for line, row in self.lines.items()
        }
        return Errors({**self.holds, **exact}, lines)


def _ratio(exact: float | None, estimated: float) -> float:
    return 1.0 if exact is None or estimated == 0.0 else exact / estimated


def segments(steps: int, max_skip: int) -> Iterator[Segment]:
    """Yield the segments (i, j) that reuse at least one step, in order; j = T reuses to the end.

    Args:
        steps: T.
        max_skip: the longest segment, j - i.
    """
    for start in range(steps - 1):
        for end in range(start + 2, min(start + max_skip, steps) + 1):
            yield start, end


def exact_errors(
    replayer: Replayer, max_skip: int, starts: Iterable[int] | None = None
) -> dict[Segment, float]:
    """Measure every held segment, each by a run of its own.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        starts: only segments from these steps on; None for all.
    """
    wanted = None if starts is None else set(starts)
    return {
        (start, end): replayer.error(start, end)
        for start, end in segments(replayer.steps, max_skip)
        if (wanted is None or start in wanted) and replayer.allowed(start, end)
    }


def deviations(
    replayer: Replayer, max_skip: int, *, lines: bool = False, starts: Iterable[int] | None = None
) -> Errors:
    """Return how far each segment moves the latents of the step where it ends (T: the final ones).

    The mean absolute difference, in the units of the latents. It takes no forward.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        lines: also of segments along lines.
        starts: only segments from these steps on; None for all.
    """
    found, latents = Errors(), replayer.reference.latents
    for start in range(replayer.steps - 1) if starts is None else starts:
        held = replayer.drift(start, max_skip)
        allowed = [end for end in held if replayer.allowed(start, end)]
        found.holds.update({(start, end): _mean(held[end], latents) for end in allowed})
        for gap in _gaps(start, max_skip) if lines else ():
            drawn = replayer.drift(start, max_skip, 1, start - gap)
            for end in allowed:
                found.lines[start, end, start - gap] = tuple(
                    _mean(torch.lerp(held[end], drawn[end], scale), latents) for scale in SCALES
                )
    return found


def gain_errors(
    replayer: Replayer, max_skip: int, interval: int = GAIN_INTERVAL, *, lines: bool = False
) -> Errors:
    """Estimate the error of every segment as exact local deviation times interpolated gain.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        interval: the gain is measured at every so many steps.
        lines: also of segments along lines.
    """
    steps = replayer.steps
    local = deviations(replayer, max_skip, lines=lines)
    gains: dict[int, float] = {}
    for end in [*range(2, steps, interval), steps]:
        # A long segment to this step: the larger the deviation, the clearer its growth.
        starts = [s for s in range(max(0, end - 3), end - 1) if local.holds.get((s, end), 0.0) > 0]
        if starts:
            gains[end] = replayer.error(starts[0], end) / local.holds[starts[0], end]
    return Errors(
        {
            segment: value * _interpolated(gains, segment[1])
            for segment, value in local.holds.items()
        },
        {
            line: tuple(value * _interpolated(gains, line[1]) for value in row)
            for line, row in local.lines.items()
        },
    )


def errors_from(replayer: Replayer, max_skip: int, start: int, *, lines: bool = False) -> Errors:
    """Measure all segments from one step on, each held one by a run of its own.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        start: their first step.
        lines: also of segments along lines, each by the exact gain of the held one.
    """
    exact = exact_errors(replayer, max_skip, [start])
    if not lines:
        return Errors(exact)
    return deviations(replayer, max_skip, lines=True, starts=[start]).corrected(exact)


def _gaps(start: int, max_skip: int) -> list[int]:
    farthest = min(start, max_skip)
    return sorted({gap for gap in (*LINE_GAPS, farthest) if 0 < gap <= farthest})


def _mean(difference: torch.Tensor, latents: torch.Tensor) -> float:
    """Return the mean over the latents of what went into a step.

    That may hold more than them, the same in every run: a picture's channels, rows of text.
    """
    return float(difference.abs().sum()) / latents.numel()


def _interpolated(gains: dict[int, float], step: int) -> float:
    """Return the gain at a step, log-linearly between those that were measured."""
    known = sorted(end for end, gain in gains.items() if gain > 0.0)
    if not known:
        return 0.0
    if step <= known[0] or step >= known[-1]:
        return gains[known[0] if step <= known[0] else known[-1]]
    right = next(end for end in known if end >= step)
    left = max(end for end in known if end <= step)
    if left == right:
        return gains[left]
    share = (step - left) / (right - left)
    return math.exp((1 - share) * math.log(gains[left]) + share * math.log(gains[right]))
