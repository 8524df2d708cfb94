"""The bench of the kernels, as far as it goes without a GPU."""

import pytest

from vidaccel.bench.kernels import kernels
from vidaccel.errors import VidaccelError


def test_the_bench_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(VidaccelError, match="there is none here"):
        kernels()
