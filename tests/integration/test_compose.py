"""Acceleration together with what users do to a pipeline besides, in every order."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tiny.base import STEPS
from tiny.hunyuan import hunyuan
from tiny.setups import (
    block_offload,
    casting,
    compiled,
    leaf_offload,
    lora,
    model_offload,
    tiling,
)
from tiny.wan import wan
from vidaccel import DBCache, Plan, accelerate, report, restore
from vidaccel.errors import PolicyError
from vidaccel.plans.policy import CachePolicy

EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)
SETTINGS = {
    "plan": {"policy": Plan((0, 1, 4), STEPS), "cache": None},
    "cache": {"policy": None, "cache": EAGER},
}
KEPT = {"plan": "CC--C-", "cache": "CppCpp"}


@dataclass
class Orders:
    """What each place of `accelerate` among some actions gives.

    Attributes:
        plain: the output with the actions alone.
        accelerated: two generations per place, since some hooks are laid anew at the end of one.
        restored: the output after `restore`, one per place.
        timelines, bytes_held, peak_bytes: of the reports.
    """

    plain: torch.Tensor
    accelerated: list[torch.Tensor] = field(default_factory=list)
    restored: list[torch.Tensor] = field(default_factory=list)
    timelines: set[str] = field(default_factory=set)
    bytes_held: set[int] = field(default_factory=set)
    peak_bytes: list[int] = field(default_factory=list)


def in_every_order(build: Any, name: str, actions: tuple[Any, ...]) -> Orders:
    """Run a pipeline with `accelerate` in every place among `actions`."""
    plain = build()
    for action in actions:
        action(plain.pipe)
    orders = Orders(plain.run())
    for place in range(len(actions) + 1):
        case = build()
        for action in actions[:place]:
            action(case.pipe)
        accelerate(case.pipe, **SETTINGS[name])
        for action in actions[place:]:
            action(case.pipe)
        orders.accelerated += [case.run(), case.run()]
        shown = report(case.pipe).transformers[0]
        orders.timelines.add(shown.timeline)
        orders.bytes_held.add(shown.bytes_held)
        orders.peak_bytes.append(shown.peak_bytes)
        restore(case.pipe)
        orders.restored.append(case.run())
    return orders


SINGLE = [
    (compiled,),
    (model_offload,),
    (block_offload,),
    (leaf_offload,),
    (lora,),
    (tiling,),
    (casting,),
]
# An adapter changes the modules of blocks: Diffusers wants it before both others.
COMBINED = [(lora, compiled, model_offload), (lora, model_offload, compiled)]


def _name(actions: Any) -> str:
    return "-".join(action.__name__ for action in actions)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
@pytest.mark.parametrize("actions", SINGLE, ids=_name)
def test_accelerate_commutes_with(actions, build, name):
    orders = in_every_order(build, name, actions)
    first, *others = orders.accelerated
    assert not torch.equal(first, orders.plain)
    assert all(torch.equal(other, first) for other in others)
    assert all(torch.equal(restored, orders.plain) for restored in orders.restored)
    assert orders.timelines == {KEPT[name]}
    assert orders.bytes_held == {0} and all(orders.peak_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
@pytest.mark.parametrize("actions", COMBINED, ids=_name)
def test_accelerate_stands_anywhere_among(actions, build):
    orders = in_every_order(build, "cache", actions)
    first, *others = orders.accelerated
    assert not torch.equal(first, orders.plain)
    assert all(torch.equal(other, first) for other in others)
    assert all(torch.equal(restored, orders.plain) for restored in orders.restored)
    assert orders.timelines == {KEPT["cache"]}
    assert orders.bytes_held == {0} and all(orders.peak_bytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_streams_of_group_offload_need_a_gpu_and_diffusers_says_so():
    case = wan()
    plain = case.run()
    accelerate(case.pipe, policy=None, cache=None)
    with pytest.raises(ValueError, match=r"(?i)stream"):
        case.pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
    assert torch.equal(case.run(), plain)


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
    lora(case.pipe)
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
    lora(case.pipe)
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
