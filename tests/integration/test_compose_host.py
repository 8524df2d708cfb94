"""What people combine with acceleration: memory savers, compiled blocks, LoRA, callbacks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny import STEPS, embeds, generator
from tiny.hunyuan import hunyuan
from tiny.setups import (
    block_offload,
    casting,
    compiled,
    leaf_offload,
    lora,
    model_offload,
    sequential_offload,
)
from tiny.wan import wan, wan_v2v
from vidaccel import DBCache, accelerate, report, restore
from vidaccel.errors import PlanError

PLAN = [0, 1, 4]
CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)

# The two ways to decide, and what six steps come to.
ACCELERATIONS = {
    "plan": ({"policy": PLAN, "cache": None}, "CC--C-"),
    "cache": ({"policy": None, "cache": CACHE}, "CppCpp"),
}


@pytest.fixture(params=ACCELERATIONS)
def acceleration(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    return ACCELERATIONS[request.param]


# Orders. Compiling takes seconds per case, so it is held against the others on Wan alone.


@pytest.mark.parametrize("build", [wan, hunyuan])
@pytest.mark.parametrize(
    "setups",
    [
        (model_offload,),
        (sequential_offload,),
        (block_offload, lora),
        (lora, block_offload),
        (leaf_offload, lora),
        (lora, model_offload),
        (lora, casting),
    ],
    ids=lambda setups: "-".join(setup.__name__ for setup in setups),
)
def test_accelerate_may_stand_anywhere(build, setups, acceleration):
    """In every place among the setups: the same output, timeline and restored pipeline."""
    options, timeline = acceleration
    plain = build()
    for setup in setups:
        setup(plain.pipe)
    baseline = plain.run()
    outputs = []
    for place in range(len(setups) + 1):
        case = build()
        for setup in setups[:place]:
            setup(case.pipe)
        accelerate(case.pipe, **options)
        for setup in setups[place:]:
            setup(case.pipe)
        # Twice, since some hooks are laid anew at the end of a generation.
        outputs += [case.run(), case.run()]
        assert report(case.pipe).transformers[0].timeline == timeline
        assert report(case.pipe).transformers[0].bytes_held == 0
        restore(case.pipe)
        assert torch.equal(case.run(), baseline)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(outputs[0], baseline)


@pytest.mark.parametrize(
    "setups",
    [(compiled, lora), (model_offload, compiled)],
    ids=["compiled-lora", "offload-compiled"],
)
def test_compiled_blocks_never_compile_again(setups):
    """One graph over steps, plans, block caches and generations, with accelerate first or last."""
    cases = (wan(), wan())
    accelerate(cases[0].pipe, policy=PLAN, cache=None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = []
        for case in cases:
            for setup in setups:
                setup(case.pipe)
            for options, timeline in ACCELERATIONS.values():
                accelerate(case.pipe, **options)
                outputs.append(case.run())
                assert torch.equal(case.run(), outputs[-1])
                assert report(case.pipe).transformers[0].timeline == timeline
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_what_a_plain_hunyuan_compiles_is_enough():
    """Its two kinds of single-block input take a graph each in a plain run, and no more after."""
    case = hunyuan()
    compiled(case.pipe)
    baseline = case.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for options, timeline in ACCELERATIONS.values():
            accelerate(case.pipe, **options)
            assert torch.equal(case.run(), case.run())
            assert report(case.pipe).transformers[0].timeline == timeline
        restore(case.pipe)
        assert torch.equal(case.run(), baseline)


# Memory.


def test_tiling_changes_nothing_but_the_decoding(acceleration):
    options, timeline = acceleration
    before, after = wan(), wan()
    before.pipe.vae.enable_tiling()
    for case in (before, after):
        accelerate(case.pipe, **options)
    after.pipe.vae.enable_tiling()
    frames = before.run(output_type="pt")
    assert torch.equal(after.run(output_type="pt"), frames)
    assert report(after.pipe).transformers[0].timeline == timeline


def test_an_exception_leaves_nothing_in_the_next_call(acceleration):
    options, _ = acceleration
    case = wan()
    accelerate(case.pipe, **options)
    expected = case.run()

    def fail(pipe, step, timestep, kwargs):
        if step == 1:
            raise RuntimeError("stop")
        return kwargs

    with pytest.raises(RuntimeError, match="stop"):
        case.run(callback_on_step_end=fail)
    assert torch.equal(case.run(), expected)
    assert report(case.pipe).transformers[0].bytes_held == 0


@pytest.mark.parametrize("order", [0, 1])
def test_guidance_that_ends_early_frees_both_branches(order):
    """The unconditional branch sits out the second half of the run."""
    case = wan()
    accelerate(case.pipe, policy=None, cache=replace(CACHE, forecast_order=order))

    def end_guidance(pipe, step, timestep, kwargs):
        if step == 2:
            pipe._guidance_scale = 1.0
        return kwargs

    case.run(callback_on_step_end=end_guidance)
    shown = report(case.pipe).transformers[0]
    ran = {row.branch: row.steps_computed + row.steps_reused for row in shown.branches}
    assert ran == {"cond": STEPS, "uncond": 3}
    assert shown.bytes_held == 0 and shown.peak_bytes > 0


# LoRA.


def test_adapters_are_swapped_between_generations(acceleration):
    """Each generation is that of a pipeline that was accelerated with the adapter in place."""
    options, _ = acceleration

    def fresh(name: str | None) -> torch.Tensor:
        case = wan()
        lora(case.pipe, "first", 0)
        lora(case.pipe, "second", 1)
        if name is None:
            case.pipe.transformer.disable_adapters()
        else:
            case.pipe.transformer.set_adapter(name)
        accelerate(case.pipe, **options)
        return case.run()

    case = wan()
    accelerate(case.pipe, **options)
    plain = case.run()
    lora(case.pipe, "first", 0)
    lora(case.pipe, "second", 1)
    model = case.pipe.transformer
    outputs = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        outputs[name] = case.run()
        assert torch.equal(outputs[name], fresh(name))
    assert not torch.equal(outputs["first"], outputs["second"])
    model.disable_adapters()
    assert torch.equal(case.run(), plain) and torch.equal(fresh(None), plain)
    model.enable_adapters()
    model.set_adapter("first")
    model.fuse_lora()
    torch.testing.assert_close(case.run(), outputs["first"], rtol=1e-3, atol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(case.run(), outputs["first"], rtol=1e-3, atol=1e-4)
    model.unload_lora()
    torch.testing.assert_close(case.run(), plain, rtol=1e-3, atol=1e-4)


def test_a_few_step_lora_is_not_run_with_the_plan_of_its_base():
    case = wan()
    accelerate(case.pipe, policy=[0, 2], cache=None)
    lora(case.pipe, "lightning")
    case.run(num_inference_steps=4)
    accelerate(case.pipe)
    case.run(num_inference_steps=4)
    shown = report(case.pipe).transformers[0]
    assert shown.timeline == "CCCC" and "the run has few" in shown.policy
    from vidaccel import Plan

    accelerate(case.pipe, policy=Plan((0, 9), 50))
    with pytest.raises(PlanError, match="made for 50 steps, but this run has 4"):
        case.run(num_inference_steps=4)


# Callbacks and interruption.


def test_a_callback_that_edits_latents_edits_them(acceleration):
    """With every step computed, bit-equal to the plain pipeline under the same callback; with
    some reused, the last edit is what comes out, and the same run twice gives the same."""
    options, timeline = acceleration

    def halve(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * (0.5 if step == 2 else 1.0)}

    def blank(pipe, step, timestep, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == STEPS - 1 else {}

    case = wan()
    plain, edited = case.run(), case.run(callback_on_step_end=halve)
    accelerate(case.pipe, policy=None, cache=None)
    assert torch.equal(case.run(callback_on_step_end=halve), edited)
    accelerate(case.pipe, **options)
    first = case.run(callback_on_step_end=halve)
    assert torch.equal(case.run(callback_on_step_end=halve), first)
    assert not torch.equal(first, case.run()) and not torch.equal(first, plain)
    assert report(case.pipe).transformers[0].timeline == timeline
    assert not case.run(callback_on_step_end=blank).any()


def test_an_interrupted_run_is_the_beginning_of_a_whole_one(acceleration):
    options, timeline = acceleration
    case = wan()
    accelerate(case.pipe, **options)
    seen = []

    def keep(pipe, step, timestep, kwargs):
        seen.append(kwargs["latents"])
        return {}

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return {}

    whole = case.run(callback_on_step_end=keep)
    assert torch.equal(case.run(callback_on_step_end=stop), seen[2])
    shown = report(case.pipe).transformers[0]
    assert shown.timeline == timeline[:3] and shown.bytes_held == 0
    assert torch.equal(case.run(), whole)


def test_two_videos_and_two_generators_are_two_runs():
    """Under a plan, each of two videos is the one that its generator gives alone."""
    case = wan()
    accelerate(case.pipe, policy=PLAN, cache=None)
    single = [case.run(seed) for seed in (3, 4)]
    kwargs = {"output_type": "latent", **case.kwargs}
    both = case.pipe(
        generator=[generator(3), generator(4)], num_videos_per_prompt=2, **kwargs
    ).frames
    assert report(case.pipe).transformers[0].timeline == "CC--C-"
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-4, atol=1e-5)
    kwargs["prompt_embeds"] = torch.cat([embeds(1), embeds(5)])
    kwargs["negative_prompt_embeds"] = embeds(2).repeat(2, 1, 1)
    both = case.pipe(generator=[generator(3), generator(4)], **kwargs).frames
    other = case.run(4, prompt_embeds=embeds(5))
    torch.testing.assert_close(both, torch.cat([single[0], other]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.7, 2), (0.4, 4)])
def test_strength_cuts_the_beginning_off_a_plan(strength, first):
    """The first step that runs is computed whatever the plan says; the others are the plan's."""
    case = wan_v2v()
    accelerate(case.pipe, policy=PLAN, cache=None)
    case.run(strength=strength)
    assert report(case.pipe).transformers[0].timeline == "C" + "CC--C-"[first + 1 :]
