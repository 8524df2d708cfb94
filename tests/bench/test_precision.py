"""The bench of low precision: what it measures, against what, and how it goes on."""

import copy
import json
import math
from typing import Any

import pytest
import torch

from tiny import STEPS, embeds
from tiny.wan import wan, wan_transformer
from vidaccel.api import engines_of
from vidaccel.bench import precision as bench
from vidaccel.bench.precision import calibrate_into, precision, precision_table
from vidaccel.bench.precision_cases import (
    PrecisionCase,
    best,
    calibration_file,
    cases,
    grid,
    together,
    torchao,
)
from vidaccel.bench.precision_crossover import PAIRS, crossover, gaussian_blocks
from vidaccel.bench.precision_figures import draw_crossover, draw_precision
from vidaccel.bench.precision_layers import sensitivity, sensitivity_table
from vidaccel.errors import BenchError, MetricUnavailable
from vidaccel.precision.settings import PRESETS, LowPrecision

PROMPTS = ["a", "bb"]
CALL = {"height": 16, "width": 16, "num_frames": 9}


@pytest.fixture
def pipe() -> Any:
    """A pipeline whose prompts are taken from a table, since it has no text encoder."""
    case = wan()
    case.pipe.transformer = wan_transformer(attention_head_dim=32, ffn_dim=64)
    case.pipe.encode_prompt = lambda prompt, *_, **__: (embeds(len(prompt)), embeds(99))
    return case.pipe


@pytest.fixture(autouse=True)
def without_vmaf(monkeypatch):
    """It starts a program for each clip."""

    def missing(*_: Any) -> float:
        raise MetricUnavailable("not here")

    monkeypatch.setattr(bench, "vmaf", missing)


def fail(transformer: Any) -> None:
    raise RuntimeError("no such chip\nand more")


def test_points_are_means_over_prompts_and_a_stopped_run_goes_on(pipe, tmp_path, monkeypatch):
    plain = copy.deepcopy(pipe.transformer.state_dict())
    measured = cases([LowPrecision(), next(one for one in best() if one.gptq)], tmp_path)
    calibrate_into(pipe, CALL, ["ccc"], tmp_path, measured)
    assert calibration_file(tmp_path, 16).exists() and not calibration_file(tmp_path, 64).exists()
    foreign = PrecisionCase("other", {}, foreign=fail)
    options = {"prompts": PROMPTS, "steps": (2, 3), "progress": False}
    result = precision(pipe, CALL, [*measured, foreign], workdir=tmp_path / "clips", **options)
    assert not engines_of(pipe)
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    points = {(point.name, point.steps): point for point in result.points}
    assert len(points) == 6
    for steps in (2, 3):
        eight, four = (points[case.name, steps] for case in measured)
        assert math.isclose(eight.psnr, sum(eight.psnr_of_prompts) / 2)
        assert eight.psnr_of_worst_prompt == min(eight.psnr_of_prompts)
        assert eight.psnr > four.psnr and eight.vmaf is None
        assert eight.bytes_before == 30 * 64 * 64 * 4 > 3 * eight.bytes_after
        assert points["other", steps].failed == "RuntimeError: no such chip"
    assert "failed: RuntimeError: no such chip" in precision_table(result)
    json.dumps(result.to_dict())

    def measured_before(*_: Any, **__: Any) -> None:
        raise AssertionError("this clip is measured already")

    monkeypatch.setattr(bench, "generate", measured_before)
    again = precision(pipe, CALL, [*measured, foreign], workdir=tmp_path / "clips", **options)
    assert again.points == result.points
    pytest.importorskip("matplotlib")
    draw_precision(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_cases_have_names_of_their_own():
    from pathlib import Path

    found = cases([*PRESETS.values(), *best(), *grid()], Path())
    plans = {"half": {"policy": "every 2"}}
    found += together(plans, {"int8": "int8"})
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert len(grid()) == 8 * 4 * 2
    assert len(together(plans, {"int8": "int8"})) == 3 + 8


def test_another_library_gets_a_copy(pipe):
    pytest.importorskip("torchao", reason="torchao is not installed")
    transformer = pipe.transformer
    weight = transformer.blocks[0].attn1.to_q.weight
    with torchao()[0].enabled(pipe):
        assert pipe.transformer is not transformer
        assert type(pipe.transformer.blocks[0].attn1.to_q.weight) is not type(weight)
    assert pipe.transformer is transformer
    assert transformer.blocks[0].attn1.to_q.weight is weight


@pytest.mark.parametrize("empty", ["cases", "prompts", "steps"])
def test_nothing_to_measure_is_refused(pipe, empty):
    options = {"cases": cases([LowPrecision()], None), "prompts": PROMPTS, "steps": (2,)}
    options[empty] = []
    with pytest.raises(BenchError, match="needs a case, a prompt and a number of steps"):
        precision(pipe, CALL, options.pop("cases"), **options)


def test_layers_are_told_by_their_sensitivity(pipe, tmp_path):
    call = {**CALL, "num_inference_steps": 2}
    low = (LowPrecision(format="nvint4"),)
    result = sensitivity(pipe, call, ["a"], tmp_path / "s.safetensors", low)
    layers = result["layers"]["transformer"]["nvint4"]
    assert len(layers) == 30 and all(0 < error < 1 for error in layers.values())
    worst = max(layers, key=layers.__getitem__)
    assert worst in sensitivity_table(result, most=1)
    json.dumps(result)
    assert STEPS  # the pipelines are those of all tests


def test_integers_fall_behind_where_the_paper_says(tmp_path):
    result = crossover(blocks=1024)
    for pair, (_, _, published) in PAIRS.items():
        even = result.even_at[pair]
        assert even is not None and abs(even - published) < 0.15 * published
    pytest.importorskip("matplotlib")
    draw_crossover(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_blocks_have_the_crest_factor_that_is_asked_for():
    x = gaussian_blocks(256, 32, 3.0, 0)
    assert x is not None
    crest = x.abs().amax(1) / x.square().mean(1).sqrt()
    assert torch.allclose(crest, torch.full_like(crest, 3.0), rtol=1e-5)
    assert gaussian_blocks(256, 256, 1.2, 0) is None
