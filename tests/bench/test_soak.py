"""Many generations in one process: memory, and outputs of equal requests."""

import mmap
import sys
from typing import Any

import pytest
import torch

from tiny.wan import wan
from vidaccel import DBCache
from vidaccel.bench.soak import Request, growth, soak
from vidaccel.errors import BenchError

CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, forecast_order=1)
ACCELERATIONS: list[dict[str, Any]] = [
    {"policy": "every 3", "cache": None},
    {"policy": None, "cache": CACHE},
]


def requests() -> list[Request]:
    kwargs = {k: v for k, v in wan().kwargs.items() if k != "num_inference_steps"}
    return [
        Request({**kwargs, "num_inference_steps": steps}, seed, options)
        for options in ACCELERATIONS
        for seed, steps in enumerate((2, 3))
    ]


def test_a_short_soak_is_flat_and_repeats_itself():
    result = soak(wan().pipe, requests(), 30, progress=False)
    assert result.outputs_equal
    assert [request.distinct_outputs for request in result.requests] == [1] * 4
    assert sum(request.served for request in result.requests) == 30
    assert result.requests[1].timeline == "C--"
    assert result.bytes_held_after == 0 and result.peak_bytes > 0
    assert len(result.rss_mib) == 30 and result.growth_mib < 16
    assert torch.__version__.startswith(result.environment["packages"]["torch"])


def test_a_soak_sees_a_leak_and_a_difference():
    """Its two findings can fail: a pipeline that keeps memory and draws noise of its own."""
    pipe = wan().pipe
    kept: list[mmap.mmap] = []

    def leak(module: Any, args: Any, output: Any) -> Any:
        # Pages of its own: what the heap hands out may lie in pages that earlier tests left behind.
        kept.append(mmap.mmap(-1, 2**20))
        kept[-1].write(b"x" * 2**20)
        return output + torch.randn_like(output)

    pipe.transformer.proj_out.register_forward_hook(leak)
    result = soak(pipe, requests(), 8, progress=False)
    assert not result.outputs_equal
    assert result.growth_mib > 4
    assert "_vidaccel_engine" not in vars(pipe.transformer)


def test_a_soak_without_psutil_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(BenchError, match=r'pip install "vidaccel\[bench\]"'):
        soak(wan().pipe, requests(), 8, progress=False)


def test_growth_is_that_of_a_leak_and_not_of_one_allocation():
    assert growth([900, 900, *[100 + i for i in range(40)]], warm_up=2) == 30
    assert growth([50, 100, 100, 100, 500, 100, 100, 100, 100], warm_up=1) == 0
