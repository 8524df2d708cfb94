"""The generic schedule: what it minimises, its shape, known lists, and the damping of its lines."""

import itertools
import math
from statistics import fmean

import pytest

from vidaccel.plans.forecast import damped_scales, is_guided
from vidaccel.plans.generic import (
    END,
    SHORT_RUN,
    SHORTEST_RUN,
    START,
    along_damped_lines,
    generic_plan,
    generic_steps,
)
from vidaccel.plans.plan import Plan
from vidaccel.plans.shipped import load_shipped


# Shift -> the noise levels of a flow in so many steps.
def flow(total, shift=1.0):
    levels = [1 - step / total for step in range(total)]
    return tuple(shift * level / (1 + (shift - 1) * level) for level in levels)


def gaps(steps):
    return [b - a for a, b in itertools.pairwise(steps)]


def error(steps, t):
    """The error of a schedule at places t, as the module's docstring has it."""
    total = 0.0
    for start, end in itertools.pairwise((*steps, len(t) - 1)):
        reach = sum((t[s] - t[start]) * (t[s + 1] - t[s]) for s in range(start + 1, end))
        total += reach / (t[start] + START) ** 2 + reach / (1 - t[start] + END) ** 2
    return total


@pytest.mark.parametrize("total", [16, 17, 30, 50, 100])
@pytest.mark.parametrize("shift", [None, 1.0, 7.0])
def test_every_budget_has_a_schedule(total, shift):
    sigmas = None if shift is None else flow(total, shift)
    for budget in {2, 3, 5, total // 5, total // 3, total // 2, total - 1, total}:
        steps = generic_steps(budget, total, sigmas)
        assert len(steps) == budget and steps[0] == 0 and steps[-1] < total
        assert min(gaps(steps)) >= 1
    assert generic_steps(5, 3) == (0, 1, 2) and generic_steps(1, 2) == (0, 1)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_it_is_the_one_of_least_error(shift):
    """Among all of its budget, in noise level and in steps together."""
    total, levels = 16, [*flow(16, shift), 0.0]
    places = [step / total for step in range(total + 1)], [1 - level for level in levels]
    every = ((0, *rest) for rest in itertools.combinations(range(1, total), 5))
    near = [steps for steps in every if max(gaps((*steps, total))) <= 4]
    best = min(near, key=lambda steps: sum(error(steps, t) for t in places))
    assert generic_steps(6, total, flow(16, shift)) == best


def test_the_shape_is_that_of_known_lists():
    steps = generic_steps(17, 50)
    assert steps[:5] == (0, 1, 2, 3, 4)
    widths = gaps(steps)
    widest = widths.index(max(widths))
    assert max(widths) <= 9
    assert widths[: widest + 1] == sorted(widths[: widest + 1])
    assert widths[-1] < max(widths)
    assert max(gaps(generic_steps(10, 50))) <= 8 and max(gaps(generic_steps(4, 16))) <= 5
    assert max(gaps(generic_steps(20, 100))) <= 16


def test_a_shift_moves_it_to_where_the_noise_level_falls():
    steps = [generic_steps(17, 50, flow(50, shift)) for shift in (1.0, 3.0, 7.0)]
    assert steps[0] == generic_steps(17, 50)
    late = [sum(step >= 40 for step in each) for each in steps]
    early = [sum(step < 10 for step in each) for each in steps]
    assert late == sorted(late) and late[0] < late[-1]
    assert early == sorted(early, reverse=True) and early[-1] < early[0]


def test_it_is_near_the_lists_that_were_published():
    distances = []
    for _, policy in load_shipped():
        total = policy.num_inference_steps
        for budget in policy.budgets():
            if total < 30 or not 1 / 6 <= budget / total <= 2 / 3:
                continue
            known = policy.plan(budget=budget).steps
            found = generic_steps(budget, total)
            distances.append(fmean(abs(a - b) for a, b in zip(known, found, strict=True)))
    assert len(distances) >= 50
    assert fmean(distances) < 2.0 and max(distances) < 6.5


def test_levels_of_other_kinds():
    """Beside a whole picture, as of VP models; and levels that say nothing."""
    levels = flow(20, 3.0)
    beside = tuple(level / (1 - level) for level in levels[1:])
    assert generic_steps(6, 19, beside) == generic_steps(6, 19, levels[1:])
    for useless in ((0.5,) * 20, tuple(reversed(levels)), (*levels[:-1], 0.0)):
        assert generic_steps(6, 20, useless) == generic_steps(6, 20)


@pytest.mark.parametrize("total", range(8, SHORT_RUN))
@pytest.mark.parametrize("share", [2, 3, 5])
def test_short_runs_reuse_gently(total, share):
    for sigmas in (None, flow(total, 5.0)):
        steps = generic_steps(-(-total // share), total, sigmas)
        assert steps[:3] == (0, 1, 2)
        assert max(gaps((*steps, total))) <= (3 if total >= SHORTEST_RUN else 2)
        assert len(steps) < total


def test_a_line_is_damped_by_how_far_it_is_known():
    sigmas = (1.0, 0.9, 0.8, 0.6, 0.5, 0.1)
    # From 1 after 0: known over 0.1 and a step, reaches over 0.3 and two; from 3 after 1: 0.3 and
    # two, 0.6 and three.
    scales = (0.0, 1 / 3 * 1 / 2, 1 / 2 * 2 / 3)
    assert damped_scales((0, 1, 3), sigmas) == pytest.approx(scales)
    # Without guidance a line may be followed further.
    further = tuple(math.sqrt(scale) for scale in scales)
    assert damped_scales((0, 1, 3), sigmas, guided=False) == pytest.approx(further)
    assert generic_plan(3, 6, sigmas, guided=False).scales == pytest.approx(
        tuple(math.sqrt(scale) for scale in generic_plan(3, 6, sigmas).scales)
    )
    plan = along_damped_lines(Plan((0, 1, 3), 6), sigmas)
    assert plan.orders == (0, 1, 1)
    assert plan.scales == pytest.approx(scales)
    # Evenly falling levels and even gaps: the whole line.
    even = tuple(1 - step / 10 for step in range(10))
    assert damped_scales((0, 2, 4, 6, 8), even) == pytest.approx((0.0, 1.0, 1.0, 1.0, 1.0))
    assert along_damped_lines(Plan((0, 5), 6), sigmas).orders == (0,)


def test_a_scale_that_is_not_known_counts_as_guided():
    scales = (None, 5.0, 1.5, 1.0, 0.0)
    assert [is_guided(scale) for scale in scales] == [True, True, True, False, False]


def test_levels_that_do_not_fall_hold():
    assert damped_scales((0, 1, 3), (0.5, 0.5, 0.5, 0.5)) == pytest.approx((0.0, 0.0, 0.0))
    rising = (0.1, 0.2, 0.3, 0.4)
    assert damped_scales((0, 1, 3), rising) == pytest.approx((0.0, 0.0, 0.0))


def test_without_noise_levels_it_holds():
    assert generic_plan(10, 50, None) == Plan(generic_steps(10, 50), 50)
