"""The bench of quality against speed: what it measures, and how it goes on."""

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch

from tiny import STEPS
from tiny.building import prompted
from tiny.wan import wan
from vidaccel import accelerate, restore
from vidaccel.api import engines_of
from vidaccel.bench import quality
from vidaccel.bench.curves import MOST_DECIBELS, QualityResult
from vidaccel.bench.methods import variants
from vidaccel.bench.plan_searches import BUDCACHE
from vidaccel.bench.quality import quality as bench
from vidaccel.bench.tables import points_table, quality_table
from vidaccel.bench.variants import MethodContext, Variant
from vidaccel.cli.main import main
from vidaccel.errors import BenchError
from vidaccel.plans import user_folder
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies

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


def run(case, measured, **options):
    return bench(case.pipe, case.call, PROMPTS, measured, progress=False, **options)


def test_measures_each_variant_against_the_plain_run(case):
    result = run(case, [planned("all", None), planned("half", "every 2")])
    points = {point.method: point for point in result.points}
    whole, half = points["all"], points["half"]
    assert whole.psnr == MOST_DECIBELS
    assert whole.ssim == 1.0
    assert whole.blocks_share == 1.0
    assert half.blocks_share == 0.5
    assert half.worst_psnr == min(half.every_psnr)
    assert half.psnr == pytest.approx(sum(half.every_psnr) / 2)
    assert half.worst_psnr < 60
    assert half.lpips is None and "LPIPS:" not in quality_table(result)
    assert half.worst_frame_psnr < half.worst_psnr
    assert whole.cvvdp is None or half.worst_cvvdp <= half.cvvdp < whole.cvvdp <= 10
    assert half.vmaf is None or half.worst_vmaf <= half.vmaf <= 100
    assert half.adherence is None
    assert half.speedup == half.wall_speedup
    assert result.plain.bit_equal_after_every_method is True
    assert result.plain.blocks == 2 * STEPS * len(case.pipe.transformer.blocks)
    assert not engines_of(case.pipe)
    assert not any(module._forward_pre_hooks for module in case.pipe.transformer.modules())
    assert QualityResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_all_methods_without_a_policy_run(case):
    measured, left_out = variants(METHODS, MethodContext(STEPS))
    result = run(case, measured, clock="cpu")
    assert {point.method for point in result.points} == set(METHODS)
    assert len(result.points) == len(measured)
    assert not left_out and not result.failed
    fewer = [point for point in result.points if point.method == "fewer sampling steps"]
    shares = sorted(point.blocks_share for point in fewer)
    assert shares == [budget / STEPS for budget in sorted(MethodContext(STEPS).budgets)]
    assert all(point.speedup == point.cpu_speedup for point in fewer)


def test_what_it_measures_of_a_learned_plan_is_kept(case):
    case.call["num_inference_steps"] = 12
    accelerate(case.pipe, policy="learn", attention=None)
    case.pipe(**case.call, prompt=PROMPTS[0])
    restore(case.pipe)
    (file,) = user_folder.files()
    result = run(case, [planned("own", "auto"), planned("half", "every 2")])
    own = next(point for point in result.points if point.method == "own")
    clips = user_folder.measured_clips(CachePolicy.load(file))
    assert sorted(clip.psnr for clip in clips) == pytest.approx(sorted(own.every_psnr))
    assert {clip.budget for clip in clips} == {4}


def test_lpips_with_a_random_backbone(case):
    pytest.importorskip("lpips")
    from vidaccel.clips.metrics import load_lpips

    result = run(case, [planned("half", "every 2")], lpips=load_lpips(pretrained=False))
    assert result.points[0].worst_lpips >= result.points[0].lpips > 0


def test_pieces_and_their_combinations(case):
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    names = ["SVG2", "DBCache F1B0 + SVG2", "plan + SVG2", "plan + DBCache F1B0 + SVG2"]
    found, _ = variants([*names, "plan + DBCache F1B0", "preset fast"], MethodContext(50, policy))
    chosen = [next(v for v in found if v.method == n) for n in (*names, "preset fast")]
    case.call["num_inference_steps"] = 50
    result = bench(case.pipe, case.call, PROMPTS[:1], chosen, progress=False)
    points = {point.method: point for point in result.points}
    assert points["SVG2"].steps_share == 1.0 and 0 < points["SVG2"].density <= 1
    assert points["plan + SVG2"].steps_share == points["plan + SVG2"].blocks_share == 0.5
    both = points["plan + DBCache F1B0 + SVG2"]
    assert both.steps_share >= 0.5 and both.blocks_share > both.steps_share
    assert points["preset fast"].steps_share < 0.5 and points["preset fast"].density is None
    lines = points_table(result).splitlines()
    assert len(lines) == 2 + len(chosen)
    row = next(line.split() for line in lines if line.startswith("plan + SVG2"))
    assert row[3:5] == ["50%", "50%"] and row[5].endswith("%") and row[7].endswith("x")
    assert lines[1].split()[:3] == ["plain", "100%", "100%"]


def test_a_killed_run_goes_on_to_the_same_result(case, generations, tmp_path):
    measured = [planned(f"every {n}", f"every {n}") for n in (2, 3, 4)]
    whole = run(case, measured)

    @contextmanager
    def killed(pipe):
        if len(generations) > before + 6:
            raise KeyboardInterrupt
        accelerate(pipe, policy="every 4", cache=None)
        yield
        restore(pipe)

    before = len(generations)
    dying = [*measured[:2], Variant("every 4", {"policy": "every 4"}, killed)]
    with pytest.raises(KeyboardInterrupt):
        run(case, dying, workdir=tmp_path)
    done = len(list(tmp_path.glob("*-*.json")))
    assert done > 1
    resumed = run(case, measured, workdir=tmp_path)
    started = len(generations)
    again = run(case, measured, workdir=tmp_path)
    assert len(generations) == started, "a finished run generates nothing"
    for key in ("psnr", "ssim", "flicker", "blocks_share", "every_psnr"):
        found = [{p.method: getattr(p, key) for p in r.points} for r in (whole, resumed, again)]
        assert found[0] == found[1] == found[2]


def test_more_prompts_and_methods_join_an_earlier_run(case, generations, tmp_path):
    measured = [planned("every 2", "every 2")]
    bench(case.pipe, case.call, PROMPTS[:1], measured, workdir=tmp_path, progress=False)
    generations.clear()
    measured.append(planned("every 3", "every 3"))
    result = run(case, measured, workdir=tmp_path)
    assert [point.method for point in result.points] == ["every 2", "every 3"]
    # The warm-up, the plain runs around, and what was missing: one of the first prompt, two.
    assert len(generations) == (1 + 2 + 1) + (1 + 2 + 2)


def test_a_folder_of_another_run_is_refused(case, tmp_path):
    measured = [planned("every 2", "every 2")]
    run(case, measured, workdir=tmp_path)
    with pytest.raises(BenchError, match="its seed differs"):
        run(case, measured, workdir=tmp_path, seed=1)
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

    measured = [Variant("broken", {"x": 1}, failing, foreign=True), planned("half", "every 2")]
    result = run(case, measured)
    assert result.failed == {'broken {"x": 1}': "RuntimeError: no such thing"}
    assert [point.method for point in result.points] == ["half"]
    with pytest.raises(RuntimeError):
        run(case, [Variant("broken", {"x": 1}, failing)])


def test_nothing_to_compare_is_refused(case):
    with pytest.raises(BenchError, match="needs a prompt"):
        run(case, [])
    with pytest.raises(BenchError, match="needs a prompt"):
        run(case, [Variant("plain", {}, nullcontext)], clock="sun")


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
    assert result["points"][0]["adherence"].keys() == {"color", "background", "motion", "shape"}
    assert "lpips" in result["left_out"] or result["points"][0]["lpips"] is not None
    assert "evenly spaced" in capsys.readouterr().out


def test_a_race_on_the_command_line(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red dotted circle moving up on a charcoal striped background\n")
    assert main(["bench", "quality", "--budgets", "9", "--steps", "8"]) == 2
    assert "found 9, expected at most 8" in capsys.readouterr().err
    other = ["--model", "some/model", "--prompts", str(prompts), "--search-runs", "5"]
    assert main(["bench", "quality", *other]) == 2
    assert "--calibration" in capsys.readouterr().err
    arguments = ["--size", "48x48", "--frames", "5", "--steps", "4", "--threads", "1"]
    arguments += ["--budgets", "2", "--search-runs", "2", "--calibration", str(prompts)]
    arguments += ["--methods", BUDCACHE, "--prompts", str(prompts), "--clock", "cpu"]
    assert main(["bench", "quality", *arguments, "--json", str(tmp_path / "q.json")]) == 0
    result = json.loads((tmp_path / "q.json").read_text())
    (point,) = result["points"]
    assert point["method"] == BUDCACHE and len(point["setting"]["steps"]) == 2
    assert result["settings"]["search_runs"] == 2 and len(result["settings"]["searched_on"]) == 1
