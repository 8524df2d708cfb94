"""`vidaccel bench`, as far as the command line goes."""

import json

import pytest


def test_bench_overhead_measures_every_variant(run, tmp_path):
    numbers = tmp_path / "overhead.json"
    code, stdout, stderr = run(
        "bench", "overhead", "--steps", 4, "--size", "64x64", "--frames", 9, "--rounds", 1,
        "--device", "cpu", "--json", numbers,
    )  # fmt: skip
    assert code == 0, stderr
    result = json.loads(numbers.read_text())
    assert {name: len(times) for name, times in result["seconds"].items()} == dict.fromkeys(
        ("plain", "every 2", "every 3", "every 5", "no blocks"), 1
    )
    assert [plan["steps_computed"] for plan in result["plans"].values()] == [2, 2, 1]
    for plan in result["plans"].values():
        assert plan["realised_over_ideal"] == pytest.approx(plan["speedup"] / plan["ideal_speedup"])
    assert isinstance(result["idle_overhead"], float)
    assert isinstance(result["threshold_zero_overhead"], float)
    for cost in ("idle_overhead", "threshold_zero_overhead"):
        low, high = result[f"{cost}_interval"]
        assert low <= result[cost] <= high
    assert "idle overhead" in stdout
    assert "threshold 0 " in stdout


def test_bench_search_and_calibration(tmp_path, run, monkeypatch):
    numbers = tmp_path / "search.json"
    code, stdout, stderr = run("bench", "search", "--rounds", 1, "--json", numbers)
    assert code == 0, stderr
    searches = json.loads(numbers.read_text())["searches"]
    assert [row["steps"] for row in searches.values()] == [50, 50, 1000]
    assert all(name in stdout for name in searches)

    prompts, work = tmp_path / "prompts.txt", tmp_path / "work"
    prompts.write_text("a green dotted square moving left on a maroon striped background\n")
    build = ["build-policy", tmp_path / "p.json", "--prompts", prompts, "--workdir", work]
    build += ["--size", "32x32", "--frames", 9, "--steps", 6, "--max-skip", 3, "--device", "cpu"]
    assert run(*build, "--faithful", "--no-validate")[0] == 0
    compare = ["bench", "calibration", "--exact-workdir", work, "--held-out", prompts]
    compare += ["--budgets", 4, "--device", "cpu", "--json", numbers]
    code, stdout, stderr = run(*compare)
    assert code == 0, stderr
    result = json.loads(numbers.read_text())
    assert len(result["samples"]) == 1 and -1 <= result["rank_correlation"]["mean"] <= 1
    assert result["generations_per_sample"]["gain"] < result["generations_per_sample"]["exact"]
    assert len(result["plans"]["4"]["exact_steps"]) == 4
    compare[3] = tmp_path
    code, _, stderr = run(*compare)
    assert code == 2 and "is no work folder of a build" in stderr
