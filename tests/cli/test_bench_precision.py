"""`vidaccel bench precision`: what it writes, and what is refused before a model is loaded."""

import json

import pytest


def test_formats_on_gaussian_numbers_need_no_model(run, tmp_path):
    code, out, _ = run("bench", "precision", "--crossover", "--json", tmp_path / "c.json")
    assert code == 0 and "published" in out
    written = json.loads((tmp_path / "c.json").read_text())
    assert set(written["even_at"]) == {"MX8", "MX4", "NV4"} == set(written["published"])
    assert written["environment"]["packages"]


def test_mistakes_are_told_before_a_model_is_loaded(run):
    for arguments, told in (
        (("--formats", "int3"), "there is no format 'int3'; known are int8"),
        (("--model", "nobody/nothing"), "prompts are needed"),
    ):
        code, _, err = run("bench", "precision", *arguments)
        assert code == 2 and told in err


@pytest.mark.slow
def test_clips_and_layers_are_measured(run, tmp_path):
    small = ("--size", "32x32", "--frames", "5", "--steps", "2", "--count", "1")
    arguments = ("--parts", "presets", "--workdir", tmp_path / "work", "--json")
    code, out, _ = run("bench", "precision", *small, *arguments, tmp_path / "p.json")
    assert code == 0 and 'precision="int8"' in out
    written = json.loads((tmp_path / "p.json").read_text())
    points = {point["name"]: point for point in written["points"]}
    assert len(points) == 7 and all(point["psnr"] > 15 for point in points.values())
    eight = points['int8, hadamard, precision="int8"']
    whole = [point["psnr"] for point in points.values() if "left alone" not in point["name"]]
    assert eight["psnr"] == max(whole)
    assert eight["bytes_after"] < 0.3 * eight["bytes_before"]
    code, out, _ = run("bench", "precision", "--sensitivity", *small, "--json", tmp_path / "s.json")
    assert code == 0 and "100 layers" in out
    layers = json.loads((tmp_path / "s.json").read_text())["layers"]["transformer"]
    assert set(layers) == {"int8", "nvint4"} and len(layers["int8"]) == 100
