"""Building policies: durable, resumable, and equal however often it was interrupted."""

import json

import pytest
from conftest import wan, wan22

import vidaccel
from vidaccel import Plan, accelerate, report
from vidaccel.errors import BuildError, PlanError
from vidaccel.lemica import build, search, work
from vidaccel.lemica.build import build_policy
from vidaccel.lemica.graph import aggregate, segment_graph

STEPS = 5


@pytest.fixture
def case():
    """A pipeline whose prompts are taken from a table, since it has no text encoder."""
    return _with_prompts(wan())


def _with_prompts(case):
    from conftest import embeds

    def encode_prompt(prompt, negative_prompt=None, **_):
        return embeds(len(prompt)), embeds(99)

    case.pipe.encode_prompt = encode_prompt
    case.call = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}
    return case


def build_for(case, **options):
    arguments = {"num_inference_steps": STEPS, "max_skip": 3, "call_kwargs": case.call}
    arguments |= {"validate": False, "progress": False}
    return build_policy(case.pipe, ["a", "bb"], **(arguments | options))


@pytest.mark.parametrize("method", ["exact", "gain"])
def test_a_built_policy_runs_on_the_pipeline_it_was_built_for(case, method, tmp_path):
    policy = build_for(case, method=method, seeds=[0, 1])
    assert policy.provenance == "measured" and policy.noise_floor == 0.0
    assert all(edge.count == 4 for edge in policy.edges)
    assert policy.budgets() == [3, 4, 5]
    policy.save(tmp_path / "policy.json")
    accelerate(case.pipe, policy=vidaccel.CachePolicy.load(tmp_path / "policy.json"))
    case.pipe(prompt="ccc", num_inference_steps=STEPS, output_type="latent", **case.call)
    timeline = report(case.pipe).transformers[0].timeline
    assert timeline.count("C") == 3 and timeline[0] == timeline[-1] == "C"


def test_stored_plans_are_those_of_the_stored_errors(case):
    policy = build_for(case)
    graph = segment_graph({(e.start, e.end): [e.mean] for e in policy.edges}, STEPS)
    solved = search.solve(aggregate(graph))
    for budget in policy.budgets():
        plan = solved[budget]
        assert policy.plans[str(budget)].steps == plan.steps
        assert policy.plans[str(budget)].errors == plan.errors
    assert isinstance(policy.plan(budget=4), Plan)


def test_a_killed_build_goes_on_and_gives_the_same_policy(case, tmp_path, monkeypatch):
    expected = build_for(case)
    measured = []
    unit = build._unit

    def counted(replayer, task, start):
        measured.append(start)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return unit(replayer, task, start)

    monkeypatch.setattr(build, "_unit", counted)
    with pytest.raises(KeyboardInterrupt):
        build_for(case, workdir=tmp_path)
    shards = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("sample-*.json")}
    assert len(shards) == 5
    policy = build_for(case, workdir=tmp_path)
    assert policy == expected
    # 2 samples of 4 starts: the interrupted unit was lost, nothing else was measured again.
    assert len(measured) == 2 * 4 + 1
    for name, time in shards.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    measured.clear()
    assert build_for(case, workdir=tmp_path) == expected
    assert measured == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_inference_steps": 6}, "num_inference_steps"),
        ({"seeds": [3]}, "seeds"),
        ({"max_skip": 2}, "max_skip"),
        ({"method": "gain"}, "method"),
    ],
)
def test_a_folder_of_another_build_is_refused(case, tmp_path, change, named):
    build_for(case, workdir=tmp_path)
    with pytest.raises(BuildError, match=named):
        build_for(case, workdir=tmp_path, **change)


def test_a_folder_of_another_model_is_refused(case, tmp_path):
    build_for(case, workdir=tmp_path)
    other = _with_prompts(wan())
    other.pipe.transformer.scale_shift_table.data += 1
    with pytest.raises(BuildError, match="model"):
        build_for(other, workdir=tmp_path)


def test_a_full_disk_keeps_what_was_measured(case, tmp_path, monkeypatch):
    write = work.write_text
    written = []

    def full(path, text):
        written.append(path.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(work, "write_text", full)
    with pytest.raises(BuildError, match=r"No space left on device; .* goes on from there"):
        build_for(case, workdir=tmp_path)
    monkeypatch.undo()
    assert build_for(case, workdir=tmp_path) == build_for(case)


def test_a_damaged_shard_is_named(case, tmp_path):
    build_for(case, workdir=tmp_path)
    shard = tmp_path / "sample-0000-0001.json"
    shard.write_text("[[")
    with pytest.raises(BuildError, match="sample-0000-0001"):
        build_for(case, workdir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 2}, "num_inference_steps: found 2"),
        ({"max_skip": STEPS}, "max_skip: found 5, expected 2 to 4"),
        ({"max_skip": 1}, "max_skip: found 1"),
        ({"method": "guess"}, "method: found 'guess'"),
        ({"seeds": []}, "seeds: found none"),
        ({"objective": "luck"}, "objective is"),
    ],
)
def test_wrong_arguments(case, options, message):
    with pytest.raises(PlanError, match=message):
        build_for(case, **options)


def test_wrong_prompts(case):
    for prompts, message in (
        (["a"], "validation needs at least 2"),
        ([" ", "a"], "found an empty one"),
    ):
        with pytest.raises(PlanError, match=message):
            build_policy(case.pipe, prompts, num_inference_steps=STEPS, max_skip=3)
    with pytest.raises(PlanError, match="prompts: found none"):
        build_policy(case.pipe, [], num_inference_steps=STEPS, max_skip=3, validate=False)


def test_validation_keeps_the_best_candidate_of_each_budget(case):
    steps = 8
    policy = build_for(case, validate=True, num_inference_steps=steps)
    assert policy.prompts == ("a",)  # the other one is for validation
    assert policy.validation is not None
    rows = [row for row in policy.validation if row.budget == 4]
    names = {row.candidate for row in rows}
    assert {"evenly spaced", "evenly spaced, line", "fewer sampling steps"} < names
    (kept,) = (row for row in rows if row.kept)
    tried = [row for row in rows if row.candidate != "fewer sampling steps"]
    assert kept.psnr == max(row.psnr for row in tried)
    assert policy.plans["4"].chosen_as == kept.candidate
    assert len(policy.plan(budget=4).steps) == 4
    assert all(row.speedup > 0 and row.worst_psnr <= row.psnr for row in rows)
    assert vidaccel.CachePolicy.from_json(policy.to_json()) == policy


def test_two_experts_share_one_policy():
    case = _with_prompts(wan22())
    policy = build_for(case, num_inference_steps=6)
    accelerate(case.pipe, policy=policy.plan(budget=policy.budgets()[0]))
    case.pipe(prompt="a", num_inference_steps=6, output_type="latent", **case.call)
    shown = report(case.pipe)
    # The first step of the second expert is in the plan, so nothing is computed unplanned.
    assert all(not b.steps_computed_unplanned for p in shown.transformers for b in p.branches)
    assert json.loads(policy.to_json())["guidance"]["mode"] == "sequential"
