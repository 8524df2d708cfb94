"""Quantised transformers: their blocks are run or not as those of any other."""

import json
from typing import Any

import pytest
import torch
from tiny.base import STEPS, Case
from tiny.wan import wan, wan_transformer

from vidaccel import DBCache, Plan, accelerate, report, restore

CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)
QUANTISED = ("to_q", "to_k", "to_v", "0.proj", "net.2")


def small() -> Case:
    """Widths that are whole blocks of 32, which the formats ask for."""
    case = wan()
    case.pipe.transformer = wan_transformer(attention_head_dim=16)
    return case


def gguf(model: torch.nn.Module) -> None:
    quants = pytest.importorskip("gguf", reason="gguf is not installed").quants
    import gguf as package
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    kind = package.GGMLQuantizationType.Q8_0
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            data = torch.from_numpy(quants.quantize(tensor.numpy(), kind))
            state[name] = GGUFParameter(data, quant_type=kind)
    _replace_with_gguf_linear(model, torch.float32, state)
    for name, module in model.named_modules():
        if type(module).__name__ == "GGUFLinear":
            module.weight = state[f"{name}.weight"]
            module.bias = torch.nn.Parameter(state[f"{name}.bias"], requires_grad=False)


def torchao(config: str, model: torch.nn.Module) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed, or not for this torch"
    )
    quantization.quantize_(
        model, getattr(quantization, config)(), lambda module, name: name.endswith(QUANTISED)
    )


def int8(model: torch.nn.Module) -> None:
    torchao("Int8WeightOnlyConfig", model)


def float8(model: torch.nn.Module) -> None:
    torchao("Float8WeightOnlyConfig", model)


def bitsandbytes(model: torch.nn.Module) -> None:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    for block in model.blocks:
        for module in block.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    new = layers.Linear4bit(
                        child.in_features, child.out_features, compute_dtype=torch.float32
                    )
                    new.load_state_dict(child.state_dict())
                    setattr(module, name, new.to("cpu"))


@pytest.mark.parametrize("quantise", [gguf, int8, float8, bitsandbytes], ids=lambda f: f.__name__)
def test_quantised_weights_change_nothing_but_the_weights(quantise: Any):
    exact, first, last = small(), small(), small()
    outputs = exact.run()
    quantise(first.pipe.transformer)
    baseline = first.run()
    assert not torch.equal(baseline, outputs)
    # Every step computed: the output of the quantised model itself.
    accelerate(first.pipe, policy=None, cache=DBCache(threshold=0))
    assert torch.equal(first.run(), baseline)
    for settings, kept in (
        ({"policy": Plan((0, 1, 4), STEPS), "cache": None}, "CC--C-"),
        ({"policy": None, "cache": CACHE}, "CppCpp"),
    ):
        accelerate(first.pipe, **settings)
        reused = first.run()
        assert report(first.pipe).transformers[0].timeline == kept
        accelerate(exact.pipe, **settings)
        # As far from the model in full precision as its weights are.
        away = (reused - exact.run()).abs().mean()
        assert 0 < away < 5 * (baseline - outputs).abs().mean() + 1e-3
    accelerate(last.pipe, policy=None, cache=CACHE)
    quantise(last.pipe.transformer)
    assert torch.equal(last.run(), reused)
    json.dumps(report(last.pipe).to_dict())
    restore(first.pipe)
    assert torch.equal(first.run(), baseline)
