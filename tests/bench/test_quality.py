"""The bench of quality against speed: what it measures, how it goes on, and what it draws."""

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tiny import STEPS
from tiny.building import prompted
from tiny.wan import wan
from vidaccel import accelerate, restore
from vidaccel.api import engines_of
from vidaccel.bench import curves, quality
from vidaccel.bench.methods import MethodContext, Variant, variants
from vidaccel.bench.quality import quality as bench
from vidaccel.cli.main import main
from vidaccel.errors import BenchError, PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.plans.policy import CachePolicy

PROMPTS = ["a", "bb"]
METHODS = ["evenly spaced", "fewer sampling steps", "FirstBlockCache"]


@pytest.fixture
def case():
    case = prompted(wan())
    case.call["num_inference_steps"] = STEPS
    return case


@pytest.fixture
def generations(monkeypatch):
    """Counts the generations of the bench."""
    count = []
    generate = quality.generate

    def counted(pipe, call, **options):
        count.append(call)
        return generate(pipe, call, **options)

    monkeypatch.setattr(quality, "generate", counted)
    return count


def planned(method, policy):
    @contextmanager
    def enabled(pipe):
        accelerate(pipe, policy=policy, cache=None)
        yield
        restore(pipe)

    return Variant(method, {"policy": policy}, enabled)


def run(case, contenders, **options):
    return bench(case.pipe, case.call, PROMPTS, contenders, progress=False, **options)


def test_measures_each_variant_against_the_plain_run(case):
    result = run(case, [planned("all", None), planned("half", "every 2")])
    points = {point["method"]: point for point in result["points"]}
    assert points["all"]["psnr"] == curves.MOST_DECIBELS
    assert points["all"]["ssim"] == 1.0
    assert points["all"]["blocks_share"] == 1.0
    assert points["half"]["blocks_share"] == 0.5
    assert points["half"]["worst_psnr"] == min(points["half"]["every_psnr"])
    assert points["half"]["psnr"] == pytest.approx(sum(points["half"]["every_psnr"]) / 2)
    assert points["half"]["worst_psnr"] < 60
    assert points["half"]["lpips"] is None
    assert points["half"]["adherence"] is None
    assert points["half"]["speedup"] == points["half"]["wall_speedup"]
    assert result["plain"]["blocks"] == 2 * STEPS * len(case.pipe.transformer.blocks)
    assert not engines_of(case.pipe)
    assert not any(module._forward_pre_hooks for module in case.pipe.transformer.modules())
    json.dumps(result)


def test_all_methods_without_a_policy_run(case):
    contenders, left_out = variants(METHODS, MethodContext(STEPS))
    result = run(case, contenders, clock="cpu")
    assert {point["method"] for point in result["points"]} == set(METHODS)
    assert len(result["points"]) == len(contenders)
    assert not left_out and not result["failed"]
    fewer = [p for p in result["points"] if p["method"] == "fewer sampling steps"]
    shares = sorted(point["blocks_share"] for point in fewer)
    assert shares == [budget / STEPS for budget in sorted(MethodContext(STEPS).budgets)]
    assert all(point["speedup"] == point["cpu_speedup"] for point in fewer)


def test_lpips_with_a_random_backbone(case):
    pytest.importorskip("lpips")
    from vidaccel.clips.metrics import load_lpips

    result = run(case, [planned("half", "every 2")], lpips=load_lpips(pretrained=False))
    assert result["points"][0]["worst_lpips"] >= result["points"][0]["lpips"] > 0


def test_pieces_and_their_combinations(case):
    policy = CachePolicy.load("policies/vidaccel--tiny-wan/50-steps.json")
    names = ["SVG2", "DBCache F1B0 + SVG2", "plan + SVG2", "plan + DBCache F1B0 + SVG2"]
    found, _ = variants([*names, "plan + DBCache F1B0", "preset fast"], MethodContext(50, policy))
    chosen = [next(v for v in found if v.method == n) for n in (*names, "preset fast")]
    case.call["num_inference_steps"] = 50
    result = bench(case.pipe, case.call, PROMPTS[:1], chosen, progress=False)
    points = {point["method"]: point for point in result["points"]}
    assert points["SVG2"]["steps_share"] == 1.0 and 0 < points["SVG2"]["density"] <= 1
    assert points["plan + SVG2"]["steps_share"] == points["plan + SVG2"]["blocks_share"] == 0.5
    both = points["plan + DBCache F1B0 + SVG2"]
    assert both["steps_share"] >= 0.5 and both["blocks_share"] > both["steps_share"]
    assert points["preset fast"]["steps_share"] < 0.5 and points["preset fast"]["density"] is None
    lines = curves.points_table(result).splitlines()
    assert len(lines) == 2 + len(chosen)
    row = next(line.split() for line in lines if line.startswith("plan + SVG2"))
    assert row[3:5] == ["50%", "50%"] and row[5].endswith("%") and row[7].endswith("x")
    assert lines[1].split()[:3] == ["plain", "100%", "100%"]


def test_a_killed_run_goes_on_to_the_same_result(case, generations, tmp_path):
    contenders = [planned(f"every {n}", f"every {n}") for n in (2, 3, 4)]
    whole = run(case, contenders)

    @contextmanager
    def killed(pipe):
        if len(generations) > before + 6:
            raise KeyboardInterrupt
        accelerate(pipe, policy="every 4", cache=None)
        yield
        restore(pipe)

    before = len(generations)
    dying = [*contenders[:2], Variant("every 4", {"policy": "every 4"}, killed)]
    with pytest.raises(KeyboardInterrupt):
        run(case, dying, workdir=tmp_path)
    done = len(list(tmp_path.glob("*-*.json")))
    assert done > 1
    resumed = run(case, contenders, workdir=tmp_path)
    started = len(generations)
    again = run(case, contenders, workdir=tmp_path)
    assert len(generations) == started, "a finished run generates nothing"
    for key in ("psnr", "ssim", "flicker", "blocks_share", "every_psnr"):
        found = [{p["method"]: p[key] for p in r["points"]} for r in (whole, resumed, again)]
        assert found[0] == found[1] == found[2]


def test_more_prompts_and_methods_join_an_earlier_run(case, generations, tmp_path):
    contenders = [planned("every 2", "every 2")]
    bench(case.pipe, case.call, PROMPTS[:1], contenders, workdir=tmp_path, progress=False)
    generations.clear()
    contenders.append(planned("every 3", "every 3"))
    result = run(case, contenders, workdir=tmp_path)
    assert [point["method"] for point in result["points"]] == ["every 2", "every 3"]
    # The warm-up, the plain runs around, and what was missing: one of the first prompt, two.
    assert len(generations) == (1 + 2 + 1) + (1 + 2 + 2)


def test_a_folder_of_another_run_is_refused(case, tmp_path):
    contenders = [planned("every 2", "every 2")]
    run(case, contenders, workdir=tmp_path)
    with pytest.raises(BenchError, match="its seed differs"):
        run(case, contenders, workdir=tmp_path, seed=1)
    with torch.no_grad():
        case.pipe.transformer.proj_out.weight.mul_(1.5)
    with pytest.raises(BenchError, match="another one than when it started"):
        run(case, [planned("every 3", "every 3")], workdir=tmp_path)


def test_a_damaged_shard_is_named(case, tmp_path):
    run(case, [planned("every 2", "every 2")], workdir=tmp_path)
    shard = next(tmp_path.glob("*-*.json"))
    shard.write_text("{")
    with pytest.raises(BenchError, match=shard.name):
        run(case, [planned("every 2", "every 2")], workdir=tmp_path)


def test_a_method_that_leaves_the_pipeline_changed_is_named(case):
    @contextmanager
    def spoiling(pipe):
        yield
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.5)

    with pytest.raises(BenchError, match="after spoiler"):
        run(case, [Variant("spoiler", {}, spoiling)])


def test_what_a_foreign_method_raises_is_noted(case):
    @contextmanager
    def failing(pipe):
        raise RuntimeError("no such thing\nat line 3")
        yield

    contenders = [Variant("broken", {"x": 1}, failing, foreign=True), planned("half", "every 2")]
    result = run(case, contenders)
    assert result["failed"] == {'broken {"x": 1}': "RuntimeError: no such thing"}
    assert [point["method"] for point in result["points"]] == ["half"]
    with pytest.raises(RuntimeError):
        run(case, [Variant("broken", {"x": 1}, failing)])


def test_nothing_to_compare_is_refused(case):
    with pytest.raises(BenchError, match="needs a prompt"):
        run(case, [])
    with pytest.raises(BenchError, match="needs a prompt"):
        run(case, [Variant("plain", {}, nullcontext)], clock="sun")


def test_variants_that_cannot_run_are_left_out_unless_named():
    found, left_out = variants(None, MethodContext(50))
    assert "no policy" in left_out["vidaccel plan"]
    assert "not calibrated" in left_out["MagCache"]
    assert {variant.method for variant in found}.isdisjoint(left_out)
    with pytest.raises(PolicyError, match="no policy"):
        variants(["vidaccel plan"], MethodContext(50))
    with pytest.raises(UnsupportedPipelineError, match="not calibrated"):
        variants(["MagCache"], MethodContext(50))
    with pytest.raises(PlanError, match="found warp drive, expected preset quality, "):
        variants(["warp drive"], MethodContext(50))


def test_variants_of_a_policy():
    policy = CachePolicy.load("policies/vidaccel--tiny-wan/50-steps.json")
    contest = MethodContext(50, policy, (1.0,) * 50)
    found, left_out = variants(None, contest)
    assert all("not installed" in reason for reason in left_out.values())
    plans = [variant for variant in found if variant.method == "vidaccel plan"]
    assert [len(variant.setting["steps"]) for variant in plans] == contest.budgets
    keys = {curves.key_of(variant.method, variant.setting) for variant in found}
    assert len(keys) == len(found)
    with pytest.raises(PolicyError, match="the policy is for 50, this run has 30"):
        variants(["LeMiCa sum"], MethodContext(30, policy))


def point(method, speedup, psnr):
    values = {"psnr": psnr, "worst_psnr": psnr - 2, "ssim": psnr / 100, "worst_ssim": 0.1}
    nothing = {"lpips": None, "worst_lpips": None, "flicker": 0.0}
    return {"method": method, "speedup": speedup, **values, **nothing}


def test_front_keeps_what_is_not_beaten():
    points = [point("a", *xy) for xy in ((1.5, 50), (2, 40), (1.9, 39), (3, 41), (4, 30))]
    assert [p["speedup"] for p in curves.front(points)] == [1.5, 3, 4]


def test_equal_time_is_linear_in_time():
    points = [point("a", 1.0, 60.0), point("a", 2.0, 40.0), point("b", 2.5, 30.0)]
    equal = curves.equal_time(points)
    # 1 / 1.5 of the time lies a third of the way from 1 / 2 to 1.
    assert equal["a"]["1.5"]["psnr"] == pytest.approx(40 + 20 / 3)
    assert equal["a"]["1.5"]["worst_psnr"] == pytest.approx(38 + 20 / 3)
    assert equal["a"]["1.5"]["lpips"] is None
    assert equal["a"]["2"]["psnr"] == 40
    assert "3" not in equal["a"]
    assert list(equal["b"]) == ["2.5"]
    table = curves.table(equal)
    assert table.splitlines()[1].split() == [
        *("a", "46.7", "(44.7)", "40.0", "(38.0)"),
        *4 * ["-"],
    ]


def test_speedups_come_from_the_plain_runs_beside():
    def record(method, at, seconds, session=1):
        timing = {"at": at, "seconds": seconds, "cpu_seconds": seconds / 2, "session": session}
        measured = {"psnr": 30.0, "ssim": 0.9, "lpips": None, "flicker": 0.0, "adherence": None}
        return {"method": method, "setting": {}, "blocks": 10, **timing, **measured}

    records = [
        record(None, 0, 100.0, session=0),
        record(None, 1, 8.0),
        record("a", 2, 4.0),
        record(None, 3, 16.0),
        record(None, 4, 100.0),
    ]
    points, failed = curves.points_of([records], [curves.key_of("a", {})], "seconds")
    assert points[0]["wall_speedup"] == points[0]["speedup"] == 3.0
    assert not failed
    # A prompt that is still missing: no point yet.
    both = [records, [record(None, 1, 8.0)]]
    assert curves.points_of(both, [curves.key_of("a", {})], "seconds") == ([], {})


def test_figure_and_report(tmp_path):
    pytest.importorskip("matplotlib")
    methods = ["vidaccel plan", "evenly spaced", "MagCache", "SeaCache"]
    points = [point(m, s, 60 - 8 * s - i) for i, m in enumerate(methods) for s in (1.5, 2, 3)]
    plain = {"seconds": 4.0, "cpu_seconds": 3.0}
    result = {"points": points, "settings": {"prompts": PROMPTS, "clock": "wall"}, "plain": plain}
    curves.figure(result, tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000
    result |= {"equal_time": curves.equal_time(points), "failed": {}, "left_out": {"x": "why"}}
    text = curves.report(result)
    assert text.startswith("2 prompts; plain 4.00 s")
    assert text.endswith("x: why")


def test_command_line(tmp_path, capsys):
    assert main(["bench", "quality", "--list"]) == 0
    assert "SeaCache" in capsys.readouterr().out.splitlines()
    assert main(["bench", "quality", "--methods", "warp drive", "--steps", "4"]) == 2
    assert "found warp drive" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red dotted circle moving up on a charcoal striped background\n")
    arguments = ["--size", "48x48", "--frames", "9", "--steps", "4", "--clock", "cpu"]
    arguments += ["--methods", "evenly spaced", "--prompts", str(prompts), "--threads", "1"]
    arguments += ["--json", str(tmp_path / "q.json"), "--workdir", str(tmp_path / "work")]
    assert main(["bench", "quality", *arguments]) == 0
    result = json.loads((tmp_path / "q.json").read_text())
    assert result["settings"]["model"] == "tiny-wan"
    assert result["points"][0]["adherence"].keys() == {"color", "background", "motion"}
    assert "lpips" in result["left_out"] or result["points"][0]["lpips"] is not None
    assert "evenly spaced" in capsys.readouterr().out
