"""The generic schedule: its shape, how near it is to known lists, and the damping of its lines."""

import itertools
from statistics import fmean

import pytest

from vidaccel.plans.forecast import damped_scales
from vidaccel.plans.generic import SHORT_RUN, along_damped_lines, generic_plan, generic_steps
from vidaccel.plans.plan import Plan
from vidaccel.plans.shipped import load_shipped


def gaps(steps):
    return [b - a for a, b in itertools.pairwise(steps)]


@pytest.mark.parametrize("total", [16, 17, 20, 25, 30, 40, 50, 64, 100, 333, 1000])
def test_every_budget_has_a_schedule(total):
    for budget in {*range(2, min(total, 60) + 1), total // 2, total - 1, total}:
        steps = generic_steps(budget, total)
        assert len(steps) == budget and steps[0] == 0 and steps[-1] == total - 1
        assert min(gaps(steps)) >= 1


def test_the_shape_is_that_of_known_lists():
    steps = generic_steps(17, 50)
    assert steps[:5] == (0, 1, 2, 3, 4)
    widths = gaps(steps)
    widest = widths.index(max(widths))
    assert max(widths) <= 9
    assert widths[: widest + 1] == sorted(widths[: widest + 1])
    assert widths[-1] < max(widths)
    assert max(gaps(generic_steps(10, 50))) <= 9
    assert gaps(generic_steps(34, 100)) != gaps(generic_steps(17, 50))


def test_it_is_near_the_lists_that_it_is_fitted_to():
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
    assert fmean(distances) < 1.6 and max(distances) < 5.5


@pytest.mark.parametrize("total", range(8, SHORT_RUN))
@pytest.mark.parametrize("share", [2, 3, 5])
def test_short_runs_reuse_gently(total, share):
    steps = generic_steps(-(-total // share), total)
    assert steps[:3] == (0, 1, 2) and steps[-1] == total - 1
    assert max(gaps(steps)) <= 3
    assert len(steps) < total


def test_a_line_is_damped_by_how_far_it_is_known():
    sigmas = (1.0, 0.9, 0.8, 0.6, 0.5, 0.1)
    # From 1 after 0: known over 0.1, reaches 0.3 to step 3; from 3 after 1: known over 0.3.
    assert damped_scales((0, 1, 3), sigmas) == pytest.approx((0.0, 1 / 9, 1 / 4))
    plan = along_damped_lines(Plan((0, 1, 3), 6), sigmas)
    assert plan.orders == (0, 1, 1)
    assert plan.scales == pytest.approx((0.0, 1 / 9, 1 / 4))
    # Evenly falling levels and even gaps: the whole line.
    even = tuple(1 - step / 10 for step in range(10))
    assert damped_scales((0, 2, 4, 6, 8), even) == pytest.approx((0.0, 1.0, 1.0, 1.0, 1.0))
    assert along_damped_lines(Plan((0, 5), 6), sigmas).orders == (0,)


def test_levels_that_do_not_fall_hold():
    assert damped_scales((0, 1, 3), (0.5, 0.5, 0.5, 0.5)) == pytest.approx((0.0, 0.0, 0.0))
    rising = (0.1, 0.2, 0.3, 0.4)
    assert damped_scales((0, 1, 3), rising) == pytest.approx((0.0, 0.0, 0.0))


def test_without_noise_levels_it_holds():
    assert generic_plan(10, 50, None) == Plan(generic_steps(10, 50), 50)
