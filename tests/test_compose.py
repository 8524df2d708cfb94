"""Acceleration together with what users do to a pipeline besides, in every order."""

from typing import Any

import pytest
import torch
from tiny.base import STEPS
from tiny.hunyuan import hunyuan
from tiny.wan import wan

from vidaccel import DBCache, Plan, accelerate, report, restore
from vidaccel.errors import PolicyError
from vidaccel.policy import CachePolicy

EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)
SETTINGS = {
    "plan": {"policy": Plan((0, 1, 4), STEPS), "cache": None},
    "cache": {"policy": None, "cache": EAGER},
}
KEPT = {"plan": "CC--C-", "cache": "CppCpp"}


def compiled(pipe: Any) -> None:
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(level: str, pipe: Any) -> None:
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=level, **options
    )


def block_offload(pipe: Any) -> None:
    group_offload("block_level", pipe)


def leaf_offload(pipe: Any) -> None:
    group_offload("leaf_level", pipe)


def adapted(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)


def tiled(pipe: Any) -> None:
    pipe.vae.enable_tiling()


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def equal_in_every_order(build: Any, name: str, actions: tuple[Any, ...]) -> None:
    """Each order of `actions` and `accelerate` gives the output of the first, and restores."""
    outputs = []
    plain = build()
    for action in actions:
        action(plain.pipe)
    baseline = plain.run()
    for place in range(len(actions) + 1):
        case = build()
        for action in actions[:place]:
            action(case.pipe)
        accelerate(case.pipe, **SETTINGS[name])
        for action in actions[place:]:
            action(case.pipe)
        # Twice, since some hooks are laid anew at the end of a generation.
        outputs += [case.run(), case.run()]
        shown = report(case.pipe).transformers[0]
        assert shown.timeline == KEPT[name]
        assert shown.bytes_held == 0 < shown.peak_bytes
        restore(case.pipe)
        torch.testing.assert_close(case.run(), baseline, rtol=0, atol=0)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0)
    assert not torch.equal(outputs[0], baseline)


SINGLE = [
    (compiled,),
    (model_offload,),
    (block_offload,),
    (leaf_offload,),
    (adapted,),
    (tiled,),
    (cast,),
]
# An adapter changes the modules of blocks: Diffusers wants it before both others.
COMBINED = [(adapted, compiled, model_offload), (adapted, model_offload, compiled)]


def _name(actions: Any) -> str:
    return "-".join(action.__name__ for action in actions)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
@pytest.mark.parametrize("actions", SINGLE, ids=_name)
def test_accelerate_commutes_with(actions, build, name):
    equal_in_every_order(build, name, actions)


@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
@pytest.mark.parametrize("actions", COMBINED, ids=_name)
def test_accelerate_stands_anywhere_among(actions, build):
    equal_in_every_order(build, "cache", actions)


@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
def test_nothing_is_compiled_twice(build):
    """Steps, plans, caches and generations share the graphs of the first generation."""
    case = build()
    accelerate(case.pipe, policy=None, cache=None)
    compiled(case.pipe)
    expected = case.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for settings in SETTINGS.values():
            accelerate(case.pipe, **settings)
            case.run()
            case.run(seed=1)
        restore(case.pipe)
        assert torch.equal(case.run(), expected)


# Callbacks and interruption.


def test_latents_that_a_callback_edits_are_those_that_go_on():
    def edit(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * 0.9} if step == 2 else kwargs

    case = wan()
    expected = case.run(callback_on_step_end=edit)
    accelerate(case.pipe, policy=None, cache=DBCache(threshold=0))
    assert torch.equal(case.run(callback_on_step_end=edit), expected)
    accelerate(case.pipe, **SETTINGS["cache"])
    assert not torch.equal(case.run(callback_on_step_end=edit), case.run())


# Adapters.


def test_active_adapters_are_told_of():
    case = wan()
    adapted(case.pipe)
    accelerate(case.pipe, **SETTINGS["plan"])
    case.run()
    assert "adapters were active (default)" in str(report(case.pipe))
    case.pipe.transformer.disable_adapters()
    case.run()
    assert not report(case.pipe).transformers[0].notes
    case.pipe.transformer.enable_adapters()
    case.pipe.transformer.delete_adapters("default")
    case.run()
    assert not report(case.pipe).transformers[0].notes


def test_a_policy_of_the_base_model_is_refused_for_a_few_step_adapter():
    case = wan()
    adapted(case.pipe)
    policy = CachePolicy.from_json(
        '{"schema_version": "1.0", "model": {"transformer": "WanTransformer3DModel"}, '
        '"num_inference_steps": 50, "plans": {"2": {"steps": [0, 2]}}, "provenance": "published"}'
    )
    accelerate(case.pipe, policy=policy)
    with pytest.raises(PolicyError, match="for 50, this run has 4 and the adapters default"):
        case.run(num_inference_steps=4)


def test_auto_reuses_nothing_in_a_few_step_run():
    for preset in ("quality", "balanced", "fast"):
        case = wan()
        baseline = case.run(num_inference_steps=4)
        accelerate(case.pipe, preset=preset)
        assert torch.equal(case.run(num_inference_steps=4), baseline)
        assert "few" in report(case.pipe).transformers[0].policy
