"""A layer in low precision, and a pipeline whose channels are whole groups and blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tiny.base import Case
from tiny.wan import wan, wan_transformer
from vidaccel.precision.formats import FORMATS, quantise
from vidaccel.precision.kept import WeightKeeper
from vidaccel.precision.linear import QuantisedLinear
from vidaccel.precision.rotations import RotationPair, hadamard, rotated
from vidaccel.precision.settings import LowPrecision

Make = Callable[..., QuantisedLinear]


@pytest.fixture
def wide() -> Case:
    """Wan with 64 channels, so that every format and group of up to 64 fits."""
    case = wan()
    case.pipe.transformer = wan_transformer(attention_head_dim=32, ffn_dim=64)
    return case


@pytest.fixture
def make() -> Make:
    """Puts a layer of 64 channels into low precision, of which nothing but settings is told."""

    def layer(
        stock: nn.Linear | None = None,
        pair: RotationPair | None = None,
        tokens: Any = None,
        **settings: Any,
    ) -> QuantisedLinear:
        torch.manual_seed(0)
        stock = nn.Linear(64, 48) if stock is None else stock
        low = LowPrecision(**settings)
        if pair is None and low.rotation == "hadamard":
            pair = RotationPair(hadamard(16), hadamard(16))
        weight = stock.weight.detach().float()
        if pair is not None:
            weight = rotated(weight, pair.weights)
        held = quantise(weight, FORMATS[low.format])
        return QuantisedLinear(stock, low, held, pair, tokens, WeightKeeper(low.keep_weights))

    return layer
