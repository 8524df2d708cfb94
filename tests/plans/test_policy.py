"""The policy: what it refuses, its plans by wish, and how it is held against a run."""

import json
import re
from dataclasses import replace

import pytest

from tiny.policies import SIGMAS, forecasting, parse, run_settings, valid
from vidaccel.errors import PolicyError
from vidaccel.plans.edge import Edge
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies

# Configs of two models and of one with another entry, and what a policy knows of the first.
SMALL = {"num_layers": 3, "pos_embed_seq_len": None, "guidance_embeds": False, "task_type": "t2v"}
LARGER = SMALL | {"num_layers": 40}
FIRST_LAST = SMALL | {"pos_embed_seq_len": 514}
KNOWN = {"config": SMALL, "config_hash": "f" * 64, "experts": 1}


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
        (["model", "config"], {"num_layers": 1.5}, "model.config.num_layers: an entry is a whole"),
        (["model", "config"], {"num_layers": [1]}, "model.config.num_layers: an entry is a whole"),
        (["model", "config"], {"kind": "x" * 129}, "model.config.kind: an entry is a whole"),
        (["model", "config"], {"num_layers": 10**40}, "model.config.num_layers: an entry"),
        (["model", "config"], {"../x": 1}, "model.config"),
        (["model", "config"], {f"n{i}": i for i in range(300)}, "model.config: "),
        (["model", "config"], [1], "model.config: "),
        (["model", "pipeline"], "a/b", "model.pipeline: "),
        (["model", "experts"], 0, "model.experts: "),
        (["model", "experts"], True, "model.experts: "),
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
        ({"config": LARGER}, r"model\.config\.num_layers: the policy is for 3, this run has 40"),
        ({"config": FIRST_LAST}, r"config\.pos_embed_seq_len: .* for None, this run has 514"),
        ({"config_hash": "0" * 64}, r"model\.config_hash: the policy is for f+, this run has 0+"),
        ({"experts": 2}, r"model\.experts: the policy is for 1, this run has 2"),
        ({"num_inference_steps": 30}, "num_inference_steps: the policy is for 6, this run has 30"),
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler.name: "),
        ({"sigmas": (1.0, 0.9, 0.7, 0.6, 0.4, 0.1)}, "sigmas: the policy has 0.80000 at step 2"),
    ],
)
def test_a_policy_refuses_another_setting(changes, message):
    policy = parse(changed(["model"], valid()["model"] | KNOWN))
    policy.check(run_settings(config=SMALL, experts=1))
    with pytest.raises(PolicyError, match=message):
        policy.check(run_settings(**changes))


def test_the_shift_is_checked_where_no_noise_levels_are_stored():
    named = changed(["scheduler"], valid()["scheduler"] | {"shift": 3.0})
    parse(named).check(run_settings(shift=5.0))
    policy = parse(changed(["scheduler"], {"name": None, "shift": 3.0, "sigmas": None}))
    policy.check(run_settings(shift=3.0))
    policy.check(run_settings(shift=None))
    with pytest.raises(PolicyError, match=r"scheduler\.shift: the policy is for 3.0, .* has 5.0"):
        policy.check(run_settings(shift=5.0))


def test_a_model_without_a_hub_id_is_told_by_its_config():
    """Or by the hash of it, but not in another pipeline, nor by what is not known."""
    model = valid()["model"] | KNOWN | {"config_hash": None, "pipeline": "WanPipeline"}
    policy = parse(changed(["model"], model))
    local = run_settings(model_id=None, config=SMALL, pipeline="WanPipeline", experts=1)
    assert policy.fits(local)
    assert policy.doubt(local) == "model taken for org/tiny-wan by its class and config alone"
    for changes in (
        {"config": LARGER},
        {"config": {"num_layers": 3}},
        {"config": None},
        {"experts": 2},
        {"experts": None},
        {"pipeline": "WanVideoToVideoPipeline"},
        {"pipeline": None},
        {"transformer": "SkyReelsV2Transformer3DModel"},
        {"model_id": "org/a-finetune"},
        {"num_inference_steps": 7},
    ):
        assert not policy.fits(replace(local, **changes)), changes
    hashed = parse(changed(["model"], model | {"config_hash": "f" * 64, "id": None}))
    named = replace(local, config=None, config_hash="f" * 64, model_id="org/a-copy")
    assert hashed.fits(named) and hashed.doubt(named) == ""
    assert not hashed.fits(replace(named, pipeline="WanVideoToVideoPipeline"))


@pytest.mark.parametrize(
    ("known", "changes", "doubt"),
    [
        ({}, {}, ""),
        ({}, {"model_id": None}, "model not checked beyond its class: .* this is org/tiny-wan$"),
        ({"id": None}, {}, "model not checked beyond its class: .* the one it was made for$"),
        ({"id": None, "config": SMALL}, {"config": SMALL}, "told by its class and config alone$"),
        ({"config": SMALL}, {"model_id": None, "config": {}}, "not checked beyond its class"),
        (
            {"config": SMALL, "pipeline": "FluxPipeline"},
            {"model_id": None, "config": SMALL, "pipeline": "FluxKontextPipeline"},
            "not checked: the policy is for FluxPipeline, this is FluxKontextPipeline$",
        ),
    ],
)
def test_what_was_not_checked_is_said(known, changes, doubt):
    """A policy that comes with nothing that contradicts is taken, with a word."""
    policy, run = parse(changed(["model"], valid()["model"] | known)), run_settings(**changes)
    policy.check(run)
    assert re.search(doubt, policy.doubt(run)) if doubt else policy.doubt(run) == ""


def test_models_of_older_and_newer_files_round_trip():
    old = parse(valid() | {"schema_version": "1.1"})
    assert json.loads(old.to_json())["model"].keys() == {"transformer", "id", "config_hash"}
    new = parse(changed(["model"], valid()["model"] | KNOWN))
    assert json.loads(new.to_json())["model"]["config"] == SMALL
    assert parse(json.loads(new.to_json())) == new


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


def test_a_plan_without_errors_is_predicted_from_the_budgets_next_to_it():
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    run = {row.budget: row.psnr for row in policy.validation if row.kept}
    assert not policy.plan(budget=14).errors and 12 in run and 16 in run and 14 not in run
    assert policy.predicted_psnr(14) == pytest.approx((run[12] + run[16]) / 2)
    assert policy.predicted_psnr(16) == pytest.approx(run[16])
    assert policy.predicted_psnr(8) is None, "fewer steps than were ever run"
    fitting = policy.plan(psnr=run[16] - 0.01)
    assert len(fitting.steps) == 16
