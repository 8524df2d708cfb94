"""The bench of sparse attention: what it measures, against what, and how it goes on."""

import json
import math

import pytest
import torch

from tiny import STEPS, embeds
from tiny.wan import wan
from vidaccel.api import engines_of
from vidaccel.bench import attention as bench
from vidaccel.cli.main import main
from vidaccel.errors import BenchError
from vidaccel.kernels.semantic_attention import SemanticConfig, SemanticState, semantic_attention

PROMPTS = ["a", "bb"]
FEW = ("svg2", "averaging, compensation", "fixed blocks", "random", "int8 QK")
PLANNED = ("with a plan", "with a plan, refresh at 0.95")


@pytest.fixture
def prompted():
    """A pipeline whose prompts are taken from a table, since it has no text encoder."""
    case = wan()
    case.pipe.encode_prompt = lambda prompt, *_, **__: (embeds(len(prompt)), embeds(99))
    return case.pipe


@pytest.fixture
def few(monkeypatch):
    """Fewer methods and clusters: the clips are tiny."""
    small = {"query_clusters": 3, "key_clusters": 8, "dense_steps": 1}
    base = bench.replace(bench.BASE, **small)
    methods = {
        name: method._replace(settings=bench.replace(method.settings, **small))
        for name, method in bench.METHODS.items()
        if name in (*FEW, *PLANNED)
    }
    monkeypatch.setattr(bench, "BASE", base)
    monkeypatch.setattr(bench, "METHODS", methods)
    monkeypatch.setattr(bench, "CHANGES", {"as they are": {}, "no dense steps": {"dense_steps": 0}})


def run(pipe, **options):
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": STEPS}
    options = {
        "prompts": PROMPTS,
        "top_ps": (0.3, 1.0),
        "methods": FEW,
        "progress": False,
    } | options
    return bench.attention(pipe, call, **options)


def test_points_over_prompts(prompted, few, tmp_path, monkeypatch):
    result = run(prompted, partial=tmp_path / "partial.json")
    assert not engines_of(prompted), "the pipeline is left without acceleration"
    points = {(p["method"], p["settings"]["top_p"]): p for p in result["points"]}
    assert len(points) == len(FEW) * 2 + 2
    for (name, top_p), point in points.items():
        each = point["psnr_of_prompts"]
        single = name in bench.CHANGES
        assert len(each) == (1 if single else len(PROMPTS))
        assert point["psnr_of_worst_prompt"] == min(each)
        assert point["psnr"] == (each[0] if single else pytest.approx(sum(each) / len(each)))
        if top_p == 1.0:
            assert point["density"] == pytest.approx(1.0) and point["psnr"] > 60
            assert point["recall"] == pytest.approx(1.0)
        else:
            assert point["density"] < 1.0 and point["psnr"] < 60
            assert (point["recall"] is None) == single
    sparse = [points[name, 0.3] for name in FEW]
    assert len({point["psnr"] for point in sparse}) == len(FEW), "the methods differ"
    assert points["svg2", 0.3]["psnr_of_prompts"][0] != points["svg2", 0.3]["psnr_of_prompts"][1]
    # Fewer of the same clusters, picked for their mass, hold more of it than those drawn blindly.
    assert points["svg2", 0.3]["recall"] > points["random", 0.3]["recall"]
    assert (
        points["as they are", 0.7]["density_with_dense"] > points["no dense steps", 0.7]["density"]
    )

    table = bench.attention_table(result)
    assert table.count("\n") == len(points)
    assert f"{points['svg2', 0.3]['psnr_of_worst_prompt']:.2f}" in table

    def never(*_, **__):
        raise AssertionError("everything is in the partial file")

    monkeypatch.setattr(bench, "generate", never)
    assert run(prompted, partial=tmp_path / "partial.json")["points"] == result["points"]


def test_the_figure_is_drawn(prompted, few, tmp_path):
    pytest.importorskip("matplotlib")
    result = run(prompted, prompts=PROMPTS[:1], top_ps=(0.3,), changes_at=None)
    assert len(result["points"]) == len(FEW)
    bench.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_some_methods_and_what_rounding_costs(prompted, few, tmp_path):
    options = {"prompts": PROMPTS[:1], "top_ps": (0.3,), "changes_at": None}
    names = ["svg2", "int8 QK"]
    plain, rounded = run(prompted, methods=names, **options)["points"]
    assert [plain["method"], rounded["method"]] == names
    assert plain["psnr_without_int8"] is None and rounded["settings"]["int8_qk"]
    assert plain["density"] == pytest.approx(rounded["density"], abs=0.02)
    # Rounding changes the clip, and less than leaving keys out does.
    assert plain["psnr"] < rounded["psnr_without_int8"] < 200
    assert plain["psnr"] != rounded["psnr"]


def test_steps_that_are_used_again_can_be_less_sparse(prompted, few):
    options = {"prompts": PROMPTS[:1], "top_ps": (0.3, 1.0), "changes_at": None}
    points = run(prompted, methods=PLANNED, **options)["points"]
    same, refreshed = ([p for p in points if p["method"] == name] for name in PLANNED)
    # Only some of the sparse steps keep more, so that others stay as they are.
    assert same[0]["density"] < refreshed[0]["density"] < 0.95
    assert same[0]["psnr"] != refreshed[0]["psnr"]
    # Against a dense clip of the same steps: with nothing left out they are equal.
    assert same[1]["psnr"] > 60 and same[1]["density"] == pytest.approx(1.0)
    assert refreshed[1]["density"] < 1.0


def test_nothing_to_measure_is_refused(prompted):
    with pytest.raises(BenchError, match="at least one prompt"):
        run(prompted, prompts=[])
    with pytest.raises(BenchError, match="one top_p"):
        run(prompted, top_ps=())
    with pytest.raises(BenchError, match="no method 'int4 QK'; known are svg2; mass averaging"):
        run(prompted, methods=["svg2", "int4 QK"])
    with pytest.raises(BenchError, match="there is no method; known"):
        run(prompted, methods=[])


@pytest.mark.parametrize("wrong", ["0", "1.5", "0.5,", "nan", "half"])
def test_masses_out_of_range_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "attention", "--top-p", wrong])
    assert "numbers in (0, 1] expected" in capsys.readouterr().err


def test_what_svg2_is_compared_with():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 90, 16, generator=draw) for _ in range(3))
    text = {"video": (0, 90)}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    everything = SemanticConfig(5, 9, top_p=1.0)
    for method in (bench.fixed_blocks, bench.random_clusters):
        out = method(q, k, v, SemanticState(), everything, **text)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    config = SemanticConfig(5, 9, top_p=0.5, min_ratio=0.0)
    blocks, blind, ours = SemanticState(), SemanticState(), SemanticState()
    bench.fixed_blocks(q, k, v, blocks, config, **text)
    assert blocks.query.order[0, 0].tolist() == list(range(90)), "blocks do not permute"
    assert blocks.key.counts[0, 0].tolist() == [10] * 9
    bench.random_clusters(q, k, v, blind, config, **text)
    semantic_attention(q, k, v, ours, config, **text)
    assert torch.equal(blind.query.labels, ours.query.labels)
    assert torch.equal(blind.selection.mask().sum(-1), ours.selection.mask().sum(-1))
    assert not torch.equal(blind.selection.mask(), ours.selection.mask())
    assert all(math.isfinite(x) for x in blind.density().flatten())


def test_a_result_is_plain_data(prompted, few):
    result = run(prompted, prompts=PROMPTS[:1], top_ps=(0.3,), changes_at=None)
    assert json.loads(json.dumps(result))["points"] == result["points"]
