"""The invariants of acceleration, on every supported pipeline family, with random tiny models."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import vidaccel
from tiny import STEPS, Case, embeds, generator
from tiny.looking import count_blocks, snapshot, transformers_of
from tiny.wan import wan, wan22, wan_v2v, wan_vace
from vidaccel import Plan, accelerate, report, restore
from vidaccel.errors import PlanError, PolicyError, ScheduleError, UnsupportedPipelineError

PLAN = [0, 1, 4]


# Invariant 1: computing everything changes nothing.


@pytest.mark.parametrize("policy", [None, "every 1", list(range(STEPS))], ids=str)
def test_computing_every_step_is_bit_equal(case: Case, policy):
    baseline = case.run()
    accelerate(case.pipe, policy=policy)
    assert torch.equal(case.run(), baseline)
    assert all(engine.bytes_held == 0 for engine in engines(case.pipe))


def test_reusing_changes_the_result_a_little(case: Case):
    baseline = case.run()
    accelerate(case.pipe, policy=PLAN)
    error = (case.run() - baseline).abs().max()
    assert 0 < error < 0.5 * baseline.abs().max()


# Invariant 2: restore is exact.


def test_restore_is_exact(case: Case, tmp_path):
    baseline = case.run()
    models = transformers_of(case.pipe)
    before = {name: snapshot(model) for name, model in models.items()}
    weights = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    accelerate(case.pipe, policy=PLAN)
    for name, model in models.items():
        assert list(model.state_dict()) == list(weights[name])
        assert [(n, id(m)) for n, m in model.named_modules()] == before[name]["modules"]
        model.save_pretrained(tmp_path / f"{name}-accelerated")
    case.run()
    assert restore(case.pipe) is case.pipe
    for name, model in models.items():
        assert snapshot(model) == before[name]
        assert all(torch.equal(a, weights[name][k]) for k, a in model.state_dict().items())
        model.save_pretrained(tmp_path / name)
        saved, accelerated = tmp_path / name, tmp_path / f"{name}-accelerated"
        assert sorted(p.name for p in saved.iterdir()) == sorted(
            p.name for p in accelerated.iterdir()
        )
        for file in saved.iterdir():
            assert file.read_bytes() == (accelerated / file.name).read_bytes()
    assert torch.equal(case.run(), baseline)
    restore(case.pipe)


def test_accelerate_twice_replaces_the_first():
    case = wan()
    baseline = case.run()
    before = snapshot(case.pipe.transformer)
    accelerate(case.pipe, policy=PLAN)
    accelerate(case.pipe, policy=None)
    assert torch.equal(case.run(), baseline)
    restore(case.pipe)
    assert snapshot(case.pipe.transformer) == before


# Invariant 3: the same input twice gives the same output.


def test_reusing_on_the_same_input_gives_the_same_output(case: Case):
    """Catches what a model adds between its blocks being counted twice (VACE hints)."""
    model = case.pipe.transformer
    call = first_call(case)
    # Steps so close in time that the embedding and the head cannot tell them apart.
    times = torch.tensor([900.0, 899.9999, 899.9998])
    case.pipe.scheduler.timesteps = times
    accelerate(case.pipe, policy=[0])
    outputs = []
    with torch.no_grad(), model.cache_context("cond"):
        for time in times:
            call["timestep"] = torch.full_like(call["timestep"], float(time), dtype=torch.float32)
            outputs.append(model(**call)[0])
    assert report(case.pipe).transformers[0].timeline == "C--"
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)


def first_call(case: Case) -> dict[str, Any]:
    """The arguments of the first call of the transformer in a plain run."""
    calls: list[dict[str, Any]] = []
    handle = case.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    case.run()
    handle.remove()
    return dict(calls[0])


# Invariant 4: nothing mixes.


def test_a_batch_of_two_equals_two_batches_of_one():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    latents = torch.randn(2, 16, 3, 2, 2, generator=generator(5))
    prompts, negatives = embeds(7, 2), embeds(8, 2)
    both = case.run(prompt_embeds=prompts, negative_prompt_embeds=negatives, latents=latents)
    for i in range(2):
        one = case.run(
            prompt_embeds=prompts[i : i + 1],
            negative_prompt_embeds=negatives[i : i + 1],
            latents=latents[i : i + 1],
        )
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [wan, wan_v2v], ids=["named branches", "nameless branches"])
def test_branches_keep_their_own_residuals(build):
    """With the same prompt in both branches guidance cancels, unless the branches mix."""
    case = build()
    accelerate(case.pipe, policy=[0, 3])
    same = {"negative_prompt_embeds": case.kwargs["prompt_embeds"]}
    guided = case.run(**same)
    unguided = case.run(guidance_scale=1.0)
    torch.testing.assert_close(guided, unguided, rtol=1e-3, atol=1e-4)
    branches = {row.branch for row in report(case.pipe).transformers[0].branches}
    assert branches == {"cond", "uncond"}


def test_two_pipelines_of_one_class_do_not_touch_each_other():
    fast, plain = wan(), wan()
    baseline = plain.run()
    accelerate(fast.pipe, policy=PLAN)
    counts = count_blocks(plain.pipe)
    fast.run()
    assert counts["blocks"] == 0
    assert torch.equal(plain.run(), baseline)


def test_one_transformer_shared_by_two_pipelines():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    expected = case.run()
    shared = Case(WanPipeline.from_pipe(case.pipe), case.kwargs)
    shared.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(shared.run(), expected)
    own = FlowMatchEulerDiscreteScheduler(shift=2.0)
    other = Case(WanPipeline(**(case.pipe.components | {"scheduler": own})), case.kwargs)
    other.pipe.set_progress_bar_config(disable=True)
    alone = wan()
    alone.pipe.scheduler = own
    accelerate(alone.pipe, policy=PLAN)
    accelerate(other.pipe, policy=PLAN)
    assert torch.equal(other.run(), alone.run())
    assert torch.equal(case.run(), expected)
    restore(other.pipe)
    with pytest.raises(vidaccel.VidaccelError, match="not accelerated"):
        report(case.pipe)


# Invariant 5: every generation starts fresh.


@pytest.mark.parametrize(("error", "calls"), [(RuntimeError, 1), (KeyboardInterrupt, 5)])
def test_an_exception_leaves_the_next_generation_fresh(case: Case, error, calls):
    accelerate(case.pipe, policy=PLAN)
    expected = case.run()
    left = iter(range(calls, -1, -1))

    def fail(module, args, output):
        if next(left) == 0:
            raise error("stop")

    handles = [model.register_forward_hook(fail) for model in transformers_of(case.pipe).values()]
    with pytest.raises(error):
        case.run()
    for handle in handles:
        handle.remove()
    assert torch.equal(case.run(), expected)


def test_an_exception_inside_a_block_leaves_the_next_generation_fresh():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    expected = case.run()
    calls = {"n": 0}

    def fail(module, args):
        calls["n"] += 1
        if calls["n"] == 3:
            raise RuntimeError("stop")

    handle = case.pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        case.run()
    handle.remove()
    assert torch.equal(case.run(), expected)


def test_changed_shape_steps_and_guidance_between_calls():
    case = wan()
    accelerate(case.pipe, policy="every 2")
    for changes in (
        {"height": 32},
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"num_frames": 5},
        {},
    ):
        fresh = wan()
        accelerate(fresh.pipe, policy="every 2")
        assert torch.equal(case.run(**changes), fresh.run(**changes))


def test_a_branch_that_sat_out_a_computed_step_is_computed():
    """A residual older than the last computed step is not used: guidance on some steps only."""
    pipe = wan().pipe
    model = pipe.transformer
    pipe.scheduler.set_timesteps(5)
    accelerate(pipe, policy=[0, 2])
    x = torch.randn(1, 16, 3, 4, 4, generator=generator(3))
    for step, branches in enumerate([("cond", "uncond"), ("cond",), ("cond",), ("cond", "uncond")]):
        for branch in branches:
            with torch.no_grad(), model.cache_context(branch):
                model(x, pipe.scheduler.timesteps[step : step + 1], embeds(1))
    rows = {row.branch: row for row in report(pipe).transformers[0].branches}
    assert (rows["cond"].steps_computed, rows["cond"].steps_reused) == (2, 2)
    assert (rows["uncond"].steps_computed, rows["uncond"].steps_reused) == (2, 0)
    assert rows["uncond"].steps_computed_unplanned == 1


# Invariant 6: the plan is what runs.


@pytest.mark.parametrize("policy", [[0], PLAN, "every 2", None], ids=str)
def test_executed_blocks_are_those_of_the_plan(case: Case, policy):
    counts = count_blocks(case.pipe)
    case.run()
    everything, counts["blocks"] = counts["blocks"], 0
    accelerate(case.pipe, policy=policy)
    case.run()
    shown = report(case.pipe)
    rows = [row for part in shown.transformers for row in part.branches]
    assert sum(row.blocks_run for row in rows) == counts["blocks"]
    assert sum(row.blocks_without_vidaccel for row in rows) == everything
    # The steps this run has: a video-to-video run starts inside the schedule, and the first step
    # of each transformer is always computed.
    calls = len(rows) / len(shown.transformers)
    steps = "".join(part.timeline for part in shown.transformers)
    assert sum(row.steps_computed + row.steps_reused for row in rows) == len(steps) * calls
    start = STEPS - len(steps)
    plan = {None: range(STEPS), "every 2": range(0, STEPS, 2)}.get(
        policy if isinstance(policy, str) or policy is None else "", policy
    )
    firsts = {start, start + len(shown.transformers[0].timeline)}
    expected = ["C" if s in plan or s in firsts else "-" for s in range(start, STEPS)]
    assert list(steps) == expected


def test_residuals_are_kept_only_while_they_are_needed():
    case = wan()
    accelerate(case.pipe, policy=[0, 1, 4])
    held = []

    def look(pipe, step, timestep, kwargs):
        held.append(report(pipe).transformers[0].bytes_held)
        return kwargs

    case.run(callback_on_step_end=look)
    stack = 2 * 3 * 24 * 4  # branches x tokens (3 frames of 1 x 1 patches) x width x fp32
    assert held == [0, stack, stack, 0, stack, 0]


# Invariant 8: nothing unsupported passes.


def test_wrong_pipelines_are_refused():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(UnsupportedPipelineError, match=r"DDPMPipeline .* unet \(UNet2DModel\)"):
        accelerate(pipe)
    with pytest.raises(UnsupportedPipelineError, match="takes a Diffusers pipeline, found Linear"):
        accelerate(torch.nn.Linear(2, 2))


def test_unsupported_states_are_refused_and_change_nothing():
    from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler

    case = wan22()
    before = snapshot(case.pipe.transformer)
    case.pipe.transformer_2.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedPipelineError, match="disable_cache"):
        accelerate(case.pipe)
    assert snapshot(case.pipe.transformer) == before

    case = wan()
    accelerate(case.pipe)
    case.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedPipelineError, match="disable_cache"):
        case.run()

    case = wan()
    case.pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UnsupportedPipelineError, match="2 times per step"):
        accelerate(case.pipe)


def test_a_replaced_scheduler_is_noticed():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    case.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ScheduleError, match=r"call vidaccel.accelerate\(pipe\) again"):
        case.run()
    accelerate(case.pipe, policy=PLAN)
    case.run()


def test_a_plan_that_does_not_fit_stops_before_any_block():
    case = wan()
    counts = count_blocks(case.pipe)
    for policy, message in (
        (Plan((0, 5), 50), "made for 50 steps, but this run has 6"),
        ([0, 8], "computes step 8, but the run has 6 steps"),
    ):
        accelerate(case.pipe, policy=policy)
        with pytest.raises(PlanError, match=message):
            case.run()
    assert counts["blocks"] == 0


def test_report_needs_an_accelerated_pipeline():
    with pytest.raises(vidaccel.VidaccelError, match="not accelerated"):
        report(wan().pipe)


def test_report_says_the_same_to_people_and_programs():
    case = wan22()
    accelerate(case.pipe, policy="every 2")
    case.run()
    shown = report(case.pipe)
    data = shown.to_dict()
    # The plan reuses step 3, but it is the first of the second transformer.
    assert [part["timeline"] for part in data["transformers"]] == ["C-C", "CC-"]
    for part in data["transformers"]:
        assert part["timeline"] in str(shown)
        assert part["component"] in str(shown)
    total = sum(b["steps_computed"] for part in data["transformers"] for b in part["branches"])
    assert total == 2 * "".join(p["timeline"] for p in data["transformers"]).count("C")


def engines(pipe: Any) -> list[Any]:
    from vidaccel.api import engines_of

    return list(engines_of(pipe).values())


# Composition with the host.


def compile_blocks(pipe):
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


@pytest.mark.parametrize("setup", [compile_blocks, offload, group_offload, lora])
def test_order_of_accelerate_and_host_features_does_not_matter(setup):
    before, after, plain = wan(), wan(), wan()
    setup(before.pipe)
    accelerate(before.pipe, policy=PLAN)
    accelerate(after.pipe, policy=PLAN)
    setup(after.pipe)
    setup(plain.pipe)
    baseline = plain.run()
    # Twice, since some hooks are laid anew at the end of a generation.
    expected = before.run()
    assert torch.equal(before.run(), expected)
    assert torch.equal(after.run(), expected)
    assert torch.equal(after.run(), expected)
    assert not torch.equal(expected, baseline)
    assert report(after.pipe).transformers[0].timeline == "CC--C-"
    for case in (before, after):
        restore(case.pipe)
        assert torch.equal(case.run(), baseline)


def test_lora_files_load_into_an_accelerated_pipeline(tmp_path):
    source = wan()
    lora(source.pipe)
    source.pipe.transformer.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    expected = accelerate(source.pipe, policy=PLAN) and source.run()
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    case.pipe.transformer.load_lora_adapter(tmp_path, prefix=None, weight_name="lora.safetensors")
    torch.testing.assert_close(case.run(), expected)
    case.pipe.transformer.fuse_lora()
    case.pipe.transformer.unfuse_lora()
    case.pipe.transformer.delete_adapters("default_0")


def test_blocks_compiled_with_fullgraph_stay_one_graph():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    compile_blocks(case.pipe)
    torch._dynamo.utils.counters.clear()
    case.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_transformer_compiled_as_a_whole_is_refused():
    case = wan()
    case.pipe.transformer.compile(backend="eager")
    with pytest.raises(UnsupportedPipelineError, match="compile_repeated_blocks"):
        accelerate(case.pipe)
    case = wan()
    case.pipe.transformer = torch.compile(case.pipe.transformer, backend="eager")
    with pytest.raises(UnsupportedPipelineError, match="compile_repeated_blocks"):
        accelerate(case.pipe)


def test_the_block_lists_still_look_like_the_models_own():
    model = wan_vace().pipe.transformer
    real = list(model.blocks)
    accelerate_model = wan_vace()
    accelerate(accelerate_model.pipe, policy=PLAN)
    shadowed = accelerate_model.pipe.transformer
    assert len(shadowed.blocks) == len(real)
    assert isinstance(shadowed.blocks, torch.nn.ModuleList)
    assert shadowed.get_submodule("blocks.1") is shadowed._modules["blocks"][1]
    assert shadowed.blocks[1].attn1 is shadowed._modules["blocks"][1].attn1
    assert [b.attn1 for b in shadowed.blocks[1:]] == [
        b.attn1 for b in list(shadowed._modules["blocks"])[1:]
    ]


def test_an_accelerated_transformer_is_not_copied_by_accident():
    case = wan()
    accelerate(case.pipe, policy=PLAN)
    with pytest.raises(UnsupportedPipelineError, match="restore"):
        copy.deepcopy(case.pipe.transformer)
    restore(case.pipe)
    copied = copy.deepcopy(case.pipe.transformer)
    assert copied.blocks[0] is not case.pipe.transformer.blocks[0]


def test_dropping_an_accelerated_pipeline_frees_it_at_once():
    import gc
    import weakref

    case = wan()
    accelerate(case.pipe, policy=[0])
    case.run()
    del case.pipe.transformer._diffusers_hook  # a cycle of Diffusers' own
    transformer = weakref.ref(case.pipe.transformer)
    gc.disable()
    try:
        del case
        assert transformer() is None
    finally:
        gc.enable()


def test_a_policy_is_held_against_the_run(tmp_path):
    from vidaccel.plans.policy import CachePolicy

    def policy(**changes):
        data = {
            "schema_version": "1.0",
            "model": {"transformer": "WanTransformer3DModel"},
            "num_inference_steps": STEPS,
            "plans": {"3": {"steps": [0, 2, 4]}},
            "provenance": "published",
        }
        return CachePolicy.from_json(json.dumps(data | changes))

    case = wan()
    case.pipe.scheduler.set_timesteps(STEPS)
    sigmas = case.pipe.scheduler.sigmas[:STEPS].tolist()
    policy(scheduler={"sigmas": sigmas}).save(tmp_path / "policy.json")
    accelerate(case.pipe, policy=tmp_path / "policy.json")
    case.run()
    assert report(case.pipe).transformers[0].timeline == "C-C-C-"
    assert str(tmp_path) in report(case.pipe).transformers[0].policy
    for changes, field in (
        ({"scheduler": {"sigmas": [0.9 * s for s in sigmas]}}, r"scheduler\.sigmas"),
        ({"scheduler": {"name": "UniPCMultistepScheduler"}}, r"scheduler\.name"),
        ({"model": {"transformer": "LTXVideoTransformer3DModel"}}, r"model\.transformer"),
        ({"model": {"transformer": "WanTransformer3DModel", "config_hash": "0" * 64}}, "hash"),
        ({"num_inference_steps": 7}, "num_inference_steps"),
    ):
        accelerate(case.pipe, policy=policy(**changes))
        with pytest.raises(PolicyError, match=field):
            case.run()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecasts_follow_the_noise_level(order):
    """A residual that is a polynomial of sigma is forecast exactly by the order of its degree."""
    pipe = wan().pipe
    model = pipe.transformer
    pipe.scheduler.set_timesteps(8)
    sigmas = pipe.scheduler.sigmas.tolist()

    def residual(step):
        return sum((k + 1.0) * sigmas[step] ** k for k in range(order + 1))

    now = {"residual": 0.0}
    first, *others = model.blocks
    first.register_forward_hook(lambda module, args, output: args[0] + now["residual"])
    for block in others:
        block.register_forward_hook(lambda module, args, output: args[0])
    accelerate(pipe, policy=Plan((0, 1, 3), 8, orders=(0, 0, order)))
    heads = []
    model.norm_out.register_forward_pre_hook(lambda module, args: heads.append(args[0].clone()))
    x = torch.randn(1, 16, 3, 4, 4, generator=generator(3))
    for step in range(8):
        now["residual"] = residual(step)
        with torch.no_grad(), model.cache_context("cond"):
            model(x, pipe.scheduler.timesteps[step : step + 1], embeds(1))
    assert report(pipe).transformers[0].timeline == "CC-C----"
    for step in range(4, 8):
        added = heads[step] - heads[0] + residual(0)
        expected = torch.full_like(added, residual(step))
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-4)
