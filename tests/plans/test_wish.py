"""One wish for a plan, and what it comes to."""

import math

import pytest

from tiny.policies import parse, valid
from vidaccel.errors import PlanError, PolicyError
from vidaccel.plans.fidelity import predicted_psnr, scaled
from vidaccel.plans.plan import Plan
from vidaccel.plans.wish import Wish


@pytest.mark.parametrize(
    ("wish", "steps"),
    [
        (Wish(), 17),
        (Wish("quality"), 25),
        (Wish("fast"), 10),
        (Wish(speedup=2.0), 25),
        (Wish(speedup=2.1), 23),
        (Wish(budget=30), 30),
        (Wish(max_error=0.1), None),
        (Wish(psnr=40.0), None),
    ],
)
def test_steps_of_a_wish(wish, steps):
    assert wish.steps_of(50) == steps


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ({"preset": "best"}, PlanError),
        ({"speedup": 2.0, "psnr": 40.0}, PlanError),
        ({"psnr": math.nan}, PlanError),
        ({"budget": True}, PlanError),
        ({"speedup": "2"}, PlanError),
    ],
)
def test_what_is_no_wish(wish, error):
    with pytest.raises(error):
        Wish(**wish)


@pytest.mark.parametrize("wish", [{"budget": 51}, {"budget": 0}, {"speedup": 60.0}])
def test_wishes_that_no_run_fulfils(wish):
    with pytest.raises(PolicyError, match="1 to 50 of 50 steps"):
        Wish(**wish).steps_of(50)


CURVE = ((0.01, 50.0), (0.1, 40.0), (1.0, 25.0))


def _plan(*errors):
    return Plan((0, 2, 4), 6, errors)


def test_the_prediction_falls_with_the_error():
    assert predicted_psnr(CURVE, _plan(0.05, 0.03, 0.02)) == pytest.approx(40.0)
    between = predicted_psnr(CURVE, _plan(0.01, 0.02, 0.0016))
    assert between == pytest.approx(45.0, abs=0.02)
    assert predicted_psnr(CURVE, _plan(0.001, 0.0, 0.0)) == pytest.approx(70.0)
    assert predicted_psnr(CURVE, _plan(5.0, 5.0, 0.0)) == pytest.approx(5.0)
    assert predicted_psnr(CURVE, _plan(0.0, 0.0, 0.0)) == math.inf
    assert predicted_psnr(CURVE, Plan((0, 2, 4), 6)) is None
    assert predicted_psnr(CURVE, Plan(tuple(range(6)), 6)) == math.inf
    twice = predicted_psnr(scaled(CURVE, 2.0), _plan(0.1, 0.06, 0.04))
    assert twice == pytest.approx(40.0)


def test_a_policy_is_asked_for_the_fastest_plan_that_comes_so_close():
    data = valid()
    with pytest.raises(PolicyError, match="predicts none"):
        parse(data).plan(psnr=40.0)
    curve = sorted((sum(plan["errors"]), 30.0 + int(b)) for b, plan in data["plans"].items())
    policy = parse({**data, "schema_version": "1.3", "fidelity": [list(p) for p in curve]})
    assert len(policy.plan(psnr=33.0).steps) == 3
    assert len(policy.plan(psnr=33.5).steps) == 4
    assert policy.predicted_psnr(3) == pytest.approx(33.0)
    with pytest.raises(PolicyError, match="psnr: found 90"):
        policy.plan(psnr=90.0)


def test_a_curve_that_rises_is_refused():
    with pytest.raises(PolicyError, match="fidelity"):
        parse({**valid(), "schema_version": "1.3", "fidelity": [[0.1, 30.0], [0.2, 40.0]]})
