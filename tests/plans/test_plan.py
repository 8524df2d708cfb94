"""Plans: what is accepted, what is refused, and which steps they compute."""

import itertools

import pytest

from vidaccel.errors import PlanError
from vidaccel.plans.plan import Plan, RunSettings
from vidaccel.resolve import Resolver


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "an empty list"),
        ((1, 2), "1 first"),
        ((0, 3, 2), "2 after 3"),
        ((0, 3, 3), "3 after 3"),
        ((0, 2.0), "whole numbers"),
        ((0, True), "whole numbers"),
        ((0, 4, 10), "computes step 10, but the run has 10 steps"),
    ],
)
def test_malformed_plans_are_refused(steps, message):
    with pytest.raises(PlanError, match=message):
        Plan(steps, 10)


@pytest.mark.parametrize("total", [0, -1, True, 2.5])
def test_a_plan_needs_steps(total):
    with pytest.raises(PlanError, match="num_inference_steps"):
        Plan((0,), total)


def test_what_a_plan_says_of_each_step():
    plan = Plan([0, 1, 4], 7)
    assert [plan.computes(s) for s in range(7)] == [True, True, False, False, True, False, False]
    assert [plan.anchor(s) for s in range(7)] == [0, 1, 1, 1, 4, 4, 4]
    # A residual is kept exactly while the next step reuses it.
    assert [plan.keeps(s) for s in range(7)] == [0, 1, 1, 0, 1, 1, 0]
    assert str(plan) == "3 of 7 steps computed"
    assert plan == Plan((0, 1, 4), 7)


def test_a_forecast_keeps_what_its_order_needs():
    plan = Plan([0, 1, 4, 6], 9, orders=(0, 1, 0, 2))
    assert [plan.order(s) for s in (2, 3, 5, 7, 8)] == [1, 1, 0, 2, 2]
    # The parabola from step 6 on needs the residuals of steps 1, 4 and 6.
    assert [plan.keeps(s) for s in range(9)] == [3, 3, 3, 3, 3, 3, 3, 3, 0]
    plan = Plan([0, 1, 4, 6], 9, orders=(0, 1, 0, 0))
    assert [plan.keeps(s) for s in range(9)] == [2, 2, 2, 0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("orders", "message"),
    [((0,), "3 segments, found 1 orders"), ((0, 3, 0), "order 1 is 3"), ((0, True, 0), "order 1")],
)
def test_wrong_orders_are_refused(orders, message):
    with pytest.raises(PlanError, match=message):
        Plan([0, 3, 6], 9, orders=orders)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 60])
def test_every_n(n):
    plan = Plan.every(n, 50)
    assert plan.steps == tuple(s for s in range(50) if s % n == 0)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (None, range(10)),
        ("every 4", (0, 4, 8)),
        ("every:4", (0, 4, 8)),
        ([0, 5], (0, 5)),
        (range(0, 10, 5), (0, 5)),
        (Plan((0, 9), 10), (0, 9)),
    ],
)
def test_policies(policy, steps):
    assert Resolver(policy).plan(RunSettings(10)).steps == tuple(steps)


@pytest.mark.parametrize(
    "policy",
    ["every 0", "every", "every -3", "sometimes", "", 5, 2.5, {0: 1}, [1, 2], [0, 0], b"0"],
)
def test_other_policies_are_refused_at_once(policy):
    with pytest.raises(PlanError):
        Resolver(policy)


def test_a_plan_for_another_number_of_steps_is_refused():
    with pytest.raises(PlanError, match="made for 10 steps, but this run has 12"):
        Resolver(Plan((0, 5), 10)).plan(RunSettings(12))
    with pytest.raises(PlanError, match="computes step 5, but the run has 4 steps"):
        Resolver([0, 5]).plan(RunSettings(4))


def test_spread_is_as_even_as_whole_steps_allow():
    for total in (10, 37, 50):
        for budget in range(1, total + 1):
            steps = Plan.spread(budget, total).steps
            assert len(steps) == budget
            gaps = [b - a for a, b in itertools.pairwise((*steps, total))]
            assert max(gaps) - min(gaps) <= 1
    with pytest.raises(PlanError, match="budget of 11 for 10"):
        Plan.spread(11, 10)


def test_a_forecast_plan_computes_the_same_steps():
    plan = Plan((0, 3, 9), 10).forecast(1)
    assert plan.steps == (0, 3, 9) and plan.orders == (1, 1)
    assert Plan((0, 3), 10).forecast(2).orders == (2, 2)
