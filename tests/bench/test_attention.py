"""The bench of sparse attention: what it measures, against what, and how it goes on."""

import json
from dataclasses import asdict, fields, replace

import pytest

from tiny import STEPS, embeds
from tiny.wan import wan
from vidaccel.api import engines_of
from vidaccel.bench import attention as bench
from vidaccel.bench import figures, sparse_methods
from vidaccel.bench.attention import AttentionResult, attention, attention_table
from vidaccel.cli.main import main
from vidaccel.errors import BenchError

PROMPTS = ["a", "bb"]
FEW = ("svg2", "averaging, compensation", "fixed blocks", "random", "int8 QK")
PLANNED = ("with a plan", "with a plan, refresh at 0.95")
FIELDS = {field.name for field in fields(bench.ClipRecord)}


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
    base = replace(sparse_methods.BASE, **small)
    methods = {
        name: replace(method, svg2=replace(method.svg2, **small))
        for name, method in sparse_methods.SPARSE_METHODS.items()
        if name in (*FEW, *PLANNED)
    }
    monkeypatch.setattr(bench, "BASE", base)
    monkeypatch.setattr(bench, "SPARSE_METHODS", methods)
    monkeypatch.setattr(bench, "CHANGES", {"as they are": {}, "no dense steps": {"dense_steps": 0}})


def run(pipe, steps=STEPS, **options):
    call = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": steps}
    options = {
        "prompts": PROMPTS,
        "top_ps": (0.3, 1.0),
        "methods": FEW,
        "progress": False,
    } | options
    return attention(pipe, call, **options)


def test_points_over_prompts(prompted, few, tmp_path, monkeypatch):
    result = run(prompted, workdir=tmp_path / "work")
    assert not engines_of(prompted), "the pipeline is left without acceleration"
    points = {(p.method, p.settings["top_p"]): p for p in result.points}
    assert len(points) == len(FEW) * 2 + 2
    for (name, top_p), point in points.items():
        each = point.psnr_of_prompts
        single = name in bench.CHANGES
        assert len(each) == (1 if single else len(PROMPTS))
        assert point.psnr_of_worst_prompt == min(each)
        assert point.psnr == (each[0] if single else pytest.approx(sum(each) / len(each)))
        if top_p == 1.0:
            assert point.density == pytest.approx(1.0) and point.psnr > 60
            assert point.recall == pytest.approx(1.0)
        else:
            assert point.density < 1.0 and point.psnr < 60
            assert (point.recall is None) == single
    sparse = [points[name, 0.3] for name in FEW]
    assert len({point.psnr for point in sparse}) == len(FEW), "the methods differ"
    assert len(set(points["svg2", 0.3].psnr_of_prompts)) == len(PROMPTS)
    # Fewer of the same clusters, picked for their mass, hold more of it than those drawn blindly.
    assert points["svg2", 0.3].recall > points["random", 0.3].recall
    assert points["as they are", 0.7].density_with_dense > points["no dense steps", 0.7].density

    table = attention_table(result)
    assert table.count("\n") == len(points)
    assert f"{points['svg2', 0.3].psnr_of_worst_prompt:.2f}" in table

    def never(*_, **__):
        raise AssertionError("everything is in the work folder")

    monkeypatch.setattr(bench, "generate", never)
    assert run(prompted, workdir=tmp_path / "work").points == result.points
    with pytest.raises(BenchError, match="belongs to another run: its call differs"):
        run(prompted, steps=STEPS + 1, workdir=tmp_path / "work")


def test_a_file_of_an_earlier_version_is_read(prompted, few, tmp_path, monkeypatch):
    options = {"prompts": PROMPTS[:1], "methods": ["svg2"], "changes_at": None}
    result = run(prompted, top_ps=(0.3,), **options)
    earlier = tmp_path / "partial.json"
    (point,) = result.points
    kept = {name: value for name, value in asdict(point).items() if name in FIELDS}
    earlier.write_text(json.dumps({f"{PROMPTS[0]}: svg2: {json.dumps(point.settings)}": kept}))
    longer = run(prompted, top_ps=(0.3, 0.6), workdir=earlier, **options)
    assert longer.points[0] == point

    def never(*_, **__):
        raise AssertionError("what the file lacks is in the folder beside it")

    monkeypatch.setattr(bench, "generate", never)
    assert run(prompted, top_ps=(0.3, 0.6), workdir=earlier, **options).points == longer.points
    earlier.write_text("{")
    with pytest.raises(BenchError, match=r"cannot read .*partial\.json"):
        run(prompted, workdir=earlier, **options)


def test_the_figure_is_drawn(prompted, few, tmp_path):
    pytest.importorskip("matplotlib")
    result = run(prompted, prompts=PROMPTS[:1], top_ps=(0.3,), changes_at=None)
    assert len(result.points) == len(FEW)
    figures.draw_attention(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_some_methods_and_what_rounding_costs(prompted, few, tmp_path):
    options = {"prompts": PROMPTS[:1], "top_ps": (0.3,), "changes_at": None}
    names = ["svg2", "int8 QK"]
    full, rounded = run(prompted, methods=names, **options).points
    assert [full.method, rounded.method] == names
    assert full.psnr_without_int8 is None and rounded.settings["int8_qk"]
    assert full.density == pytest.approx(rounded.density, abs=0.02)
    # Rounding changes the clip, and less than leaving keys out does.
    assert full.psnr < rounded.psnr_without_int8 < 200
    assert full.psnr != rounded.psnr


def test_steps_that_are_used_again_can_be_less_sparse(prompted, few):
    options = {"prompts": PROMPTS[:1], "top_ps": (0.3, 1.0), "changes_at": None}
    points = run(prompted, methods=PLANNED, **options).points
    same, refreshed = ([p for p in points if p.method == name] for name in PLANNED)
    # Only some of the sparse steps keep more, so that others stay as they are.
    assert same[0].density < refreshed[0].density < 0.95
    assert same[0].psnr != refreshed[0].psnr
    # Against a dense clip of the same steps: with nothing left out they are equal.
    assert same[1].psnr > 60 and same[1].density == pytest.approx(1.0)
    assert refreshed[1].density < 1.0


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


def test_a_result_is_plain_data(prompted, few):
    result = run(prompted, prompts=PROMPTS[:1], top_ps=(0.3,), changes_at=None)
    assert AttentionResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
