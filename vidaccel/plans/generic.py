"""The generic schedule: steps for a run of which nothing has been measured.

The step lists that were published for LeMiCa (arXiv 2511.00090) and the plans measured on the
embedded model have one shape in step index: consecutive steps for about a quarter of the budget,
gaps that widen to 7 or 8, and gaps that close again before the end at larger budgets. The constants
are fitted to 50 of these lists (30 to 50 steps, a sixth to two thirds of them computed): the mean
distance of their steps to those of the schedule is 1.5 steps.
"""

from vidaccel.plans.forecast import damped_scales
from vidaccel.plans.plan import Plan

# Share of the budget that is spent on consecutive steps at the start.
DENSE_START = 0.3
# The power with which gaps widen on the way to the widest.
WIDENING = 2.0
# Share of the other gaps that close again at the end, and to which part of the widest.
CLOSING, CLOSED_TO = 0.4, 0.3
# No gap is wider, unless the budget is too small for that; in runs of more than 50 steps, which go
# the same way in smaller ones, as many times wider.
WIDEST_GAP, OF_STEPS = 8, 50

# Runs shorter than this reuse gently: each of their steps changes the sample a lot.
SHORT_RUN = 16
_SHORT_START, _SHORT_GAP = 3, 3


def generic_steps(budget: int, num_inference_steps: int) -> tuple[int, ...]:
    """Return the computed steps of the generic schedule.

    Args:
        budget: steps to compute; raised where a short run needs more.
        num_inference_steps: T.

    Returns:
        Increasing step indices from 0 on, T - 1 the last.
    """
    total = num_inference_steps
    if total < SHORT_RUN:
        return _short(budget, total)
    budget = max(2, min(budget, total))
    gaps = budget - 1
    dense = min(gaps, max(1, round(DENSE_START * budget)))
    wide = gaps - dense
    if wide == 0 or budget == total:
        return (*range(budget - 1), total - 1)
    weights = [_weight((place + 1) / wide) for place in range(wide)]
    widths = _widths(weights, total, total - 1 - dense)
    steps, at = list(range(dense + 1)), float(dense)
    for width in widths:
        at += width
        steps.append(max(steps[-1] + 1, round(at)))
    steps[-1] = total - 1
    return tuple(steps)


def generic_plan(budget: int, num_inference_steps: int, sigmas: tuple[float, ...] | None) -> Plan:
    """Return the generic schedule as a plan, its segments along damped lines.

    Args:
        budget, num_inference_steps: as `generic_steps` takes them.
        sigmas: noise level of each step; None holds.
    """
    plan = Plan(generic_steps(budget, num_inference_steps), num_inference_steps)
    return plan if sigmas is None else along_damped_lines(plan, sigmas)


def along_damped_lines(plan: Plan, sigmas: tuple[float, ...]) -> Plan:
    """Return a plan with each segment filled along the damped line of `damped_scales`."""
    scales = damped_scales(plan.steps, sigmas)
    segments = len(plan.steps) - (plan.steps[-1] == plan.num_inference_steps - 1)
    orders = tuple(int(scale > 0.0) for scale in scales[:segments])
    return Plan(
        plan.steps,
        plan.num_inference_steps,
        orders=orders,
        scales=scales[:segments],
        origin=plan.origin,
    )


def _widths(weights: list[float], total: int, length: int) -> list[float]:
    """Widths from 1 up in the proportion of weights, none too wide, that fill a length."""
    widest = max(WIDEST_GAP * max(1.0, total / OF_STEPS), length / len(weights) + 0.5)
    low, high = 0.0, float(length) / min(weights)
    for _ in range(60):  # bisection: the sum grows with the factor
        factor = (low + high) / 2
        if sum(min(widest, 1.0 + factor * weight) for weight in weights) < length:
            low = factor
        else:
            high = factor
    return [min(widest, 1.0 + high * weight) for weight in weights]


def _weight(place: float) -> float:
    """The width of a gap at a place from 0 to 1 among the wide ones."""
    widening: float = min(1.0, place / (1.0 - CLOSING)) ** WIDENING
    closing = max(0.0, place - (1.0 - CLOSING)) / CLOSING
    return widening * (1.0 - (1.0 - CLOSED_TO) * closing)


def _short(budget: int, total: int) -> tuple[int, ...]:
    """Nothing reused in the first steps, and small gaps."""
    start = min(_SHORT_START, total)
    rest = total - start
    gap = 1 if rest <= 0 else min(_SHORT_GAP, max(2, -(-rest // max(1, budget - start))))
    steps = [*range(start), *range(start - 1 + gap, total, gap)]
    return tuple(dict.fromkeys((*steps, total - 1)))
