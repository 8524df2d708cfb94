"""The command line, end to end on the embedded model, and what it says to bad input."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from vidaccel.bench.overhead import median_interval
from vidaccel.cli import main as cli
from vidaccel.clips import video
from vidaccel.clips.embedded import embedded_model

TORCH = torch.__version__.partition("+")[0]
SMALL = ["--size", "64x64", "--frames", "9", "--steps", "8", "--device", "cpu"]


def run(*arguments, capsys):
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_generate_compares_and_writes_everything(tmp_path, capsys):
    out, numbers = tmp_path / "new" / "clip.mp4", tmp_path / "numbers.json"
    code, stdout, stderr = run(
        "generate", *SMALL, "--plan", "0,1,4", "--compare", "--out", out, "--json", numbers,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    result = json.loads(numbers.read_text())
    assert result["steps_computed"] == [8, 3]
    blocks = result["report"]["transformers"][0]["branches"]
    assert result["blocks_run"] == [
        sum(b["blocks_without_vidaccel"] for b in blocks),
        sum(b["blocks_run"] for b in blocks),
    ]
    assert result["blocks_run"][1] * 8 == result["blocks_run"][0] * 3
    assert result["speedup"] > 0
    assert result["metrics"]["psnr"] > 10
    assert set(result["adherence"][0]) == {"color", "background", "motion"}
    assert result["settings"]["num_inference_steps"] == 8
    assert result["environment"]["packages"]["torch"]
    for row in ("steps computed", "8 of 8", "3 of 8", "PSNR", "SSIM", "LPIPS", "shows the motion"):
        assert row in stdout
    assert "plain" in stderr and "reused=5" in stderr
    plain, fps = video.read_video(tmp_path / "new" / "clip-plain.mp4")
    fast, _ = video.read_video(out)
    assert plain.shape == fast.shape == (9, 64, 64, 3) and fps == 16
    assert not np.array_equal(plain, fast)
    beside, _ = video.read_video(tmp_path / "new" / "clip-side-by-side.mp4")
    assert beside.shape[1] > 256 and beside.shape[2] > 512
    assert (tmp_path / "new" / "clip-contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_generate_alone_prints_json_to_the_screen(tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    code, stdout, stderr = run(
        "generate", "A RED striped circle moving right on a navy dotted background",
        *SMALL, "--seed", 3, "--plan", "every 4", "--out", out, "--json", "-", capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["report"]["transformers"][0]["timeline"] == "C---C---"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_command_line_gives_what_the_python_api_gives(tmp_path, capsys):
    import vidaccel
    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.clips.generate import generate, load_pipeline

    out = tmp_path / "clip.mp4"
    assert run("generate", *SMALL, "--plan", "every 3", "--out", out, capsys=capsys)[0] == 0
    pipe = vidaccel.accelerate(load_pipeline(device="cpu"), policy="every 3")
    call = {"prompt": EMBEDDED_PROMPT, "height": 64, "width": 64, "num_frames": 9}
    call |= {"num_inference_steps": 8, "guidance_scale": 5.0}
    pipe.set_progress_bar_config(leave=False)
    expected = generate(pipe, call, progress=False).frames
    assert pipe._progress_bar_config == {"leave": False}  # the bar is left as it was
    other = tmp_path / "expected.mp4"
    video.write_video(other, expected, 16)
    assert np.array_equal(video.read_video(out)[0], video.read_video(other)[0])


@pytest.fixture
def model_copy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    return folder


def corrupt(folder):
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: 2**14])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected a whole number of 1 or more: '0'"),
        (["--steps", "many"], "whole number"),
        (["--size", "64"], "width x height"),
        (["--plan", "0,9"], "computes step 9, but the run has 8 steps"),
        (["--plan", "1,2"], "starts at step 0"),
        (["--plan", "0,5,3"], "strictly increase"),
        (["--plan", "0,-5"], "strictly increase"),
        (["--plan", "every 0"], "N >= 1"),
        (["--plan", "often"], "found 'often'"),
        (["--preset", "turbo"], "invalid choice"),
        (["--budget", "3"], "need a policy file in --plan, found 'auto'"),
        (["--out", "clip.avi"], "ends in .mp4"),
        (["--out", "/proc/nowhere/clip.mp4"], "cannot write"),
        (["--json", "/proc/nowhere/numbers.json"], "cannot write"),
        (["--model", "./nowhere", "a prompt"], "no model folder at nowhere"),
        (["--model", "."], "a prompt is needed"),
        (["--device", "warp"], "no device is called 'warp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = SMALL if "--device" not in arguments else SMALL[:-2]
    try:
        code = cli.main(["generate", *small, *arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    stderr = capsys.readouterr().err
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert "step/s" not in stderr  # nothing was generated


def test_a_folder_that_is_no_model(tmp_path, capsys):
    code, _, stderr = run("generate", "x", "--model", tmp_path, *SMALL, capsys=capsys)
    assert code == 2 and "no model_index.json" in stderr


def test_a_damaged_model_file(model_copy, tmp_path, capsys):
    corrupt(model_copy)
    out = tmp_path / "clip.mp4"
    code, _, stderr = run(
        "generate", "x", "--model", model_copy, *SMALL, "--out", out, capsys=capsys
    )
    assert code == 2 and f"cannot load {model_copy}" in stderr
    assert "Traceback" not in stderr and not out.exists()


def test_no_ffmpeg(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    code, _, stderr = run("generate", *SMALL, "--out", tmp_path / "clip.mp4", capsys=capsys)
    assert code == 2 and "pip install imageio-ffmpeg" in stderr


def test_an_option_that_the_pipeline_does_not_have(model_copy, capsys, tmp_path):
    from vidaccel.clips.generate import call_arguments, generate, load_pipeline
    from vidaccel.errors import ModelError, PlanError

    pipe = load_pipeline(str(model_copy), device="cpu")
    assert call_arguments(pipe, {"height": 64, "width": None}) == {"height": 64}
    with pytest.raises(ModelError, match="WanPipeline takes no strength"):
        call_arguments(pipe, {"strength": 0.5})
    for steps in (0, -1, 2.5):
        with pytest.raises(PlanError, match="num_inference_steps: found"):
            generate(pipe, {"prompt": "x", "num_inference_steps": steps})


def test_ctrl_c_is_quiet(tmp_path, capsys, monkeypatch):
    from vidaccel.clips import generate

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupt)
    code, _, stderr = run("generate", *SMALL, "--out", tmp_path / "clip.mp4", capsys=capsys)
    assert code == 130 and "stopped" in stderr


def test_env_for_people_and_programs(capsys):
    code, stdout, _ = run("env", capsys=capsys)
    assert code == 0
    assert TORCH in stdout and "WanTransformer3DModel" in stdout
    code, stdout, _ = run("env", "--json", capsys=capsys)
    found = json.loads(stdout)
    assert found["packages"]["torch"] == TORCH
    assert found["works"]["video files"].startswith("yes")
    assert found["works"]["embedded model"].startswith("yes")


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    draw = random.Random(0)
    samples = [[draw.gauss(0.0, 1.0) for _ in range(51)] for _ in range(2000)]
    held = [low <= 0.0 <= high for low, high in map(median_interval, samples)]
    assert 0.93 < sum(held) / len(held) < 0.97
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)


def test_bench_overhead_measures_every_variant(capsys, tmp_path):
    numbers = tmp_path / "overhead.json"
    code, stdout, stderr = run(
        "bench", "overhead", "--steps", 4, "--size", "64x64", "--frames", 9, "--rounds", 1,
        "--device", "cpu", "--json", numbers, capsys=capsys,
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


def test_python_dash_m():
    shown = subprocess.run(
        [sys.executable, "-m", "vidaccel", "--version"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and shown.stdout.startswith("vidaccel ")


def test_a_policy_from_the_command_line_to_a_clip(tmp_path, capsys):
    prompts, policy, out = tmp_path / "prompts.txt", tmp_path / "policy.json", tmp_path / "clip.mp4"
    prompts.write_text(
        "a green dotted square moving left on a maroon striped background\n\n"
        "a cyan striped circle moving up on a charcoal dotted background\n"
    )
    size = ["--size", "64x64", "--frames", 9, "--steps", 6, "--device", "cpu"]
    build = ["build-policy", policy, "--prompts", prompts, *size, "--max-skip", 3]
    code, stdout, stderr = run(*build, "--method", "gain", capsys=capsys)
    assert code == 0, stderr
    assert "generations" in stderr
    code, shown, _ = run("show", policy, capsys=capsys)
    assert code == 0 and shown == stdout
    assert "CCCCCC" in shown and "dB" in shown
    picture = tmp_path / "policy.png"
    code, again, stderr = run("show", policy, "--plot", picture, capsys=capsys)
    assert code == 0 and again == shown and f"wrote {picture}" in stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, stderr = run("show", policy, "--plot", tmp_path / "policy.xyz", capsys=capsys)
    assert code == 2 and "cannot write" in stderr
    generate = ["generate", *size, "--plan", policy, "--out", out]
    for wish in (["--budget", 3], ["--speedup", 2], ["--preset", "fast"]):
        code, stdout, stderr = run(*generate, *wish, "--json", "-", capsys=capsys)
        assert code == 0, stderr
        timeline = json.loads(stdout)["report"]["transformers"][0]["timeline"]
        assert len(timeline) == 6 and timeline.count("C") == 3
    code, _, stderr = run(*generate, "--budget", 2, capsys=capsys)
    assert code == 2 and "budget: found 2" in stderr
    code, _, stderr = run(*generate, "--steps", 7, "--budget", 3, capsys=capsys)
    assert code == 2 and "made for 6 steps, but this run has 7" in stderr


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"\xff\xfe", "not UTF-8")],
)
def test_prompt_files_that_are_none(prompts, message, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(prompts)
    code, _, stderr = run("build-policy", tmp_path / "p.json", "--prompts", file, capsys=capsys)
    assert code == 2 and message in stderr
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 2], "expected a whole number of 3 or more: '2'"),
        (["--steps", 5, "--max-skip", 5], "max_skip: found 5, expected 2 to 4"),
        (["--steps", 5, "--max-skip", 1], "expected a whole number of 2 or more: '1'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_steps_and_segments_that_no_policy_has(options, message, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    arguments = ["build-policy", tmp_path / "p.json", "--prompts", prompts, *options]
    try:
        code, _, stderr = run(*arguments, capsys=capsys)
    except SystemExit as exit:  # argparse
        code, stderr = exit.code, capsys.readouterr().err
    assert code == 2 and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("command", ["show", "generate"])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "found nothing in it"),
        (b'{"schema_version": "1.0", "pl', "invalid JSON: Unterminated string"),
        (b"\xff\xfe", "invalid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": "2.0"}', "schema_version: found '2.0', expected '1.x'"),
        (b'{"schema_version": "1.0", "plans": 3}', "model: Field required"),
        (b"[]", "found list, expected an object"),
    ],
)
def test_a_damaged_policy_is_one_line(command, raw, message, tmp_path, capsys):
    file = tmp_path / "policy.json"
    file.write_bytes(raw)
    arguments = [file] if command == "show" else [*SMALL, "--plan", file]
    code, stdout, stderr = run(command, *arguments, capsys=capsys)
    assert code == 2 and message in stderr
    assert "Traceback" not in stderr and not stdout
    assert "step/s" not in stderr  # nothing was generated


def test_bench_search_and_calibration(tmp_path, capsys, monkeypatch):
    numbers = tmp_path / "search.json"
    code, stdout, stderr = run("bench", "search", "--rounds", 1, "--json", numbers, capsys=capsys)
    assert code == 0, stderr
    searches = json.loads(numbers.read_text())["searches"]
    assert [row["steps"] for row in searches.values()] == [50, 50, 1000]
    assert all(name in stdout for name in searches)

    prompts, work = tmp_path / "prompts.txt", tmp_path / "work"
    prompts.write_text("a green dotted square moving left on a maroon striped background\n")
    build = ["build-policy", tmp_path / "p.json", "--prompts", prompts, "--workdir", work]
    build += ["--size", "32x32", "--frames", 9, "--steps", 6, "--max-skip", 3, "--device", "cpu"]
    assert run(*build, "--faithful", "--no-validate", capsys=capsys)[0] == 0
    compare = ["bench", "calibration", "--exact-workdir", work, "--held-out", prompts]
    compare += ["--budgets", 4, "--device", "cpu", "--json", numbers]
    code, stdout, stderr = run(*compare, capsys=capsys)
    assert code == 0, stderr
    result = json.loads(numbers.read_text())
    assert len(result["samples"]) == 1 and -1 <= result["rank_correlation"]["mean"] <= 1
    assert result["generations_per_sample"]["gain"] < result["generations_per_sample"]["exact"]
    assert len(result["plans"]["4"]["exact_steps"]) == 4
    compare[3] = tmp_path
    code, _, stderr = run(*compare, capsys=capsys)
    assert code == 2 and "is no work folder of a build" in stderr


def test_block_cache_and_sparse_attention_are_options(tmp_path, capsys):
    options = ["--steps", "8", "--size", "32x32", "--frames", "5", "--plan", "all"]
    options += ["--cache", "10", "--warmup-steps", "2", "--attention", "0.5"]
    assert cli.main(["generate", *options, "--out", str(tmp_path / "a.mp4"), "--json", "-"]) == 0
    part = json.loads(capsys.readouterr().out)["report"]["transformers"][0]
    assert part["timeline"] == "CCpppCpp"
    assert part["attention"]["sparse_calls"] > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--cache", "often"], "--cache is auto, none, model or a threshold"),
        (["--cache", "-1"], "threshold is a finite number >= 0"),
        (["--attention", "much"], "--attention is auto, none or a share"),
        (["--attention", "2"], "SVG2.top_p takes in (0, 1], found 2.0"),
    ],
)
def test_wrong_caches_and_attention_are_refused_in_one_line(option, message, capsys):
    assert cli.main(["generate", *option]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
