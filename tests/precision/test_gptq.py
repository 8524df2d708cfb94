"""Rounding that knows the activations: a smaller error of the product than rounding to nearest."""

import pytest
import torch

from vidaccel.precision.formats import FORMATS, dequantise, quantise
from vidaccel.precision.gptq import quantise_weight


def layer(channels: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations whose channels depend on each other, and weights."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(channels, channels, generator=generator)
    x = torch.randn(512, channels // 4, generator=generator) @ mixed[: channels // 4]
    return x, torch.randn(48, channels, generator=generator)


def moments(x: torch.Tensor, size: int) -> torch.Tensor:
    groups = x.reshape(len(x), -1, size).transpose(0, 1).double()
    return groups.mT @ groups / len(x)


@pytest.mark.parametrize("name", ["int8", "nvint4", "mxint4", "mxfp4"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_product_is_closer_than_that_of_nearest_weights(name: str, size: int):
    (x, weight), form = layer(), FORMATS[name]
    found = quantise_weight(weight, form, moments(x, size))
    plain = quantise(weight, form)
    assert found.codes.shape == plain.codes.shape and found.codes.dtype == plain.codes.dtype
    assert found.scales.shape == plain.scales.shape
    assert found.codes.float().abs().max() <= form.largest
    lost = [(x @ (dequantise(held) - weight).mT).norm() for held in (found, plain)]
    assert lost[0] < 0.9 * lost[1]


def test_without_correlations_it_is_rounding_to_nearest():
    _, weight = layer()
    form = FORMATS["int8"]
    found = quantise_weight(weight, form, torch.eye(64, dtype=torch.float64)[None])
    assert torch.equal(found.codes, quantise(weight, form).codes)
