"""The generic schedule: the computed steps of least error for a run of which nothing is measured.

The errors that were measured on the embedded model's first version follow one rule over 12 to 50
steps and shifts 1 to 7: holding the residual of step i until step j goes wrong by how far the
reused steps are from i, times how far the sampler goes in them, times a gain that grows towards
pure noise and towards none, 1 / (t + START) ** 2 + 1 / (1 - t + END) ** 2 at t = 1 - noise level.
In log-SNR that is about even.
The step lists that were published for LeMiCa (arXiv 2511.00090) follow the same rule with t the
place of a step in the run, whatever its noise level: those of Wan lie 1.5 steps from its schedules
on average. So a schedule has to do for both: it is the one with the least sum of the two errors.
"""

from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from vidaccel.plans.forecast import damped_scales
from vidaccel.plans.plan import Plan

# Where the gain ends to grow, at the start of a run and at its end. The start was fitted to the
# errors of a policy of 50 steps of the embedded model's first version. Of 0.1, 0.15, 0.2 and 0.3
# for the end, 0.15 lies nearest to the published lists, and on the second version 0.15 and 0.2 are
# level with 0.1 at half the steps and ahead of it at a third, most of all at shifts 3 to 7.
START, END = 0.03, 0.15
# No gap is wider than this share of the run, 8 of 50 steps, or this many times the mean gap.
WIDEST_SHARE, WIDEST_TIMES = 0.16, 1.2

# Runs shorter than this reuse gently, since each of their steps changes the sample a lot: nothing
# in the first three steps, and then at most two in a row, or one in the shortest runs.
SHORT_RUN, SHORTEST_RUN = 16, 12
_SHORT_START = 3


def generic_steps(
    budget: int, num_inference_steps: int, sigmas: tuple[float, ...] | None = None
) -> tuple[int, ...]:
    """Return the computed steps of the generic schedule.

    Args:
        budget: steps to compute; raised where a short run needs more.
        num_inference_steps: T.
        sigmas: noise level of each step; None, or levels that do not fall, go by the steps alone.

    Returns:
        Increasing step indices from 0 on.
    """
    total = num_inference_steps
    if budget >= total or total < 3:
        return tuple(range(total))
    levels = None if sigmas is None else _falling(sigmas)
    return _solved(max(2, budget), total, levels)


def generic_plan(
    budget: int,
    num_inference_steps: int,
    sigmas: tuple[float, ...] | None,
    *,
    guided: bool = True,
) -> Plan:
    """Return the generic schedule as a plan, its segments along damped lines.

    Args:
        budget, num_inference_steps, sigmas: as `generic_steps` takes them; without noise levels
            residuals are held.
        guided: as `damped_scales` takes it.
    """
    plan = Plan(generic_steps(budget, num_inference_steps, sigmas), num_inference_steps)
    return plan if sigmas is None else along_damped_lines(plan, sigmas, guided=guided)


def along_damped_lines(plan: Plan, sigmas: tuple[float, ...], *, guided: bool = True) -> Plan:
    """Return a plan with each segment filled along the damped line of `damped_scales`.

    Args:
        plan: its steps are kept, what fills its segments is not.
        sigmas, guided: what `damped_scales` takes of a run.
    """
    scales = damped_scales(plan.steps, sigmas, guided=guided)
    segments = len(plan.steps) - (plan.steps[-1] == plan.num_inference_steps - 1)
    orders = tuple(int(scale > 0.0) for scale in scales[:segments])
    return Plan(
        plan.steps,
        plan.num_inference_steps,
        orders=orders,
        scales=scales[:segments],
        origin=plan.origin,
    )


def _falling(sigmas: tuple[float, ...]) -> tuple[float, ...] | None:
    """Noise levels of a flow, from 1 down; None where they do not fall step by step."""
    # Levels beyond 1 are those of noise beside a whole picture, not of a mixture of both.
    levels = [s / (1.0 + s) for s in sigmas] if max(sigmas) > 1.5 else list(sigmas)
    falls = all(a > b for a, b in zip(levels, (*levels[1:], 0.0), strict=True))
    return tuple(level / levels[0] for level in levels) if falls else None


@lru_cache(maxsize=64)
def _solved(budget: int, total: int, levels: tuple[float, ...] | None) -> tuple[int, ...]:
    """The steps of least error: the shortest path of `budget` nodes, by dynamic programming."""
    widest = ceil(max(WIDEST_SHARE * total, WIDEST_TIMES * total / budget))
    start = 1
    if total < SHORT_RUN:
        widest, start = 3 if total >= SHORTEST_RUN else 2, _SHORT_START
    widest = min(widest, total - 1)
    costs = _errors(np.arange(total + 1) / total, widest)
    if levels is not None:
        costs = costs + _errors(1.0 - np.array([*levels, 0.0]), widest)
    # [T + 1, widest]: row j, column g - 1 is the error of the segment that ends at j and is g
    # long; at T the run has ended.
    for begin in range(start - 1):
        for gap in range(2, min(widest, total - begin) + 1):
            costs[begin + gap, gap - 1] = np.inf

    least = np.full(total + 1, np.inf)  # error of the best path to each step
    least[0] = 0.0
    gaps: list[NDArray[np.int64]] = []
    # A budget that allows no path is raised until there is one.
    while len(gaps) < budget or not np.isfinite(least[-1]):
        padded = np.concatenate([np.full(widest, np.inf), least])
        before = np.lib.stride_tricks.sliding_window_view(padded, widest)[:-1, ::-1] + costs
        gaps.append(before.argmin(1) + 1)
        least = before.min(1)
    steps = [total]
    for to_each in reversed(gaps):
        steps.append(steps[-1] - int(to_each[steps[-1]]))
    return tuple(reversed(steps[1:]))


def _errors(t: NDArray[np.float64], widest: int) -> NDArray[np.float64]:
    """Errors of holding over each segment, [T + 1, widest] by its end and its length less 1.

    Args:
        t: [T + 1] how far each step and the end are from pure noise, from 0 to 1.
        widest: the longest segment.
    """
    total = len(t)
    gain = 1.0 / (t + START) ** 2 + 1.0 / (1.0 - t + END) ** 2
    errors = np.full((total, widest), np.inf)
    errors[1:, 0] = 0.0
    so_far = np.zeros(total)  # of the segment that begins at each step
    for gap in range(2, widest + 1):
        begin = np.arange(total - gap)
        last = begin + gap - 1  # the last reused step
        so_far[begin] += (t[last] - t[begin]) * (t[last + 1] - t[last])
        errors[begin + gap, gap - 1] = gain[begin] * so_far[begin]
    return errors
