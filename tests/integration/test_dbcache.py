"""The block cache in pipelines: results, blocks run, differences, branches, and refusals."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tiny import STEPS, Case, embeds, generator
from tiny.hunyuan import hunyuan
from tiny.looking import count_blocks, transformers_of
from tiny.older_images import hunyuan_dit
from tiny.wan import wan, wan22, wan_vace
from vidaccel import DBCache, Plan, accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.dbcache import DIFFERENCE, WARM_UP
from vidaccel.errors import PlanError, UnsupportedPipelineError

# Reuses whatever it may: every difference of a tiny random model is far below.
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=None)


def test_threshold_zero_is_bit_equal(case: Case):
    baseline = case.run()
    accelerate(case.pipe, policy=None, cache=DBCache(threshold=0, warmup_steps=0))
    assert torch.equal(case.run(), baseline)
    shown = report(case.pipe).transformers[0]
    assert set(shown.timeline) == {"C"}
    assert "nothing was reused at threshold 0" in shown.notes[0]
    assert "smallest difference" in str(report(case.pipe))
    restore(case.pipe)
    assert torch.equal(case.run(), baseline)


def corrected(case: Case) -> int:
    """Corrector blocks that a family can have."""
    return 0 if hasattr(case.pipe.transformer, "vace_blocks") else 1


def test_executed_blocks_are_probe_and_corrector(case: Case):
    cache = replace(EAGER, corrector_blocks=corrected(case))
    accelerate(case.pipe, policy=None, cache=cache)
    counts = count_blocks(case.pipe)
    case.run()
    shown = report(case.pipe)
    rows = [row for part in shown.transformers for row in part.branches]
    assert sum(row.blocks_run for row in rows) == counts["blocks"]
    for part in shown.transformers:
        assert part.timeline == "C" + "p" * (len(part.timeline) - 1)
        for row in part.branches:
            steps = row.steps_computed + row.steps_reused
            whole = row.blocks_without_vidaccel // steps
            partial = 1 + cache.corrector_blocks
            assert row.blocks_run == row.steps_computed * whole + row.steps_reused * partial
            assert row.hit_rate == row.steps_reused / steps


def test_reusing_on_the_same_input_gives_the_same_output(case: Case):
    """Whatever a model adds between its blocks is there once, around probe and corrector too."""
    calls = []
    model = case.pipe.transformer
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    case.run()
    handle.remove()
    call = dict(calls[0])
    times = torch.tensor([900.0, 899.9999, 899.9998])
    case.pipe.scheduler.timesteps = times
    accelerate(case.pipe, policy=None, cache=replace(EAGER, corrector_blocks=corrected(case)))
    outputs = []
    with torch.no_grad(), model.cache_context("cond"):
        for time in times:
            call["timestep"] = torch.full_like(call["timestep"], float(time), dtype=torch.float32)
            outputs.append(model(**call)[0])
    assert report(case.pipe).transformers[0].timeline == "Cpp"
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_generation_after_an_exception_is_fresh(case: Case, order):
    cache = replace(EAGER, max_consecutive=1, forecast_order=order)
    accelerate(case.pipe, policy=None, cache=cache)
    expected = case.run()
    left = iter(range(3, -1, -1))

    def fail(module, args, output):
        if next(left) == 0:
            raise RuntimeError("stop")

    handles = [model.register_forward_hook(fail) for model in transformers_of(case.pipe).values()]
    with pytest.raises(RuntimeError, match="stop"):
        case.run()
    for handle in handles:
        handle.remove()
    assert torch.equal(case.run(), expected)


def test_nothing_is_held_after_a_generation(case: Case):
    accelerate(case.pipe, policy=None, cache=replace(EAGER, forecast_order=1))
    case.run()
    for part in report(case.pipe).transformers:
        assert part.bytes_held == 0
        assert part.peak_bytes > 0 or len(part.timeline) == 1


def test_nothing_is_held_after_an_interrupted_generation():
    case = wan()
    accelerate(case.pipe, policy=None, cache=EAGER)

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return kwargs

    case.run(callback_on_step_end=stop)
    assert report(case.pipe).transformers[0].timeline == "Cpp"
    assert report(case.pipe).transformers[0].bytes_held == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("corrector", [0, 1])
def test_memory_is_known_before_the_run(stride, order, corrector):
    cache = replace(
        EAGER,
        probe_stride=stride,
        forecast_order=order,
        corrector_blocks=corrector,
        max_consecutive=1,
    )
    case = wan()
    accelerate(case.pipe, policy=None, cache=cache)
    case.run()
    # 3 latent frames of one patch, 24 wide, float32.
    needed = cache.bytes_needed(3, 24, branches=2, itemsize=4)
    assert report(case.pipe).transformers[0].peak_bytes == needed


def test_the_host_store_gives_the_same_result():
    case = wan()
    accelerate(case.pipe, policy=None, cache=EAGER)
    expected = case.run()
    accelerate(case.pipe, policy=None, cache=replace(EAGER, store="cpu"))
    assert torch.equal(case.run(), expected)


def test_differences_are_those_of_the_probe_residual():
    """Relative L1 change of the first block's residual against the last computed step."""
    case = wan()
    residuals = []
    hook = case.pipe.transformer.blocks[0].register_forward_hook(
        lambda module, args, output: residuals.append(output - args[0])
    )
    cache = DBCache(threshold=1e-9, warmup_steps=3)
    accelerate(case.pipe, policy=None, cache=cache)
    case.run(guidance_scale=1.0)
    hook.remove()
    steps = report(case.pipe).transformers[0].steps
    assert [step.reason for step in steps][1:] == [WARM_UP] * 2 + [DIFFERENCE] * (STEPS - 3)
    assert steps[0].difference is None
    for step in range(1, STEPS):
        last, now = residuals[step - 1], residuals[step]
        expected = float((last - now).abs().mean() / last.abs().mean())
        assert steps[step].difference == pytest.approx(expected, rel=1e-4)


def test_branches_decide_together_or_each_for_itself():
    """The conditional branch stands still and the unconditional one changes from step to step."""

    def timelines(branches):
        pipe = wan().pipe
        model = pipe.transformer
        pipe.scheduler.set_timesteps(4)
        cache = replace(EAGER, threshold=0.5, branches=branches)
        accelerate(pipe, policy=None, cache=cache)
        now = {}
        first, *others = model.blocks
        first.register_forward_hook(lambda module, args, output: args[0] + now["residual"])
        for block in others:
            block.register_forward_hook(lambda module, args, output: args[0])
        x = torch.randn(1, 16, 3, 4, 4, generator=generator(3))
        for step in range(4):
            for branch, residual in (("cond", 1.0), ("uncond", 10.0**step)):
                now["residual"] = residual
                with torch.no_grad(), model.cache_context(branch):
                    model(x, pipe.scheduler.timesteps[step : step + 1], embeds(1))
        kinds = {"cond": "", "uncond": ""}
        for step in report(pipe).transformers[0].steps:
            kinds[step.branch] += step.kind[0]
        return kinds

    assert timelines("together") == {"cond": "cppp", "uncond": "cppp"}
    assert timelines("separate") == {"cond": "cppp", "uncond": "cccc"}


def test_the_plan_proposes_and_the_guard_only_adds():
    case = wan()
    plan = Plan((0, 1, 4), STEPS)
    for threshold, timeline in ((1e9, "CCppCp"), (0.0, "CCCCCC")):
        accelerate(case.pipe, policy=plan, cache=replace(EAGER, threshold=threshold))
        case.run()
        shown = report(case.pipe).transformers[0]
        assert shown.timeline == timeline
        unplanned = sum(row.steps_computed_unplanned for row in shown.branches)
        assert unplanned == 2 * (timeline.count("C") - 3)
        assert {s.reason for s in shown.steps if s.step in plan.steps} == {"planned"}


def test_a_plan_with_probe_blocks_but_no_objection_differs_only_by_them():
    """Probe 0 with a plan is the plan alone, bit for bit."""
    case = wan()
    accelerate(case.pipe, policy=[0, 1, 4], cache=None)
    expected = case.run()
    accelerate(case.pipe, policy=[0, 1, 4], cache=DBCache(probe_blocks=0))
    assert torch.equal(case.run(), expected)
    assert report(case.pipe).transformers[0].timeline == "CC--C-"
    accelerate(case.pipe, policy=[0, 1, 4], cache=DBCache(probe_blocks=0, corrector_blocks=1))
    assert not torch.equal(case.run(), expected)
    assert report(case.pipe).transformers[0].timeline == "CCppCp"


def test_a_refreshed_residual_replaces_the_planned_one():
    """After the guard has computed a step, the steps behind it reuse that one."""
    case = wan()
    differing = {"left": 2}
    accelerate(case.pipe, policy=[0], cache=replace(EAGER, threshold=1.0))
    (engine,) = engines_of(case.pipe).values()

    def jump(module, args, output):
        # The third step, both branches: far from everything before.
        if engine.running.context.step == 2 and differing["left"]:
            differing["left"] -= 1
            return output + 100 * torch.ones_like(output)
        return output

    handle = case.pipe.transformer.blocks[0].register_forward_hook(jump)
    case.run()
    handle.remove()
    shown = report(case.pipe).transformers[0]
    assert shown.timeline[:3] == "CpC"
    assert [s.reason for s in shown.steps if s.step == 2] == [DIFFERENCE] * 2


def test_two_experts_share_the_count_of_steps_and_not_the_residuals():
    case = wan22()
    accelerate(case.pipe, policy=None, cache=EAGER)
    case.run()
    # Warm-up is counted in steps of the run, so the second expert does not pay it again.
    assert [part.timeline for part in report(case.pipe).transformers] == ["Cpp", "Cpp"]


def test_several_stacks_decide_once():
    case = hunyuan()
    accelerate(case.pipe, policy=None, cache=EAGER)
    counts = count_blocks(case.pipe)
    case.run()
    assert counts["blocks"] == 4 + (STEPS - 1)
    assert len(report(case.pipe).transformers[0].steps) == STEPS


def test_changed_shape_and_steps_between_calls():
    cache = replace(EAGER, max_consecutive=1)
    case = wan()
    accelerate(case.pipe, policy=None, cache=cache)
    for changes in ({"height": 32}, {"num_inference_steps": 4}, {"guidance_scale": 1.0}, {}):
        fresh = wan()
        accelerate(fresh.pipe, policy=None, cache=cache)
        assert torch.equal(case.run(**changes), fresh.run(**changes))


def test_what_does_not_fit_the_model_is_refused_at_once():
    case = wan()
    for cache, message in (
        (DBCache(probe_blocks=2, corrector_blocks=1), r"2 \+ 1, but WanTransformer3DModel has 3"),
        (DBCache(probe_blocks=3), "leave at least one between"),
    ):
        with pytest.raises(PlanError, match=message):
            accelerate(case.pipe, cache=cache)
    with pytest.raises(PlanError, match="probe 1 at most"):
        accelerate(hunyuan().pipe, cache=DBCache(probe_blocks=2))
    with pytest.raises(PlanError, match="correct 2 at most"):
        accelerate(hunyuan().pipe, cache=DBCache(probe_blocks=0, corrector_blocks=3), policy=[0])
    with pytest.raises(UnsupportedPipelineError, match="corrector_blocks=0"):
        accelerate(wan_vace().pipe, cache=DBCache(corrector_blocks=1))
    with pytest.raises(UnsupportedPipelineError, match=r"blocks of its first half .*: set corr"):
        accelerate(hunyuan_dit().pipe, cache=DBCache(corrector_blocks=1))
    with pytest.raises(PlanError, match="nothing to decide by"):
        accelerate(case.pipe, policy=None, cache=DBCache(probe_blocks=0))
    with pytest.raises(PlanError, match="cache is 'auto', None or a DBCache, found float"):
        accelerate(case.pipe, cache=0.1)
    assert "_vidaccel_engine" not in vars(case.pipe.transformer)


def test_a_model_without_a_row_takes_no_cache():
    pipe = SimpleNamespace(components={"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(UnsupportedPipelineError, match=r"has no transformer.*found transformer"):
        accelerate(pipe, policy=None, cache=DBCache(threshold=0.1))


def test_a_plan_for_other_steps_stops_before_any_block():
    case = wan()
    counts = count_blocks(case.pipe)
    accelerate(case.pipe, policy=Plan((0, 5), 50), cache=DBCache(threshold=0.1))
    with pytest.raises(PlanError, match=f"made for 50 steps, but this run has {STEPS}"):
        case.run()
    assert counts["blocks"] == 0


def test_a_warm_up_as_long_as_the_run_computes_every_step():
    case = wan()
    plain = case.run()
    accelerate(case.pipe, policy=None, cache=DBCache(warmup_steps=STEPS))
    assert torch.equal(case.run(), plain)
    why = f"every step, since the warm-up takes {STEPS} and the run has {STEPS}"
    assert why in report(case.pipe).transformers[0].policy


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts how often a tensor is read on the host, which on a GPU waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "cache", "reads"),
    [
        ([0, 1, 4], None, 0),
        ([0, 1, 4], DBCache(threshold=1e9), STEPS - 3),
        (None, replace(EAGER, warmup_steps=2), STEPS - 2),
        (None, replace(EAGER, warmup_steps=2, branches="separate"), 2 * (STEPS - 2)),
    ],
)
def test_a_decision_reads_one_number_and_a_plan_none(policy, cache, reads):
    def count(case):
        with Reads() as counted:
            case.run()
        return counted.count

    case = wan()
    plain = count(case)
    accelerate(case.pipe, policy=policy, cache=cache)
    assert count(case) - plain == reads


def test_blocks_compiled_with_fullgraph_stay_one_graph():
    case = wan()
    accelerate(case.pipe, policy=None, cache=replace(EAGER, max_consecutive=1))
    expected = case.run()
    torch._dynamo.reset()
    case.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    assert torch.equal(case.run(), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
