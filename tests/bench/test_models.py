"""The bench of whole models, on one small enough for a CPU."""

import json
from dataclasses import replace

import pytest
import torch

from vidaccel.bench import models
from vidaccel.bench.models import MODELS, RealModel, speed, speed_table
from vidaccel.cli import main as cli
from vidaccel.errors import BenchError
from vidaccel.svg2.settings import SVG2

SMALL = RealModel(
    64,
    64,
    frames=9,
    transformer={
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "ffn_dim": 64,
        "num_layers": 4,
        "text_dim": 32,
        "freq_dim": 32,
    },
    vae={"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    text_tokens=8,
    steps=12,
)
SPARSE = SVG2(min_tokens=0, query_clusters=4, key_clusters=8, dense_layers=0)


@pytest.fixture(scope="module")
def result():
    return speed(SMALL, steps=6, device="cpu", dtype=torch.float32, attention=SPARSE, rounds=2)


def test_every_combination_is_timed(result):
    rows = result.methods
    assert {name: row.steps_computed for name, row in rows.items()} == {
        "plain": 6,
        "plan": 2,
        "DBCache F1B0": 2,
        "SVG2": 6,
        "plan + DBCache": 2,
        "plan + SVG2": 2,
        "DBCache + SVG2": 2,
        "all three": 2,
    }
    for name, row in rows.items():
        assert (row.density is not None) == ("SVG2" in name or name == "all three"), name
        assert 0 < row.denoising_seconds <= row.seconds
        assert row.speedup == rows["plain"].seconds / row.seconds
        assert row.peak_bytes is None
    written = json.loads(json.dumps(result.to_dict()))
    assert written["methods"]["plain"]["steps_computed"] == 6


def test_fewer_steps_are_extrapolated_and_said_to_be(result):
    for row in result.methods.values():
        decoding = row.seconds - row.denoising_seconds
        expected = 2 * row.denoising_seconds + decoding
        assert row.extrapolated_seconds == pytest.approx(expected)
    table = speed_table(result)
    assert "extrapolated from 6 to 12 steps" in table
    assert "weights are random: seconds, not quality" in table
    whole = replace(result, settings={**result.settings, "steps_measured": 12})
    assert "extrapolated" not in speed_table(whole)


def test_models_have_their_published_sizes():
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    billions = {}
    for name, model in MODELS.items():
        with init_empty_weights():
            transformer = WanTransformer3DModel(**model.transformer)
        billions[name] = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert billions["Wan2.1-T2V-1.3B 480p"] == pytest.approx(1.42, abs=0.01)
    assert billions["Wan2.1-T2V-14B 720p"] == pytest.approx(14.29, abs=0.01)


def test_what_cannot_be_run_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(BenchError, match="found 5, expected 6 or more"):
        speed(SMALL, steps=5, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = []
    monkeypatch.setattr(models, "pipeline_of_model", lambda *_: made.append(1))
    out = tmp_path / "models.json"
    assert cli.main(["bench", "models", "--json", str(out)]) == 2
    assert "on a CUDA GPU, and there is none here" in capsys.readouterr().err
    assert cli.main(["bench", "models", "--models", "Sora"]) == 2
    assert "no model is called 'Sora'; there are Wan2.1" in capsys.readouterr().err
    assert not made and not out.exists()
