"""Low precision beside everything else: plans, caches, attention, compilation, offloading."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tiny import CASES
from tiny.base import STEPS, Case
from tiny.setups import (
    block_offload,
    compiled,
    leaf_offload,
    lora,
    model_offload,
    sequential_offload,
)
from tiny.wan import wan, wan_transformer
from vidaccel import SVG2, CachePolicy, DBCache, LowPrecision, Plan, accelerate, report, restore
from vidaccel.engine.engine import engine_of
from vidaccel.errors import PrecisionError
from vidaccel.plans.schema import ModelInfo, StoredPlan
from vidaccel.precision.linear import QuantisedLinear

Setup = Callable[[Any], None]
PLAN = Plan((0, 1, 4), STEPS)
CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)
SPARSE = SVG2(
    top_p=0.9, query_clusters=2, key_clusters=3, min_tokens=0, dense_steps=0, dense_layers=0
)
FOUR = LowPrecision(format="nvint4", sequence="haar", high_tokens=4)


def wide(**components: Any) -> Case:
    """Wan with channels for every format."""
    case = wan()
    case.pipe.transformer = wan_transformer(attention_head_dim=32, ffn_dim=64)
    return case


def lost(output: torch.Tensor, exact: torch.Tensor) -> float:
    return float((output - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("precision", "acceleration", "kept"),
    [
        ("int8", {"policy": PLAN}, "CC--C-"),
        ("int8", {"policy": None, "cache": CACHE}, "CppCpp"),
        ("int8", {"policy": None, "attention": SPARSE}, "CCCCCC"),
        (FOUR, {"policy": PLAN, "attention": SPARSE}, "CC--C-"),
    ],
    ids=["plan", "cache", "attention", "int4, plan and attention"],
)
def test_the_same_steps_are_reused_and_the_loss_is_that_of_the_precision(
    precision: Any, acceleration: dict[str, Any], kept: str
):
    case = wide()
    exact = case.run()
    accelerate(case.pipe, policy=None, precision=precision)
    alone = lost(case.run(), exact)
    accelerate(case.pipe, **acceleration)
    skipped = case.run()
    accelerate(case.pipe, precision=precision, **acceleration)
    both = case.run()
    assert report(case.pipe).transformers[0].timeline == kept
    assert 0 < lost(both, skipped) < 3 * alone
    restore(case.pipe)
    assert torch.equal(case.run(), exact)


def test_every_step_computed_is_the_output_of_the_precision_alone():
    """Plans and caches that skip nothing change no bit in low precision either."""
    case = wide()
    accelerate(case.pipe, policy=None, precision="int8")
    alone = case.run()
    accelerate(case.pipe, policy=None, cache=DBCache(threshold=0), precision="int8")
    assert torch.equal(case.run(), alone)


@pytest.mark.parametrize(
    "setup",
    [model_offload, block_offload, leaf_offload, sequential_offload, compiled, lora],
    ids=lambda setup: setup.__name__,
)
def test_setups_come_before_or_after_with_the_same_result(setup: Setup):
    outputs = []
    for first in (True, False):
        case = wide()
        exact = case.run()
        if first:
            setup(case.pipe)
        accelerate(case.pipe, policy=PLAN, precision="int8")
        if not first:
            setup(case.pipe)
        outputs.append(case.run())
        assert torch.equal(case.run(), outputs[-1])
        told = report(case.pipe).transformers[0].precision
        assert told is not None and told.layers == 30
        restore(case.pipe)
        # The layers themselves are back, under whatever was set up.
        assert not any(isinstance(m, QuantisedLinear) for m in case.pipe.transformer.modules())
        back = case.run()
        assert setup is lora or torch.equal(back, exact)
    assert torch.equal(*outputs)


def test_layers_that_are_compiled_already_are_compiled_once_more_and_no_further():
    case = wide()
    compiled(case.pipe)
    accelerate(case.pipe, policy=None, precision=FOUR)
    output = case.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(case.run(), output)


def test_both_experts_are_in_low_precision():
    case = CASES["wan22"]()
    for name in ("transformer", "transformer_2"):
        seed = int(name.endswith("2"))
        setattr(case.pipe, name, wan_transformer(seed=seed, attention_head_dim=32, ffn_dim=64))
    exact = case.run()
    accelerate(case.pipe, policy=None, precision="int8")
    assert 0 < lost(case.run(), exact) < 0.03
    assert [part.precision.layers for part in report(case.pipe).transformers] == [30, 30]
    restore(case.pipe)
    assert torch.equal(case.run(), exact)


def test_an_expert_that_fails_takes_the_other_back_with_it():
    case = CASES["wan22"]()
    for name in ("transformer", "transformer_2"):
        setattr(case.pipe, name, wan_transformer(attention_head_dim=32, ffn_dim=64))
    case.pipe.transformer_2.blocks[1].attn1.to_q.weight.data[0] = torch.nan
    modules = dict(case.pipe.transformer.named_modules())
    for keep in ("cpu", "drop"):
        with pytest.raises(PrecisionError, match="not finite"):
            accelerate(case.pipe, policy=None, precision=LowPrecision(keep_weights=keep))
        assert dict(case.pipe.transformer.named_modules()) == modules


def test_a_batch_is_its_parts():
    case = wide()
    accelerate(case.pipe, policy=PLAN, precision="int8")
    both = {name: torch.cat([case.kwargs[name], case.kwargs[name].flip(1)]) for name in
            ("prompt_embeds", "negative_prompt_embeds")}  # fmt: skip
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    together = case.run(generator=seeds, **both)
    for place in (0, 1):
        one = {name: value[place : place + 1] for name, value in both.items()}
        alone = case.run(place, **one)
        assert lost(alone, together[place : place + 1]) < 1e-3


def test_pipelines_that_came_in_quantised_are_refused():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    case = wide()
    quantization.quantize_(case.pipe.transformer.blocks, quantization.Int8WeightOnlyConfig())
    before = case.run()
    with pytest.raises(PrecisionError, match=r"is quantised already .* would be a second time"):
        accelerate(case.pipe, policy=None, precision="int8")
    assert torch.equal(case.run(), before)


@pytest.mark.parametrize("library", ["bitsandbytes", "gguf"])
def test_layers_of_other_quantisers_are_refused(library: str):
    pytest.importorskip(library, reason=f"{library} is not installed")
    case = wide()
    block = case.pipe.transformer.blocks[1]
    if library == "gguf":
        from diffusers.quantizers.gguf.utils import GGUFLinear

        block.attn1.to_q = GGUFLinear(64, 64)
    else:
        import bitsandbytes

        block.attn1.to_q = bitsandbytes.nn.Linear8bitLt(64, 64)
    with pytest.raises(PrecisionError, match=r"blocks\.1\.attn1\.to_q .* quantised already"):
        accelerate(case.pipe, policy=None, precision="int8")
    assert isinstance(block.attn1.to_k, nn.Linear)
    assert not isinstance(block.attn1.to_k, QuantisedLinear)


def test_every_family_runs_in_low_precision_and_comes_back(case: Case):
    """Without rotation: the channels of the tiny models are hardly whole groups."""
    exact = case.run()
    accelerate(case.pipe, policy=None, precision=LowPrecision(rotation=None))
    output = case.run()
    assert output.isfinite().all() and not torch.equal(output, exact)
    assert lost(output, exact) < 0.25
    restore(case.pipe)
    assert torch.equal(case.run(), exact)


def test_a_policy_tells_the_precision_that_it_was_measured_in():
    """And the report, where the run is in another one."""
    case = wide()
    accelerate(case.pipe, policy=PLAN, precision="int8")
    case.run()
    engine = engine_of(case.pipe.transformer)
    run = engine.generation.run
    assert run.precision == "LowPrecision(format='int8')"
    assert ModelInfo.of(run).precision == run.precision
    plain = replace(run, precision=None)
    stored = CachePolicy(
        schema_version="1.3",
        model=ModelInfo.of(plain),
        num_inference_steps=STEPS,
        plans={"3": StoredPlan(steps=(0, 1, 4))},
        provenance="measured",
        versions={},
    )
    assert "precision" not in stored.to_json()
    assert stored.doubt(plain) == ""
    told = stored.doubt(run)
    assert told == f"measured in full precision, and this run is in {run.precision}"
    again = stored.model_copy(update={"model": ModelInfo.of(run)})
    assert CachePolicy.from_json(again.to_json()).doubt(run) == ""
    accelerate(case.pipe, policy=stored, precision="int8")
    case.run()
    assert told in report(case.pipe).transformers[0].policy
