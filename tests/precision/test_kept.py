"""Weights that wait: the same bits come back, and nothing stays on the disk."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.errors import PrecisionError
from vidaccel.precision.kept import WeightKeeper

CPU = torch.device("cpu")


def parameter(dtype: torch.dtype, seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype))


@pytest.mark.parametrize("keep", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_come_back_into_the_same_parameters(keep: Any, dtype: torch.dtype):
    weights = [parameter(dtype, seed) for seed in range(3)]
    exact = [weight.detach().clone() for weight in weights]
    keeper = WeightKeeper(keep)
    for weight in weights:
        keeper.put_away(weight)
    assert keeper.bytes_held == sum(weight.nbytes for weight in exact)
    assert all(torch.equal(*pair) for pair in zip(weights, exact, strict=True))
    keeper.settle()
    for weight in weights:
        keeper.give_back(weight, CPU, dtype)
    assert all(torch.equal(*pair) for pair in zip(weights, exact, strict=True))
    assert keeper.bytes_held == 0


def test_a_file_of_weights_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keeper = WeightKeeper("disk")
    keeper.put_away(parameter(torch.float32))
    assert os.listdir(tmp_path) == []  # what kills the process now leaves nothing


def test_a_disk_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch):
    class Full:
        def seek(self, *place: int) -> int:
            return 0

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    weight = parameter(torch.float32)
    exact = weight.detach().clone()
    with pytest.raises(PrecisionError, match="No space left on device; set TMPDIR"):
        WeightKeeper("disk").put_away(weight)
    assert torch.equal(weight, exact)


def test_weights_are_dropped_only_when_nothing_can_fail_any_more():
    keeper, weight = WeightKeeper("drop"), parameter(torch.float32)
    exact = weight.detach().clone()
    keeper.put_away(weight)
    keeper.give_back(weight, CPU, torch.float32)
    assert torch.equal(weight, exact) and not keeper.gone
    keeper.settle()
    assert keeper.gone and weight.numel() == 0
    with pytest.raises(PrecisionError, match="load the pipeline again"):
        keeper.give_back(weight, CPU, torch.float32)
