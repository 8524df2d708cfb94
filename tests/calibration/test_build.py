"""Building policies: durable, resumable, and equal however often it was interrupted."""

import json
import os
import re
import signal
from inspect import signature

import pytest

import vidaccel
from tiny.building import build_for, prompted
from tiny.hunyuan import hunyuan15
from tiny.wan import wan, wan22
from vidaccel import Plan, accelerate, report, shards
from vidaccel.calibration import task as tasks
from vidaccel.calibration.build import build_policy
from vidaccel.calibration.candidates import validated_budgets
from vidaccel.calibration.task import SegmentsFrom
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.errors import BuildError, PlanError
from vidaccel.lemica import search
from vidaccel.lemica.graph import aggregate, segment_graph

STEPS = 5


@pytest.fixture
def case():
    return prompted(wan())


@pytest.mark.parametrize("method", ["exact", "gain"])
def test_a_built_policy_runs_on_the_pipeline_it_was_built_for(case, method, tmp_path):
    policy = build_for(case, method=method, seeds=[0, 1])
    assert policy.provenance == "measured" and policy.noise_floor == 0.0
    assert all(edge.count == 4 for edge in policy.edges)
    assert policy.budgets() == [2, 3, 4, 5]
    policy.save(tmp_path / "policy.json")
    accelerate(case.pipe, policy=vidaccel.CachePolicy.load(tmp_path / "policy.json"))
    case.pipe(prompt="ccc", num_inference_steps=STEPS, output_type="latent", **case.call)
    timeline = report(case.pipe).transformers[0].timeline
    assert timeline.count("C") == 2 and timeline[0] == "C"


def test_stored_plans_are_those_of_the_stored_errors(case):
    policy = build_for(case)
    solved = search.solve_edges(policy.search_edges(), STEPS, virtual_end=True)
    for budget in policy.budgets():
        assert policy.plan(budget=budget) == solved[budget]
        stable = policy.plans[str(budget)].stability
        assert len(stable) == budget and stable[0] == 1.0
    assert isinstance(policy.plan(budget=4), Plan)


def test_the_faithful_method_only_holds(case):
    policy = build_for(case, faithful=True)
    graph = segment_graph({(e.start, e.end): [e.mean] for e in policy.edges}, STEPS)
    solved = search.solve(aggregate(graph))
    for budget in policy.budgets():
        assert policy.plan(budget=budget) == solved[budget]
    assert all(edge.order == 0 for edge in policy.edges)
    assert any(edge.order == 1 for edge in build_for(case).edges)


def test_lazy_measures_what_the_plans_use_exactly(case, tmp_path):
    options = {"faithful": True, "num_inference_steps": 8}
    exact = build_for(case, **options)
    lazy = build_for(case, method="lazy", workdir=tmp_path, **options)
    single = {p.stem for p in tmp_path.glob("sample-0000-*-*.json")}
    assert 0 < len(single) < len(exact.edges)
    truth = {(e.start, e.end): e.mean for e in exact.edges}
    for budget in validated_budgets(8):
        if budget in lazy.budgets():
            plan = lazy.plan(budget=budget)
            for segment in plan.segments():
                assert f"sample-0000-{segment[0]:04d}-{segment[1]:04d}" in single
                found = next(e.mean for e in lazy.edges if (e.start, e.end) == segment)
                assert found == pytest.approx(truth[segment], rel=1e-6)
    assert build_for(case, method="lazy", workdir=tmp_path, **options) == lazy


def test_what_it_will_cost_is_said_first(case, capsys):
    build_for(case, progress=True)
    first, *_ = capsys.readouterr().err.splitlines()
    assert re.match(r"2 samples, exact: \d+ forwards, \d+ generations, .* per step; .* GiB", first)


def test_a_pipeline_without_a_step_callback(tmp_path):
    case = hunyuan15()
    given = {name: value for name, value in case.kwargs.items() if "prompt" in name}
    case.call = {n: v for n, v in case.kwargs.items() if n not in (*given, "num_inference_steps")}

    def encode_prompt(prompt=None, *, prompt_embeds=None, **_):
        prefix = "negative_" if prompt is None or prompt == [""] else ""
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        return tuple(given[prefix + name] for name in names)

    case.pipe.encode_prompt = encode_prompt
    assert "callback_on_step_end" not in signature(type(case.pipe).__call__).parameters
    options = {"num_inference_steps": 8, "method": "gain", "validate": True}
    policy = build_for(case, workdir=tmp_path, **options)
    assert policy.validation and policy.budgets() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("aggregation", ["max", "quantile", "cvar"])
def test_other_aggregations(case, aggregation):
    policy = build_for(case, aggregation=aggregation, method="gain", seeds=[0, 1])
    assert policy.source == f"vidaccel build-policy, gain errors, {aggregation} of l1"
    with pytest.raises(PlanError, match="aggregation: found 'median'"):
        build_for(case, aggregation="median")


def test_a_killed_build_goes_on_and_gives_the_same_policy(case, tmp_path, monkeypatch):
    expected = build_for(case)
    measured = []
    errors_from = tasks.errors_from

    def counted(replayer, max_skip, start, **options):
        measured.append(start)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return errors_from(replayer, max_skip, start, **options)

    monkeypatch.setattr(tasks, "errors_from", counted)
    with pytest.raises(KeyboardInterrupt):
        build_for(case, workdir=tmp_path)
    shards = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("sample-*.json")}
    assert len(shards) == 5
    policy = build_for(case, workdir=tmp_path)
    assert policy == expected
    # 2 samples of 4 starts: the interrupted item was lost, nothing else was measured again.
    assert len(measured) == 2 * 4 + 1
    for name, time in shards.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    measured.clear()
    assert build_for(case, workdir=tmp_path) == expected
    assert measured == []


def test_kill_minus_nine_in_the_middle_changes_nothing(case, tmp_path, monkeypatch):
    expected = build_for(case)
    save = WorkFolder.save
    child = os.fork()
    if child == 0:  # a process of its own, which ends without any chance to tidy up
        monkeypatch.setattr(
            WorkFolder,
            "save",
            lambda folder, sample, item, errors: (
                os.kill(os.getpid(), signal.SIGKILL)
                if (sample, item) == (1, SegmentsFrom(1))
                else save(folder, sample, item, errors)
            ),
        )
        build_for(case, workdir=tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    shards = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("sample-*.json")}
    assert len(shards) == 5
    assert build_for(case, workdir=tmp_path) == expected
    for name, time in shards.items():
        assert (tmp_path / name).stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_inference_steps": 6}, "num_inference_steps"),
        ({"seeds": [3]}, "seeds"),
        ({"max_skip": 2}, "max_skip"),
        ({"method": "gain"}, "method"),
        ({"faithful": True}, "lines"),
        ({"metric": "decoded"}, "metric"),
    ],
)
def test_a_folder_of_another_build_is_refused(case, tmp_path, change, named):
    build_for(case, workdir=tmp_path)
    with pytest.raises(BuildError, match=named):
        build_for(case, workdir=tmp_path, **change)


def test_a_folder_of_another_model_is_refused(case, tmp_path):
    build_for(case, workdir=tmp_path)
    other = prompted(wan())
    other.pipe.transformer.scale_shift_table.data += 1
    with pytest.raises(BuildError, match="model"):
        build_for(other, workdir=tmp_path)


def test_a_full_disk_keeps_what_was_measured(case, tmp_path, monkeypatch):
    write = shards.write_text
    written = []

    def full(path, text):
        written.append(path.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(shards, "write_text", full)
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
    assert all(row.worst_frame_psnr <= row.worst_psnr + 1e-6 for row in rows)
    assert all(row.flicker is not None for row in rows)
    assert all(row.vmaf is None or 0 <= row.vmaf <= 100 for row in rows)
    assert all(row.cvvdp is None or row.cvvdp <= 10 for row in rows)
    names = {row.candidate for row in rows}
    assert {"evenly spaced", "evenly spaced, half line", "fewer sampling steps"} < names
    (kept,) = (row for row in rows if row.kept)
    tried = [row for row in rows if row.candidate != "fewer sampling steps"]
    assert kept.psnr == max(row.psnr for row in tried)
    assert policy.plans["4"].chosen_as == kept.candidate
    assert len(policy.plan(budget=4).steps) == 4
    assert all(row.speedup > 0 and row.worst_psnr <= row.psnr for row in rows)
    assert vidaccel.CachePolicy.from_json(policy.to_json()) == policy


def test_two_experts_share_one_policy():
    case = prompted(wan22())
    policy = build_for(case, num_inference_steps=6)
    accelerate(case.pipe, policy=policy.plan(budget=policy.budgets()[0]))
    case.pipe(prompt="a", num_inference_steps=6, output_type="latent", **case.call)
    shown = report(case.pipe)
    # The first step of the second expert is in the plan, so nothing is computed unplanned.
    assert all(not b.steps_computed_unplanned for p in shown.transformers for b in p.branches)
    assert json.loads(policy.to_json())["guidance"]["mode"] == "sequential"
