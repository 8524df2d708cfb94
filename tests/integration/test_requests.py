"""Calls that are no plain generation of one pipeline: shared transformers, windows, training."""

import copy
import pickle
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import nn

import vidaccel
from tiny import STEPS, Case, embeds
from tiny.wan import wan, wan22, wan_transformer
from vidaccel import DBCache, accelerate, report, restore
from vidaccel.errors import PlanError, ScheduleError, UnsupportedPipelineError

PLAN = {"policy": "every 3", "cache": None, "attention": None}


def sharing(case: Case) -> Any:
    """Another pipeline with the same transformer and a scheduler of its own."""
    scheduler = copy.deepcopy(case.pipe.scheduler)
    return WanPipeline(**(case.pipe.components | {"scheduler": scheduler}))


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def step(pipe: Any, index: int, latents: torch.Tensor, prompt: torch.Tensor, name: str | None):
    """One step of a sampling loop as a pipeline runs it."""
    t = pipe.scheduler.timesteps[index]
    call = {"hidden_states": latents, "timestep": t.expand(1), "encoder_hidden_states": prompt}
    velocity = called(pipe.transformer, name, **call)
    return pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]


def called(model: Any, name: str | None, **call: Any) -> torch.Tensor:
    if name is None:
        return model(**call, return_dict=False)[0]
    with model.cache_context(name):
        return model(**call, return_dict=False)[0]


def sampled(pipe: Any, seed: int, name: str | None = "cond") -> torch.Tensor:
    """One request by itself."""
    pipe.scheduler.set_timesteps(STEPS)
    latents = noise(seed)
    for index in range(STEPS):
        latents = step(pipe, index, latents, embeds(seed), name)
    return latents


# One transformer, several requests.


@pytest.mark.parametrize("name", ["cond", None], ids=["named", "unnamed"])
def test_interleaved_requests_do_not_touch_each_other(name):
    case = wan()
    first, second = case.pipe, sharing(case)
    for pipe in (first, second):
        accelerate(pipe, **PLAN)
    expected = [sampled(pipe, seed, name) for seed, pipe in enumerate((first, second))]
    for pipe in (first, second):
        pipe.scheduler.set_timesteps(STEPS)
    latents = [noise(0), noise(1)]
    for index in range(STEPS):
        for seed, pipe in enumerate((first, second)):
            latents[seed] = step(pipe, index, latents[seed], embeds(seed), name)
    for found, alone in zip(latents, expected, strict=True):
        assert torch.equal(found, alone)
    assert report(first).transformers[0].generations == 4
    rows = {row.branch: row for row in report(first).transformers[0].branches}
    (row,) = rows.values()
    assert (row.steps_computed, row.steps_reused) == (4 * 2, 4 * 4)


def test_requests_of_different_length_in_turns():
    case = wan()
    first, second = case.pipe, sharing(case)
    for pipe in (first, second):
        accelerate(pipe, **PLAN)
    expected = sampled(first, 0)
    first.scheduler.set_timesteps(STEPS)
    second.scheduler.set_timesteps(9)
    latents = [noise(0), noise(1)]
    for index in range(9):
        if index < STEPS:
            latents[0] = step(first, index, latents[0], embeds(0), "cond")
        latents[1] = step(second, index, latents[1], embeds(1), "cond")
    assert torch.equal(latents[0], expected)


def test_requests_in_threads():
    case = wan()
    pipes = [case.pipe, sharing(case), sharing(case)]
    for pipe in pipes:
        accelerate(pipe, **PLAN)
    expected = [sampled(pipe, seed) for seed, pipe in enumerate(pipes)]
    found: list[Any] = [None] * len(pipes)
    barrier = threading.Barrier(len(pipes))

    def request(seed: int) -> None:
        barrier.wait()
        found[seed] = sampled(pipes[seed], seed)

    threads = [threading.Thread(target=request, args=(seed,)) for seed in range(len(pipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, alone in zip(found, expected, strict=True):
        assert torch.equal(one, alone)


def test_a_sharing_pipeline_that_is_not_accelerated_is_named():
    case = wan()
    other = sharing(case)
    accelerate(case.pipe, **PLAN)
    other.scheduler.set_timesteps(STEPS)
    with pytest.raises(ScheduleError, match=r"accelerate that pipeline too.*restore\(pipe\)"):
        step(other, 1, noise(0), embeds(0), "cond")


def test_a_step_that_cannot_be_placed_is_computed_in_the_middle_of_a_run():
    case = wan()
    accelerate(case.pipe, policy=[0], cache=None, attention=None)
    pipe = case.pipe
    pipe.scheduler.set_timesteps(STEPS)
    latents = noise(0)
    for index in range(STEPS):
        if index == 3:
            with torch.no_grad():
                call = {"hidden_states": latents, "encoder_hidden_states": embeds(0)}
                called(pipe.transformer, "cond", **call, timestep=torch.tensor([123.0]))
        latents = step(pipe, index, latents, embeds(0), "cond")
    shown = report(pipe)
    assert shown.transformers[0].timeline == "C-----"
    assert "1 calls were run plainly: their timestep was not among those" in str(shown)


# A proxy is what it stands for.


def test_what_is_assigned_to_a_block_reaches_it():
    case = wan()
    plain = case.run()
    blocks = case.pipe.transformer.blocks
    skipped = blocks[1].forward

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    blocks[1].forward = identity
    without = case.run()
    blocks[1].forward = skipped
    accelerate(case.pipe, policy=None, cache=None, attention=None)
    assert torch.equal(case.run(), plain)
    case.pipe.transformer.blocks[1].forward = identity
    assert torch.equal(case.run(), without)
    case.pipe.transformer.blocks[1].flag = 1
    assert case.pipe.transformer._modules["blocks"][1].flag == 1
    del case.pipe.transformer.blocks[1].flag
    assert not hasattr(case.pipe.transformer._modules["blocks"][1], "flag")


def test_a_list_proxy_is_a_list_of_blocks():
    case = wan()
    model = case.pipe.transformer
    real = list(model.blocks)
    accelerate(case.pipe, **PLAN)
    assert list(model.blocks) == real and model.blocks[-1] is real[-1]
    assert isinstance(model.blocks, nn.ModuleList)
    assert [*nn.ModuleList(list(model.blocks)[:2])] == real[:2]
    assert [*nn.Sequential(*model.blocks)] == real
    assert list(model.blocks[1:]) == real[1:]
    assert real[0] in model.blocks and len(model.blocks) == 3


def test_replaced_and_deleted_blocks_are_those_that_run():
    case = wan()
    model = case.pipe.transformer
    accelerate(case.pipe, policy=None, cache=None, attention=None)
    compiled = torch.compile(model.blocks[0], backend="eager")
    plain = case.run()
    model.blocks[0] = compiled
    torch.testing.assert_close(case.run(), plain)
    model.blocks[0] = compiled._orig_mod
    del model.blocks[-1]
    assert len(model.blocks) == 2
    two = case.run()
    assert report(case.pipe).transformers[0].branches[0].blocks_run % 2 == 0
    restore(case.pipe)
    assert torch.equal(case.run(), two) and not torch.equal(two, plain)


def test_another_list_of_blocks_is_noticed():
    case = wan()
    accelerate(case.pipe, **PLAN)
    case.run()
    model = case.pipe.transformer
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[2]])
    case.run()
    assert report(case.pipe).transformers[0].timeline == "C--C--"
    restore(case.pipe)
    assert len(model.blocks) == 2 and "blocks" not in vars(model)


# Calls of a step.


@torch.no_grad()
def windows(pipe: Any, names: list[str | None], order: Any = None) -> torch.Tensor:
    """A clip of three windows of latents, each with a call of its own in every step."""
    pipe.scheduler.set_timesteps(STEPS)
    latents = noise(5).repeat(1, 1, 3, 1, 1) * torch.linspace(1, 2, 9)[:, None, None]
    for index in range(STEPS):
        t = pipe.scheduler.timesteps[index]
        velocity = torch.empty_like(latents)
        for window in (order or (lambda step: range(3)))(index):
            part = slice(3 * window, 3 * window + 3)
            call = {"timestep": t.expand(1), "encoder_hidden_states": embeds(1)}
            call["hidden_states"] = latents[:, :, part]
            velocity[:, :, part] = called(pipe.transformer, names[window], **call)
        latents = pipe.scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def error(found: torch.Tensor, plain: torch.Tensor) -> float:
    return float((found - plain).abs().mean() / plain.abs().mean())


def test_calls_of_one_name_are_branches_of_their_own():
    case = wan()
    plain = windows(case.pipe, ["cond"] * 3)
    accelerate(case.pipe, **PLAN)
    found = windows(case.pipe, ["cond"] * 3)
    part = report(case.pipe).transformers[0]
    assert part.generations == 1 and part.timeline == "C--C--"
    assert [row.branch for row in part.branches] == ["cond", "cond 2", "cond 3"]
    accelerate(case.pipe, **PLAN)
    apart = windows(case.pipe, ["a", "b", "c"])
    assert torch.equal(found, apart) and error(found, plain) > 0


def test_unnamed_windows_are_computed():
    case = wan()

    def shifting(index: int) -> list[int]:
        return [(window + index) % 3 for window in range(3)]

    plain = windows(case.pipe, [None] * 3, shifting)
    accelerate(case.pipe, **PLAN)
    found = windows(case.pipe, [None] * 3, shifting)
    assert torch.equal(found, plain)
    assert "cannot be told apart" in str(report(case.pipe))


@pytest.mark.parametrize("named", [False])
def test_a_call_that_joins_in_the_middle_takes_no_others_place(named):
    case = wan()
    prompts = {"cond": embeds(1), "edit": embeds(2), "uncond": embeds(3)}

    @torch.no_grad()
    def guided() -> torch.Tensor:
        case.pipe.scheduler.set_timesteps(STEPS)
        latents = noise(1)
        for index in range(STEPS):
            t = case.pipe.scheduler.timesteps[index]
            calls = ["cond", "uncond"] if index < 2 else ["cond", "edit", "uncond"]
            call = {"hidden_states": latents, "timestep": t.expand(1)}
            velocity = sum(
                called(case.pipe.transformer, None, **call, encoder_hidden_states=prompts[name])
                for name in calls
            )
            latents = case.pipe.scheduler.step(velocity / 3, t, latents, return_dict=False)[0]
        return latents

    accelerate(case.pipe, **PLAN)
    guided()
    rows = {row.branch: row for row in report(case.pipe).transformers[0].branches}
    assert (rows["cond"].steps_computed, rows["cond"].steps_reused) == (2, 4)
    assert (rows["uncond"].steps_computed, rows["uncond"].steps_reused) == (2, 4)
    (edit,) = rows.keys() - {"cond", "uncond"}
    # It joins on a reused step with nothing to reuse, and is computed then.
    assert (rows[edit].steps_computed, rows[edit].steps_reused) == (2, 2)


# Blocks that write in place.


class InPlace(nn.Module):
    """A block that writes what it adds into the stream that it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        result = self.block(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return hidden_states.copy_(result)


@pytest.mark.parametrize(
    "options",
    [
        PLAN,
        {"policy": None, "cache": DBCache(0.9, warmup_steps=1), "attention": None},
        {
            "policy": None,
            "cache": DBCache(0.9, warmup_steps=1, corrector_blocks=1),
            "attention": None,
        },
    ],
    ids=["plan", "cache", "corrector"],
)
def test_blocks_that_write_in_place(options):
    expected, case = wan(), wan()
    accelerate(expected.pipe, **options)
    model = case.pipe.transformer
    for index, block in enumerate(model.blocks):
        model.blocks[index] = InPlace(block)
    accelerate(case.pipe, **options)
    torch.testing.assert_close(case.run(), expected.run())
    timelines = {report(one.pipe).transformers[0].timeline for one in (case, expected)}
    assert len(timelines) == 1 and timelines != {"C" * STEPS}


# Training.


def test_gradients_are_those_of_the_plain_model():
    case = wan()
    case.pipe.scheduler.set_timesteps(STEPS)
    model = case.pipe.transformer

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        latents = noise(0)
        for t in case.pipe.scheduler.timesteps:
            with model.cache_context("cond"):
                call = {"hidden_states": latents, "timestep": t.expand(1)}
                out = model(**call, encoder_hidden_states=embeds(1), return_dict=False)[0]
            latents = latents + 0.1 * out
        latents.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    for options in (PLAN, {"policy": None, "cache": DBCache(1e9), "attention": None}):
        accelerate(case.pipe, **options)
        assert all(map(torch.equal, gradients(), plain))
        assert "gradients were enabled" in str(report(case.pipe))
        assert case.pipe.transformer._vidaccel_engine.bytes_held == 0


def test_a_model_in_training_mode_is_computed():
    case = wan()
    case.pipe.transformer.train()
    plain = case.run()
    accelerate(case.pipe, **PLAN)
    assert torch.equal(case.run(), plain)
    assert "training mode" in str(report(case.pipe))
    case.pipe.transformer.eval()
    assert not torch.equal(case.run(), plain)


@torch.no_grad()
def validation_losses(case: Case, mixed: bool) -> list[torch.Tensor]:
    """Outputs on clips that are shuffled anew at each timestep, as a validation loss takes them."""
    case.pipe.scheduler.set_timesteps(STEPS)
    outputs = []
    for index, t in enumerate(case.pipe.scheduler.timesteps):
        for clip in [(index + k) % 3 for k in range(3)]:
            batch = {"hidden_states": noise(clip), "encoder_hidden_states": embeds(9)}
            times = t.expand(1)
            if mixed:
                batch = {name: torch.cat([x, x]) for name, x in batch.items()}
                times = torch.stack([t, case.pipe.scheduler.timesteps[0]])
            outputs.append(case.pipe.transformer(**batch, timestep=times, return_dict=False)[0])
    return outputs


@pytest.mark.parametrize("mixed", [False, True], ids=["shuffled", "a time per sample"])
def test_validation_losses_are_those_of_the_plain_model(mixed):
    case = wan()
    plain = validation_losses(case, mixed)
    accelerate(case.pipe, **PLAN)
    found = validation_losses(case, mixed)
    assert all(map(torch.equal, found, plain))


# Changes in the middle of a run.


def with_callback(case: Case, at: int, change: Any) -> torch.Tensor:
    """One run in which `change(pipe)` is called at the end of step `at`."""

    def callback(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            kwargs |= change(pipe) or {}
        return kwargs

    return case.run(
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
    )


def test_a_switched_prompt_is_computed_at_once():
    case = wan()
    accelerate(case.pipe, policy=[0, 1, 2], cache=None, attention=None)
    with_callback(
        case, 3, lambda pipe: {"prompt_embeds": embeds(7), "negative_prompt_embeds": embeds(8)}
    )
    steps = report(case.pipe).transformers[0].steps
    assert [s.step for s in steps if s.kind == "computed" and s.branch == "cond"] == [0, 1, 2, 4]


@pytest.mark.parametrize("corrector", [0, 1])
def test_a_prompt_of_another_length_is_no_size_error(corrector):
    case = wan()
    accelerate(case.pipe, policy=[0, 1, 2], cache=DBCache(1e9, corrector_blocks=corrector))
    longer = {"prompt_embeds": embeds(7).repeat(1, 2, 1), "negative_prompt_embeds": embeds(8)}
    with_callback(case, 3, lambda pipe: longer)
    assert report(case.pipe).transformers[0].timeline[4] == "C"


def test_recompute_asks_for_a_computed_step():
    case = wan()
    accelerate(case.pipe, policy=[0], cache=None, attention=None)
    with_callback(case, 2, lambda pipe: vidaccel.recompute(pipe) and None)
    assert report(case.pipe).transformers[0].timeline == "C--C--"


@pytest.mark.parametrize("change", ["strength", "switched off"])
def test_another_strength_of_an_adapter_is_computed(change):
    peft = pytest.importorskip("peft")
    case = wan()
    model = case.pipe.transformer
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "style")
    model.eval()
    accelerate(case.pipe, policy=[0], cache=None, attention=None)

    def changed(pipe: Any) -> None:
        if change == "strength":
            pipe.transformer.set_adapters("style", 0.5)
        else:
            pipe.transformer.disable_adapters()

    with_callback(case, 2, changed)
    assert report(case.pipe).transformers[0].timeline == "C--C--"


def test_control_that_ends_half_way_is_computed():
    case = wan()
    accelerate(case.pipe, policy=[0], cache=None, attention=None)
    pipe = case.pipe
    pipe.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for index, t in enumerate(pipe.scheduler.timesteps):
            extra = {"attention_kwargs": {}} if index < 3 else {}
            call = {"hidden_states": noise(0), "timestep": t.expand(1), **extra}
            called(pipe.transformer, "cond", **call, encoder_hidden_states=embeds(1))
    assert report(pipe).transformers[0].timeline == "C--C--"


# Beside other tools.


def test_blocks_that_something_else_skips_are_told():
    case = wan()
    plain = case.run()
    accelerate(case.pipe, **PLAN)
    model = case.pipe.transformer

    real, forward = list(model._modules["blocks"]), model.forward

    class Elsewhere(nn.Module):
        """Runs the real blocks behind vidaccel's back."""

        def forward(self, hidden_states, *args, **kwargs):
            for block in real:
                hidden_states = block(hidden_states, *args, **kwargs)
            return hidden_states

    other = nn.ModuleList([Elsewhere()])

    def patched(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(model, "blocks", other):
            return forward(*args, **kwargs)

    model.forward = patched
    assert torch.equal(case.run(), plain)
    assert "not every block came through" in str(report(case.pipe))
    del model.forward
    restore(case.pipe)
    assert type(model.blocks) is nn.ModuleList and list(model.blocks) == real


def test_a_cache_that_was_enabled_before_is_refused_by_name():
    case = wan()
    case.pipe.transformer._is_cached = True
    with pytest.raises(UnsupportedPipelineError, match=r"cache-dit .* disable it first"):
        accelerate(case.pipe)


def test_an_accelerated_transformer_is_not_pickled():
    case = wan()
    accelerate(case.pipe, **PLAN)
    with pytest.raises(UnsupportedPipelineError, match=r"copied or pickled: restore\(pipe\) first"):
        pickle.dumps(case.pipe.transformer)
    restore(case.pipe)
    assert pickle.dumps(case.pipe.transformer)


def test_a_peft_model_around_the_transformer():
    peft = pytest.importorskip("peft")
    case = wan()
    accelerate(case.pipe, **PLAN)
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    wrapped = peft.get_peft_model(case.pipe.transformer, config)
    case.pipe.transformer = wrapped
    wrapped.eval()
    assert "policy: every 3" in str(report(case.pipe))
    restore(case.pipe)
    assert "blocks" not in vars(wrapped.get_base_model())


def test_another_transformer_is_noticed_at_the_next_call():
    case, other = wan(), wan()
    other.pipe.transformer = wan_transformer(seed=1)
    plain = other.run()
    accelerate(case.pipe, **PLAN)
    case.pipe.transformer = other.pipe.transformer
    with pytest.warns(UserWarning, match=r"transformer of this WanPipeline is another .* again"):
        replaced = case.run()
    assert torch.equal(replaced, plain)
    with pytest.raises(vidaccel.VidaccelError, match="not accelerated"):
        report(case.pipe)
    # Accelerated again, or restored, it is what it says it is, and nothing is left to warn of.
    accelerate(case.pipe, **PLAN)
    case.run()
    assert report(case.pipe).transformers[0].timeline == "C--C--"
    case.pipe.transformer = wan().pipe.transformer
    restore(case.pipe)
    case.run()
    assert "progress_bar" not in vars(case.pipe)


def test_a_transformer_that_comes_back_is_accelerated_still():
    case = wan()
    accelerate(case.pipe, **PLAN)
    first, other = case.pipe.transformer, wan_transformer(seed=1)
    case.pipe.transformer = other
    with pytest.warns(UserWarning, match="another WanTransformer3DModel"):
        case.run()
    case.pipe.transformer = first
    case.run()
    assert report(case.pipe).transformers[0].timeline == "C--C--"


def test_one_of_two_experts_that_is_replaced_is_named():
    case = wan22()
    accelerate(case.pipe, **PLAN)
    case.pipe.transformer_2 = wan22().pipe.transformer_2
    with pytest.warns(UserWarning, match="^transformer_2 of this") as told:
        case.run(num_inference_steps=12)
    assert len(told) == 1


def test_a_compiled_or_wrapped_transformer_is_not_taken_for_another(recwarn):
    peft = pytest.importorskip("peft")
    case = wan()
    accelerate(case.pipe, **PLAN)
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    case.pipe.transformer = peft.get_peft_model(case.pipe.transformer, config).eval()
    case.run()
    assert not [w for w in recwarn if "vidaccel" in str(w.message)]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": [0, 1, 4]},
        {"policy": "every 3"},
        {"policy": vidaccel.Plan((0, 3), 6)},
        {"policy": None, "cache": DBCache(0.1)},
        {"policy": "auto"},
    ],
    ids=str,
)
def test_warm_up_requests_pass(steps, options):
    case = wan()
    plain = case.run(num_inference_steps=steps)
    accelerate(case.pipe, **({"cache": None} | options))
    assert torch.equal(case.run(num_inference_steps=steps), plain)
    assert "few" in str(report(case.pipe))


def test_a_longer_run_still_has_to_fit_its_plan():
    case = wan()
    accelerate(case.pipe, policy=vidaccel.Plan((0, 3), 6), cache=None)
    with pytest.raises(PlanError, match="made for 6 steps, but this run has 4"):
        case.run(num_inference_steps=4)


# What is held.


def test_nothing_is_held_after_the_last_step():
    case = wan()
    accelerate(case.pipe, policy=[0, 4], cache=None, attention=None)
    engine = case.pipe.transformer._vidaccel_engine
    sampled(case.pipe, 0)
    assert engine.bytes_held == 0


def test_a_branch_that_ends_early_is_freed():
    case = wan()
    accelerate(case.pipe, policy=[0, 3], cache=None, attention=None)
    engine = case.pipe.transformer._vidaccel_engine
    pipe = case.pipe
    pipe.scheduler.set_timesteps(STEPS)
    held = []
    with torch.no_grad():
        for index, t in enumerate(pipe.scheduler.timesteps):
            for name in ("cond", "uncond") if index < 2 else ("cond",):
                call = {"hidden_states": noise(0), "timestep": t.expand(1)}
                prompt = embeds(len(name))
                called(pipe.transformer, name, **call, encoder_hidden_states=prompt)
            held.append(engine.bytes_held)
    one = held[0] // 2
    assert held == [2 * one, 2 * one, 2 * one, 2 * one, one, 0] or held[4] == one


def test_an_exception_frees_what_is_held():
    case = wan()
    accelerate(case.pipe, **PLAN)
    engine = case.pipe.transformer._vidaccel_engine
    case.pipe.scheduler.set_timesteps(STEPS)
    step(case.pipe, 0, noise(0), embeds(0), "cond")
    assert engine.bytes_held > 0
    with pytest.raises(RuntimeError):
        step(case.pipe, 1, noise(0), embeds(0, width=5), "cond")
    assert engine.bytes_held == 0


class Broken(Exception):
    """Ends a run from outside of the transformer."""


def broken(*args: Any, **kwargs: Any) -> Any:
    raise Broken


def in_a_callback(pipe: Any) -> dict[str, Any]:
    return {
        "callback_on_step_end": lambda pipe, index, *_: broken() if index == 2 else {},
    }


def in_the_scheduler(pipe: Any) -> dict[str, Any]:
    step, calls = pipe.scheduler.step, []

    def third(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        return broken() if len(calls) == 3 else step(*args, **kwargs)

    pipe.scheduler.step = third
    return {}


@pytest.mark.parametrize("bar", [True, False], ids=["with a bar", "without"])
@pytest.mark.parametrize("where", [in_a_callback, in_the_scheduler])
@pytest.mark.parametrize(
    "options",
    [PLAN, {"policy": None, "cache": DBCache(1e9, warmup_steps=1), "attention": None}],
    ids=["plan", "cache"],
)
def test_an_exception_outside_of_the_transformer_frees_what_is_held(options, where, bar):
    case = wan()
    accelerate(case.pipe, **options)
    expected = case.run()
    engine = case.pipe.transformer._vidaccel_engine
    case.pipe.set_progress_bar_config(disable=not bar)
    with pytest.raises(Broken) as raised:
        case.run(**where(case.pipe))
    # While the exception and all that its frames hold are still there.
    assert raised.value is not None and engine.bytes_held == 0
    assert all(not past._conditions for past in engine.trajectories.all())
    vars(case.pipe.scheduler).pop("step", None)
    assert torch.equal(case.run(), expected)


def test_one_broken_request_leaves_the_others_what_is_theirs():
    case = wan()
    first, second = case.pipe, sharing(case)
    for pipe in (first, second):
        accelerate(pipe, **PLAN)
    expected = sampled(second, 1)
    for pipe in (first, second):
        pipe.scheduler.set_timesteps(STEPS)
    x = noise(1)
    for index in range(STEPS):
        x = step(second, index, x, embeds(1), "cond")
        if index == 1:  # in the middle of the second, within a segment
            with pytest.raises(Broken):
                case.run(**in_a_callback(first))
    assert torch.equal(x, expected)


def test_bars_are_what_they_are_without(capsys):
    case = wan()
    plain = type(case.pipe.progress_bar(total=2))
    accelerate(case.pipe, **PLAN)
    case.pipe.set_progress_bar_config(desc="making")
    with case.pipe.progress_bar(total=2) as bar:
        bar.update()
    assert isinstance(bar, plain) and type(bar).__name__ == plain.__name__
    assert list(case.pipe.progress_bar([1, 2])) == [1, 2]
    assert "making" in capsys.readouterr().err
    restore(case.pipe)
    assert "progress_bar" not in vars(case.pipe)


def test_copies_of_a_pipeline_have_bars_of_their_own():
    case = wan()
    accelerate(case.pipe, **PLAN)
    shallow = copy.copy(case.pipe)
    case.pipe = None
    shallow.set_progress_bar_config(disable=True)
    assert list(shallow.progress_bar([1, 2])) == [1, 2]


def test_a_bar_of_the_users_own_comes_back():
    case = wan()
    made = []

    def own(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return type(case.pipe).progress_bar(case.pipe, *args, **kwargs)

    vars(case.pipe)["progress_bar"] = own
    accelerate(case.pipe, **PLAN)
    case.run()
    restore(case.pipe)
    assert made and vars(case.pipe)["progress_bar"] is own


def test_the_second_expert_has_a_warm_up_of_its_own():
    case = wan22()
    accelerate(case.pipe, policy=None, cache=DBCache(1e9, warmup_steps=2, max_consecutive=None))
    case.run(num_inference_steps=12)
    for part in report(case.pipe).transformers:
        assert part.timeline.startswith("CC") and "p" in part.timeline


def test_pndm_takes_no_repeated_time_for_a_branch():
    from tiny.others import latte

    case = latte()
    from diffusers import PNDMScheduler

    case.pipe.scheduler = PNDMScheduler(skip_prk_steps=True, prediction_type="epsilon")
    accelerate(case.pipe, policy="every 2", cache=None, attention=None)
    case.run()
    assert len(report(case.pipe).transformers[0].branches) == 1


def test_flux_in_bfloat16_runs():
    from tiny.images import flux

    case = flux()
    case.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    case.pipe.to(torch.bfloat16)
    kwargs = case.kwargs.items()
    case.kwargs = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in kwargs}
    accelerate(case.pipe, policy="every 3", cache=None)
    case.run(num_inference_steps=28)
    assert report(case.pipe).transformers[0].timeline == ("C--" * 10)[:28]
