"""Plans improved by running their neighbours."""

import itertools

import pytest

from tiny.building import build_for, prompted
from tiny.wan import wan
from vidaccel import CachePolicy, Plan
from vidaccel.calibration.improve import SAMPLES, improving, neighbours
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.runners import Worker
from vidaccel.errors import PlanError

STEPS = 8


@pytest.fixture
def case():
    return prompted(wan())


def solve(error_of, starts, runs=10_000, samples=1, **options):
    """Drive a search; returns its plan and the runs that it asked for."""
    search = improving(starts, samples, runs, **options)
    asked = []
    try:
        trial = next(search)
        while True:
            asked.append(trial)
            trial = search.send(error_of(*trial))
    except StopIteration as end:
        return end.value, asked


def distance(plan, steps, wanted=1.0):
    """How far a plan is from the computed `steps` and from scale `wanted` in every segment."""
    scales = [plan.scale(s) * bool(plan.order(s)) for s in range(10) if not plan.computes(s)]
    return sum(abs(a - b) for a, b in zip(plan.steps, steps, strict=True)) + sum(
        abs(scale - wanted) for scale in scales
    )


def test_it_walks_to_the_best_plan():
    best = (0, 1, 3, 4, 9)
    found, _ = solve(lambda _, plan: distance(plan, best, 0.5), [Plan.spread(5, 10)])
    assert found.steps == best
    assert all(found.order(s) == 1 and found.scale(s) == 0.5 for s in (2, 5, 6, 7, 8))


def test_it_starts_from_the_best_candidate():
    near, far = Plan((0, 1, 2, 3, 8), 10), Plan((0, 6, 7, 8, 9), 10)
    error = {near.steps: 1.0, far.steps: 2.0}
    found, asked = solve(lambda _, plan: error.get(plan.steps, 3.0), [far, near])
    assert found.steps == near.steps
    assert [plan for _, plan in asked[:2]] == [far, near]


def test_a_change_has_to_be_better_on_every_prefix_of_the_samples():
    start = Plan((0, 2, 4), 6)

    def error(sample, plan):
        return 1.0 if plan == start else (0.5, 3.0, 0.1)[sample]

    found, asked = solve(error, [start], samples=3)
    assert found == start
    assert max(sample for sample, plan in asked if plan != start) == 1


def test_runs_and_samples_are_bounded():
    counter = itertools.count(1000, -1)
    _, asked = solve(lambda *_: next(counter), [Plan.spread(5, 20)], runs=37, samples=9)
    assert {sample for sample, _ in asked} == set(range(SAMPLES))
    assert 37 <= len(asked) < 37 + SAMPLES
    plans = [plan for sample, plan in asked if sample == 0]
    assert len({(plan.steps, plan.orders, plan.scales) for plan in plans}) == len(plans)


@pytest.mark.parametrize("lines", [True, False])
def test_neighbours_are_plans_of_the_same_budget(lines):
    plan = Plan((0, 3, 4, 7), 10, orders=(0, 0, 1, 1), scales=(1, 1, 0.5, 1))
    found = list(neighbours(plan, forced=[4], lines=lines))
    assert all(
        len(other.steps) == 4 and other.steps[0] == 0 and 4 in other.steps for _, other in found
    )
    moved = {other.steps for _, other in found if other.steps != plan.steps}
    assert moved == {(0, 2, 4, 7), (0, 3, 4, 6), (0, 3, 4, 8)}
    forecast = [other for _, other in found if other.steps == plan.steps]
    assert {other.scale(5) for other in forecast} == ({0.25, 0.75, 0.5} if lines else set())


def test_a_built_policy_holds_the_improved_plans(case, tmp_path, monkeypatch):
    options = {"num_inference_steps": STEPS, "method": "gain", "validate": True, "improve": 60}
    policy = build_for(case, workdir=tmp_path, **options)
    rows = [row for row in policy.validation if row.candidate == "improved"]
    assert rows
    kept = {row.budget: row for row in policy.validation if row.kept}
    for row in rows:
        assert kept[row.budget].psnr >= row.psnr
    assert CachePolicy.from_json(policy.to_json()) == policy
    made = len(list(tmp_path.glob("trial-*.json")))
    assert made <= len(kept) * (options["improve"] + SAMPLES)

    # What ran before is not run again, and gives the same plans.
    monkeypatch.setattr(Worker, "trial", lambda *_: pytest.fail("ran again"))
    again = build_for(case, workdir=tmp_path, **options)
    assert again.plans == policy.plans


def test_a_run_is_that_of_the_plan(case):
    call = {**case.call, "num_inference_steps": STEPS, "prompt": "a"}
    plan = Plan((0, 1, 4, 7), STEPS).forecast(1, 0.5)
    with Replayer(case.pipe, call) as replayer:
        expected = replayer.error_of(plan)
        replayer.forget_steps()
        assert replayer.reference.recording.bytes_held == 0 and not replayer.reference.inputs
        assert replayer.error_of(plan) == expected > 0


def test_wrong_arguments(case):
    with pytest.raises(PlanError, match="improve: found -1, expected 0 or more"):
        build_for(case, improve=-1)
    with pytest.raises(PlanError, match="improve: found 5; improved plans need validate=True"):
        build_for(case, improve=5)
