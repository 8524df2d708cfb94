"""Residuals of reused steps, forecast from those of the computed steps before. No torch.

Order 0 holds the last residual; order 1 and 2 extend the line or parabola through the last two or
three over the noise level sigma. Steps are not equidistant in sigma, so a forecast over the step
index would be wrong on shifted schedules. A scale between 0 and 1 goes only part of the way from
the held residual to the forecast: residuals bend, and half a slope is often nearer than none or
all of it.
"""

from collections.abc import Sequence

MAX_ORDER = 2
# The largest scale: further out, an extrapolation is no forecast any more.
MAX_SCALE = 2.0

# Two computed steps this close in sigma say nothing about a slope.
_SMALLEST_GAP = 1e-6


def weights(
    known: Sequence[float], sigma: float, order: int, scale: float = 1.0
) -> tuple[float, ...]:
    """Coefficients of the residuals whose weighted sum is the forecast.

    The polynomial of degree `order` through the last points, in Lagrange's form. With fewer known
    points than the order needs, or two at the same noise level, the degree is what they allow.

    Args:
        known: noise levels of the computed steps, oldest first; at least one.
        sigma: noise level of the reused step.
        order: 0, 1 or 2.
        scale: how far to go from the last residual (0) to the forecast (1).

    Returns:
        One coefficient per entry of `known`; they sum to 1.
    """
    points = list(known[-(order + 1) :])
    while len(points) > 1 and any(
        abs(a - b) < _SMALLEST_GAP for i, a in enumerate(points) for b in points[:i]
    ):
        del points[0]
    lagrange = []
    for i, point in enumerate(points):
        value = 1.0
        for j, other in enumerate(points):
            if i != j:
                value *= (sigma - other) / (point - other)
        lagrange.append(value)
    if scale != 1.0:
        lagrange = [scale * value for value in lagrange]
        lagrange[-1] += 1.0 - scale
    return (*(0.0 for _ in range(len(known) - len(points))), *lagrange)


def damped_scales(steps: Sequence[int], sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return how far each segment may go along its line without overshooting.

    A line through the residuals of two computed steps is known over the noise levels between them.
    A segment that reaches further than those two lie apart goes along it the less, the further it
    reaches: by min(1, (sigma_p - sigma_i) / (sigma_i - sigma_j)) for the segment from computed step
    i, after computed step p, to the next one j, times the same of the steps, min(1, (i - p) /
    (j - i)). With a shifted schedule the noise level falls slowly first and fast later, so that a
    line over it overshoots in the long gaps, and the square of the first ratio falls short. On the
    embedded model both together are above that square at shifts 3 to 7 by 1 to 3 dB, and above
    either ratio alone where few steps are computed; at shift 1 all of them are near each other.

    Args:
        steps: the computed steps.
        sigmas: noise level of each step of the run.

    Returns:
        A scale from 0 to 1 per computed step; 0, which holds, where there is no line.
    """
    levels = [*sigmas, 0.0]  # after the last step there is no noise left
    ends = (*steps[1:], len(sigmas))
    found = [0.0]
    for previous, start, end in zip(steps, steps[1:], ends[1:], strict=False):
        known = levels[previous] - levels[start]
        reach = levels[start] - levels[end]
        share = max(0.0, min(1.0, known / reach)) if reach > _SMALLEST_GAP else 0.0
        found.append(share * min(1.0, (start - previous) / (end - start)))
    return tuple(found)
