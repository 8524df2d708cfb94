"""The layers of the blocks: found, refused, or left alone for a reason."""

import pytest
import torch
from torch import nn

from tiny.base import Case
from tiny.setups import lora
from vidaccel.errors import PrecisionError
from vidaccel.hosts.registry import find_transformers
from vidaccel.hosts.spec import BlockList, HostSpec
from vidaccel.precision.layers import Layer, linear_layers, why_left_alone


def names(case: Case) -> list[str]:
    transformer, host = find_transformers(case.pipe)["transformer"]
    return [layer.name for layer in linear_layers(transformer, host)]


def test_all_linear_layers_of_the_blocks_are_found_and_no_others(wide: Case):
    inside = [
        name
        for name, module in wide.pipe.transformer.named_modules()
        if type(module) is nn.Linear and name.startswith("blocks.")
    ]
    assert names(wide) == inside and len(inside) == 30


def test_adapters_are_no_layers_and_what_they_are_on_is(wide: Case):
    before = names(wide)
    lora(wide.pipe)
    after = names(wide)
    assert after == before
    transformer, host = find_transformers(wide.pipe)["transformer"]
    assert {type(layer.module) for layer in linear_layers(transformer, host)} == {nn.Linear}


def test_a_model_without_linear_layers_is_refused():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Conv2d(1, 1, 1)])
    host = HostSpec("Convolutions", (), blocks=(BlockList("blocks"),))
    with pytest.raises(PrecisionError, match="no linear layers in its blocks"):
        linear_layers(model, host)


def test_weights_that_are_no_plain_numbers_are_refused(wide: Case):
    layer = wide.pipe.transformer.blocks[1].attn1.to_q
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(PrecisionError, match=r"blocks\.1\.attn1\.to_q .*float8_e4m3fn: low prec"):
        names(wide)


def test_a_quantised_layer_is_refused_by_its_class(wide: Case):
    class Int4Linear(nn.Linear):
        pass

    wide.pipe.transformer.blocks[0].attn1.to_k = Int4Linear(64, 64)
    with pytest.raises(PrecisionError, match=r"is quantised already \(Int4Linear\)"):
        names(wide)


def test_reasons_to_leave_a_layer_alone():
    layer = Layer("blocks.1.ffn.net.2", nn.Module(), "2", nn.Linear(48, 8))
    assert why_left_alone(layer, (), None, False) == ""
    assert why_left_alone(layer, ("ffn.net.2.",), None, False) == "skipped (ffn.net.2.)"
    assert why_left_alone(layer, ("blocks.10.",), 16, True) == ""
    assert why_left_alone(layer, (), 32, False) == "48 channels are no whole blocks of 32"
    odd = Layer("blocks.1.proj", nn.Module(), "proj", nn.Linear(7, 8))
    assert "7 channels" in why_left_alone(odd, (), None, True)
