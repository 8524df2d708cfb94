"""The bench of the kernels, as far as it goes without a GPU."""

import pytest
import torch

from vidaccel.bench import kernels as bench
from vidaccel.bench.gpu_device import Device
from vidaccel.bench.kernels import Shape, kernels, kernels_table
from vidaccel.errors import VidaccelError


def test_the_bench_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(VidaccelError, match="there is none here"):
        kernels()


@pytest.fixture
def small(monkeypatch):
    """Two small shapes on the CPU; the calls of what needs a GPU, in their order."""
    calls = []

    def check_sampled(q, k, v, config):
        calls.append(("check", tuple(q.shape), config.key_clusters, config.int8_qk))
        return {"output": {"error": 0.5, "limit": 1.0}}

    def dense_times(device, q, *rest):
        calls.append(("time", tuple(q.shape)))
        return {"dense": 1.0}

    def layer_times(*arguments):
        times = {"layer_ms": 1.0, "overhead_ms": 0.1, "density": 0.3}
        return {**times, "launches": 9, "scratch_bytes": 0, "int8_qk": arguments[4].int8_qk}

    shapes = {"One": Shape(2, 40, 16, 2, 3), "Two": Shape(1, 30, 16, 2, 4)}
    monkeypatch.setattr(bench, "SHAPES", shapes)
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "Device", lambda: Device("cpu"))
    monkeypatch.setattr(bench, "check", lambda dtype: {"kmeans": {"error": 0.0, "limit": 1.0}})
    monkeypatch.setattr(bench, "check_sampled", check_sampled)
    monkeypatch.setattr(bench, "dense_times", dense_times)
    monkeypatch.setattr(bench, "sparse_times", lambda *_: {})
    monkeypatch.setattr(bench, "layer_times", layer_times)
    return calls


def test_shapes_are_checked_without_being_timed(small):
    result = kernels(["Two"], timed=False, dtype=torch.float32)
    assert small == [("check", (1, 1, 30, 16), 4, False), ("check", (1, 1, 30, 16), 4, True)]
    checks = ["kmeans", "Two: output", "Two, scores in int8: output"]
    assert (list(result["checks"]), result["rows"], result["layers"]) == (checks, [], [])
    assert kernels_table(result) == "3 checks, all within their limits"


def test_every_shape_is_checked_before_one_is_timed(small):
    result = kernels(["One", "Two"], dtype=torch.float32)
    assert [call[0] for call in small] == ["check"] * 4 + ["time"] * 2
    assert len(result["layers"]) == 4 and "One" in kernels_table(result)


@pytest.mark.parametrize(("options", "timed"), [(["--check-only"], 0), ([], 1)], ids=str)
def test_the_command_takes_both_options(small, options, timed, capsys):
    from vidaccel.cli.main import main

    assert main(["bench", "kernels", "--shapes", "One", *options]) == 0
    assert {call[1] for call in small} == {(1, 2, 40, 16)}
    assert [call[0] for call in small].count("time") == timed
    assert "3 checks, all within" in capsys.readouterr().out
