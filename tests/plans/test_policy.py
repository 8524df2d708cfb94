"""The policy: what it refuses, its plans by wish, and how it is held against a run."""

import json

import pytest

from tiny.policies import SIGMAS, forecasting, parse, run_settings, valid
from vidaccel.errors import PolicyError
from vidaccel.plans.edge import Edge
from vidaccel.plans.plan import Plan


def changed(path, value, start=valid):
    """The JSON object that `start` makes, with another value at a path; KeyError takes it away."""
    data = start()
    target = data
    for key in path[:-1]:
        target = target[key]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return data


def test_plans_by_wish():
    policy = parse(valid())
    assert policy.budgets() == [3, 4]
    assert policy.plan(budget=3) == Plan((0, 3, 5), 6, (0.3, 0.5))
    assert policy.plan(speedup=1.5).steps == (0, 2, 4, 5)
    assert policy.plan(speedup=1.6).steps == (0, 3, 5)
    assert policy.plan(max_error=0.5).steps == (0, 3, 5)
    assert policy.plan(max_error=0.3).steps == (0, 2, 4, 5)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "takes one of"),
        ({"budget": 3, "speedup": 2.0}, "takes one of"),
        ({"budget": 5}, "budget: found 5, .* budgets 3-4 of 6 steps"),
        ({"speedup": 3.0}, "speedup: found 3.0"),
        ({"max_error": 0.1}, "max_error: found 0.1"),
    ],
)
def test_impossible_wishes(wish, message):
    with pytest.raises(PolicyError, match=message):
        parse(valid()).plan(**wish)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], "2.0", "schema_version: found '2.0', expected '1.x'"),
        (["schema_version"], 1, "schema_version: found 1"),
        (["schema_version"], KeyError, "schema_version: found None"),
        (["plans"], KeyError, "plans: Field required"),
        (["plans"], {}, "plans: "),
        (["surprise"], 1, "surprise: found an unknown field"),
        (["num_inference_steps"], "6", "num_inference_steps: .*found '6'"),
        (["num_inference_steps"], True, "num_inference_steps: "),
        (["num_inference_steps"], 10**9, "num_inference_steps: "),
        (["num_inference_steps"], 5, "scheduler.sigmas: found 6 entries, expected 5"),
        (["model", "id"], "../../etc/passwd", "model.id: "),
        (["model", "id"], "/etc/passwd", "model.id: "),
        (["model", "id"], "org/..", "model.id: "),
        (["model", "transformer"], "a/b", "model.transformer: "),
        (["scheduler", "sigmas", 2], -0.5, "scheduler.sigmas.2: "),
        (["scheduler", "sigmas", 2], "x", "scheduler.sigmas.2: "),
        (["edges", 0, "mean"], -1.0, "edges.0.mean: "),
        (["edges", 1], {"start": 0, "end": 2, "mean": 0.1}, "edges: found 0 to 2 twice"),
        (["edges", 0, "end"], 0, "edges: found 0 to 0"),
        (["edges", 0, "end"], 9, "edges: found 0 to 9 in 6 steps"),
        (["plans", "4", "steps"], [0, 2, 4], "plans.4: found 3 steps, expected 4"),
        (["plans", "4", "steps"], [0, 4, 2, 5], "plans.4: .*strictly increase"),
        (["plans", "4", "steps"], [0, 2, 2, 5], "plans.4: .*strictly increase"),
        (["plans", "4", "steps"], [-1, 2, 4, 5], "plans.4.steps.0: "),
        (["plans", "4", "steps"], [0, 2, "4", 5], "plans.4.steps.2: "),
        (["plans", "4", "steps"], {"0": 2}, "plans.4.steps: "),
        (["plans", "4", "errors"], [0.1, -0.25, 0.0], "plans.4.errors.1: "),
        (["plans", "4", "steps"], [1, 2, 4, 5], "plans.4: .*starts at step 0"),
        (["plans", "4", "steps"], [0, 2, 4, 6], "plans.4: .*computes step 6"),
        (["plans", "4", "errors"], [0.1, 0.2, 0.0], "found 0.2 from step 2 to 4, expected 0.25"),
        (["plans", "4", "errors"], [0.1], "plans.4: .*3 segments, found 1 errors"),
        (["plans", "x"], {"steps": [0]}, "plans.x"),
        (["plans", "3", "steps"], [0, 1, 5], "expected an edge|found 0.3 from step 0 to 1"),
        (["provenance"], "rumour", "provenance: "),
        (["validation", 0, "speedup"], 0, "validation.0.speedup: "),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_fields_are_named(path, value, message):
    with pytest.raises(PolicyError, match=message):
        parse(changed(path, value))


def test_a_newer_minor_version_warns_and_drops_what_it_does_not_know():
    data = valid() | {"schema_version": "1.7", "colour": "blue"}
    with pytest.warns(UserWarning, match=r"schema 1\.7"):
        policy = parse(data)
    assert policy.plans == parse(valid()).plans


def test_a_policy_fits_its_own_setting():
    parse(valid()).check(run_settings())
    parse(valid()).check(run_settings(sigmas=tuple(s * (1 + 1e-6) for s in SIGMAS)))
    parse(valid()).check(run_settings(model_id=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": "CogVideoXTransformer3DModel"}, "model.transformer: .*CogVideoX"),
        ({"model_id": "org/other"}, "model.id: the policy is for org/tiny-wan"),
        ({"num_inference_steps": 30}, "num_inference_steps: the policy is for 6, this run has 30"),
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler.name: "),
        ({"sigmas": (1.0, 0.9, 0.7, 0.6, 0.4, 0.1)}, "sigmas: the policy has 0.80000 at step 2"),
    ],
)
def test_a_policy_refuses_another_setting(changes, message):
    with pytest.raises(PolicyError, match=message):
        parse(valid()).check(run_settings(**changes))


def test_lines_and_scales_round_trip():
    policy = parse(forecasting())
    assert parse(json.loads(policy.to_json())) == policy
    plan = policy.plan(budget=4)
    assert (plan.order(3), plan.scale(3), plan.order(1)) == (1, 0.5, 0)
    assert Edge(2, 4, 0.1, 1, 0.5, 0) in policy.search_edges()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["edges", -1, "previous"], 2, "previous 2, expected a step before 2"),
        (["edges", -1, "previous"], KeyError, "previous None, expected a step before 2"),
        (["edges", -1, "scale"], 3.0, "edges.5.scale: "),
        (["edges", -1, "scale"], 0.25, "found 0.1 from step 2 to 4, expected an edge"),
        (["edges", -1, "order"], 3, "edges.5.order: "),
        (["plans", "4", "scales"], [1.0], "3 segments, found 1 scales"),
        (["plans", "4", "scales"], [1.0, -0.5, 1.0], "plans.4.scales.1: "),
        (["plans", "4", "stability"], [1.0], "stability: found 1 entries, expected 4"),
        (["plans", "4", "stability"], [1, 2, 1, 1], "plans.4.stability.1: "),
    ],
)
def test_wrong_lines_and_scales_are_named(path, value, message):
    with pytest.raises(PolicyError, match=message):
        parse(changed(path, value, forecasting))
