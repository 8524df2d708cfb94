"""The policy file: round trip, what it refuses, and how it is held against a run."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError

from tiny.policies import SIGMAS, forecasting, parse, plan_of, run_settings, valid
from vidaccel import accelerate, report
from vidaccel.errors import PlanError, PolicyError
from vidaccel.lemica import search
from vidaccel.lemica.dag import Move
from vidaccel.plans.plan import Plan, RunSettings
from vidaccel.plans.policy import FILE_NAME, MAX_BYTES, CachePolicy
from vidaccel.plans.shipped import shipped_policies
from vidaccel.resolve import Resolver

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_file_round_trips(tmp_path):
    policy = parse(valid())
    file = tmp_path / "deep" / "policy.json"
    policy.save(file)
    assert CachePolicy.load(file) == policy
    assert [p.name for p in file.parent.iterdir()] == ["policy.json"]
    text = file.read_text()
    assert "[0, 2, 4, 5]" in text  # a step list on one line
    keys = list(json.loads(text))
    assert keys == sorted(keys)
    policy.save(file)
    assert file.read_text() == text


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


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps(valid()).encode()[:-40],
        json.dumps(valid()).replace("0.25", "NaN").encode(),
        json.dumps(valid()).replace("0.25", "Infinity").encode(),
        json.dumps(valid()).replace("0.25", "1e999").encode(),
        json.dumps(valid()).replace("0.25", "9" * 5000).encode(),
        json.dumps(valid()).replace('"frames"', '"width"').encode(),
    ],
    ids=range(14),
)
def test_what_is_no_policy_is_refused(raw, tmp_path):
    file = tmp_path / "policy.json"
    file.write_bytes(raw)
    with pytest.raises(PolicyError) as caught:
        CachePolicy.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_or_missing(tmp_path):
    file = tmp_path / "policy.json"
    for size in (MAX_BYTES + 1, 1 << 30):
        with file.open("wb") as stream:
            stream.truncate(size)
        with pytest.raises(PolicyError, match="larger than 32 MiB"):
            CachePolicy.load(file)
    with pytest.raises(PolicyError, match="cannot read policy"):
        CachePolicy.load(tmp_path / "nothing.json")


def test_mutations_are_accepted_or_refused_but_never_crash():
    """Thousands of random edits of a valid file: only PolicyError may come out."""
    rng = random.Random(0)
    text = json.dumps(valid())
    values = [None, True, -1, 0, 1e308, -0.0, "", "..", [], {}, [[]], "x" * 300, 10**30, 0.1]
    refused = 0
    for round_ in range(4000):
        if round_ % 2:
            data = valid()
            target, key = data, rng.choice(list(data))
            while isinstance(target[key], dict | list) and target[key] and rng.random() < 0.7:
                target = target[key]
                key = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
            target[key] = rng.choice(values)
            mutated = json.dumps(data)
        else:
            i = rng.randrange(len(text))
            mutated = text[:i] + rng.choice('{}[]",:0-e.N\\ \x00') + text[i + rng.randrange(3) :]
        try:
            CachePolicy.from_json(mutated)
        except PolicyError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 2000


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


def test_a_policy_file_as_the_source_of_plans(tmp_path):
    file = tmp_path / FILE_NAME
    parse(valid()).save(file)
    for policy in (file, str(file), tmp_path, parse(valid())):
        assert plan_of(policy, run_settings(), "quality").steps == (0, 3, 5)
    # The preset asks for three times, the fastest plan gives two.
    source = Resolver(file)
    assert source.plan(run_settings()).steps == (0, 3, 5)
    assert source.description == f"policy {file}: 3 of 6 steps computed"
    with pytest.raises(PolicyError, match="num_inference_steps"):
        source.resolve(run_settings(num_inference_steps=7))


@pytest.mark.parametrize("policy", ["nowhere.json", "./nowhere", "no-org/no-policy", "a/b/c"])
def test_a_policy_that_is_not_there(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match=r"nowhere|no-policy|a/b/c"):
        Resolver(policy)


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies(name):
    policy = CachePolicy.load(ROOT / "policies" / name)
    assert hasattr(diffusers, policy.model.transformer)
    if policy.model.id is not None:
        assert name.startswith(policy.model.id.replace("/", "--"))
    else:
        assert policy.model.config_hash
    assert policy.provenance != "published" or (policy.validation is None and policy.source)
    for budget in policy.budgets():
        steps = policy.plan(budget=budget).steps
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        if policy.provenance == "published":
            assert steps[-1] == policy.num_inference_steps - 1
            assert max(gaps) <= 8
    assert (ROOT / "policies" / name).read_text() == policy.to_json()


def test_every_field_is_explained():
    explained = (ROOT / "policies" / "README.md").read_text()
    for field in CachePolicy.model_fields:
        assert f"`{field}`" in explained


def test_auto_is_evenly_spaced_without_a_policy_for_the_model():
    budgets = [
        len(plan_of("auto", run_settings(num_inference_steps=50), preset).steps)
        for preset in ("quality", "balanced", "fast")
    ]
    assert budgets == [25, 17, 10]
    plan = plan_of("auto", run_settings(num_inference_steps=50))
    assert plan.steps == tuple(range(0, 50, 3)) and "evenly spaced" in plan.origin


def test_auto_computes_every_step_of_a_few_step_model():
    assert plan_of("auto", run_settings()).steps == tuple(range(6))
    assert len(plan_of("auto", run_settings(num_inference_steps=8)).steps) < 8


def test_auto_takes_a_shipped_policy_that_fits():
    wan = RunSettings(50, "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "0" * 64)
    plan = plan_of("auto", wan)
    assert plan.steps[:9] == (0, 1, 2, 3, 4, 5, 7, 10, 17)
    assert "published, not validated here" in plan.origin
    other = plan_of("auto", replace(wan, num_inference_steps=40))
    assert "evenly spaced" in other.origin


def test_unknown_preset_is_refused():
    with pytest.raises(PlanError, match="'quality', 'balanced', 'fast', found 'turbo'"):
        Resolver("auto", preset="turbo")


@pytest.mark.parametrize("name", [n for n in shipped_policies() if "published" not in n])
def test_the_errors_of_a_measured_policy_give_its_plans(name):
    policy = CachePolicy.load(shipped_policies()[name])
    solved = search.solve_moves(
        policy.moves(), policy.num_inference_steps, objective=str(policy.objective)
    )
    assert policy.budgets() == sorted(solved)
    for budget, plan in solved.items():
        if policy.plans[str(budget)].chosen_as is None:
            assert policy.plan(budget=budget) == plan
    assert policy.validation is not None
    kept = {row.budget: row.psnr for row in policy.validation if row.kept}
    for row in policy.validation:
        assert kept[row.budget] >= row.psnr


def test_lines_and_scales_round_trip():
    policy = parse(forecasting())
    assert parse(json.loads(policy.to_json())) == policy
    plan = policy.plan(budget=4)
    assert (plan.order(3), plan.scale(3), plan.order(1)) == (1, 0.5, 0)
    assert Move(2, 4, 0.1, 1, 0.5, 0) in policy.moves()


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


class Hub:
    """Stands in for the hub where huggingface_hub would reach the network."""

    def __init__(self, folder):
        self.folder = folder

    def api(self, token=None):
        assert token == "secret"
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if "/" not in repo_id:
            raise HFValidationError("a name is user/name")
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        assert private is True
        return SimpleNamespace(repo_id=repo_id)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)
        return SimpleNamespace(commit_url=f"hub/{repo_id}: {commit_message}")

    def download(self, repo_id, filename, *, revision, token):
        assert (revision, token) == ("v1", "secret")
        return str(self.folder / repo_id / filename)


def test_a_policy_travels_through_the_hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    policy = parse(forecasting())
    url = policy.push_to_hub("someone/policy", private=True, token="secret")
    assert url == "hub/someone/policy: Upload a policy of 6 steps"
    again = CachePolicy.from_pretrained("someone/policy", revision="v1", token="secret")
    assert again == policy
    with pytest.raises(PolicyError, match="cannot upload the policy to nowhere: a name is"):
        policy.push_to_hub("nowhere", private=True, token="secret")


def test_a_policy_in_a_folder(tmp_path):
    policy = parse(valid())
    policy.save_pretrained(tmp_path / "policy")
    assert CachePolicy.from_pretrained(tmp_path / "policy") == policy


def test_the_embedded_model_is_the_one_its_policy_was_measured_on():
    from vidaccel.clips.load import load_pipeline

    pipe = accelerate(load_pipeline(device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    caption = "a red dotted circle moving up on a teal striped background"
    pipe(caption, height=48, width=48, num_frames=5, num_inference_steps=50, output_type="latent")
    shown = report(pipe).transformers[0]
    assert shown.policy == "auto: vidaccel--tiny-wan/50-steps.json (measured)"
    assert shown.timeline.count("C") == 16
