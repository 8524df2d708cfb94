"""Calibrations: made of a generation, kept in a file, held against the model they are used on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tiny.base import Case
from vidaccel import LowPrecision, accelerate, calibrate_precision, report, restore
from vidaccel.errors import OutputError, PrecisionError
from vidaccel.precision.calibration import Calibration


def made(case: Case, path: str = "made.safetensors", **options: Any) -> Calibration:
    return calibrate_precision(case.pipe, [None], path, **({**case.kwargs} | options))


@pytest.fixture
def short(wide: Case) -> Case:
    wide.kwargs["num_inference_steps"] = 2
    return wide


def test_layers_of_one_input_share_a_rotation(short: Case):
    exact = short.run()
    found = made(short, rotations=("wush", "dart"), moments=True)
    leaders = found.leaders["transformer"]
    assert leaders["blocks.0.attn1.to_k"] == leaders["blocks.0.attn1.to_v"]
    assert leaders["blocks.0.attn1.to_v"] == "blocks.0.attn1.to_q"
    assert leaders["blocks.0.attn2.to_v"] == "blocks.0.attn2.to_k"
    assert leaders["blocks.0.attn2.to_q"] == "blocks.0.attn2.to_q"
    assert len(leaders) == 30 and len(set(leaders.values())) == 3 * 7
    assert found.tensors["transformer/blocks.0.attn1.to_q/wush"].shape == (4, 16, 16)
    assert found.tensors["transformer/blocks.0.attn1.to_q/dart"].shape == (16, 16)
    assert found.tensors["transformer/blocks.0.attn1.to_q/moment"].shape == (1, 64, 64)
    assert torch.equal(short.run(), exact)  # left as it was
    again = Calibration.load("made.safetensors")
    assert again.leaders == found.leaders and again.made == found.made
    assert all(torch.equal(again.tensors[name], x) for name, x in found.tensors.items())


def test_the_moment_of_an_input_is_its_mean(short: Case):
    seen: list[torch.Tensor] = []
    layer = short.pipe.transformer.blocks[1].ffn.net[2]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    found = made(short, rotations=(), moments=True)
    handle.remove()
    x = torch.cat(seen).double()
    moment = found.tensors["transformer/blocks.1.ffn.net.2/moment"][0].double()
    assert torch.allclose(moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_calibrated_settings_run_and_come_back(short: Case):
    made(short, rotations=("wush", "dart"), moments=True)
    exact = short.run()
    losses = {}
    for rotation in ("hadamard", "wush", "dart"):
        for gptq in (False, True):
            low = LowPrecision(
                format="nvint4",
                rotation=rotation,  # type: ignore[arg-type]
                gptq=gptq,
                calibration="made.safetensors",
            )
            accelerate(short.pipe, policy=None, precision=low)
            losses[rotation, gptq] = float((short.run() - exact).norm() / exact.norm())
            restore(short.pipe)
            assert torch.equal(short.run(), exact)
    assert all(0 < loss < 0.3 for loss in losses.values())
    assert losses["hadamard", True] < losses["hadamard", False]


def test_sensitive_layers_are_left_alone(short: Case):
    short.pipe.transformer.blocks[1].ffn.net[2].weight.data *= 30  # most of the output
    found = made(short, rotations=(), sensitivity=[LowPrecision(format="nvint4")])
    known = found.sensitivity["transformer"]["nvint4"]
    largest = max(known, key=known.__getitem__)
    assert largest.startswith("blocks.1.ffn.net.")
    bound = sorted(known.values())[-2] * 1.01
    low = LowPrecision(format="nvint4", max_error=bound, calibration="made.safetensors")
    accelerate(short.pipe, policy=None, precision=low)
    told = report(short.pipe).transformers[0].precision
    assert told is not None
    assert told.left_alone == {f"skipped ({largest}.)": 1} and told.layers == 29


def test_what_cannot_be_calibrated_is_refused(short: Case, tmp_path: Path):
    with pytest.raises(PrecisionError, match="needs a prompt"):
        calibrate_precision(short.pipe, [], "x.safetensors")
    with pytest.raises(PrecisionError, match="group is one of 256, 64, 16, 4, found 32"):
        made(short, group=32)
    with pytest.raises(PrecisionError, match="64 channels, which are no whole groups of 256"):
        made(short, group=256)
    with pytest.raises(PrecisionError, match="'dart' and 'wush', found 'hadamard'"):
        made(short, rotations=("hadamard",))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        made(short, path="file/x.safetensors")
    accelerate(short.pipe, policy=None)
    with pytest.raises(PrecisionError, match=r"restore\(pipe\) before a calibration"):
        made(short)


def test_activations_that_are_not_finite_are_refused(short: Case):
    short.pipe.transformer.blocks[1].ffn.net[0].proj.bias.data[0] = torch.inf
    with pytest.raises(PrecisionError, match="was given numbers that are not finite"):
        made(short)
    assert not short.pipe.transformer.blocks[0].attn1.to_q._forward_pre_hooks


def test_an_empty_calibration_is_refused(short: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(short.pipe), "__call__", lambda *_, **__: None)
    with pytest.raises(PrecisionError, match="the calibration is empty"):
        made(short)


def test_files_that_are_no_calibration_are_refused(short: Case, tmp_path: Path):
    def use(path: str, **options: Any) -> None:
        low = LowPrecision(**({"rotation": "wush", "calibration": path} | options))
        accelerate(short.pipe, policy=None, precision=low)

    with pytest.raises(PrecisionError, match="there is no calibration nowhere"):
        use("nowhere.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PrecisionError, match="text is no calibration"):
        use("text")
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(PrecisionError, match=r"other\.safetensors is no calibration"):
        use("other.safetensors")
    save_file({"x": torch.zeros(1)}, "newer.safetensors", {"vidaccel": '{"schema": 2}'})
    with pytest.raises(PrecisionError, match="has schema 2, this vidaccel reads 1"):
        use("newer.safetensors")
    found = made(short)
    with pytest.raises(PrecisionError, match=r"no moment of .* moments=True"):
        use("made.safetensors", rotation="hadamard", gptq=True)
    with pytest.raises(PrecisionError, match="no dart of"):
        use("made.safetensors", rotation="dart")
    Calibration({"transformer": "Other"}, {}, found.tensors).save("foreign.safetensors")
    with pytest.raises(PrecisionError, match=r"is of transformer \(Other\), and this pipeline has"):
        use("foreign.safetensors")
    wrong = {name: torch.zeros(3, 16, 16) for name in found.tensors}
    Calibration(found.transformers, found.leaders, wrong).save("wrong.safetensors")
    with pytest.raises(PrecisionError, match="which has 64 channels: it is of another model"):
        use("wrong.safetensors")
