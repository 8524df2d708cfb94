"""`vidaccel generate`, end to end on the embedded model, and what it says to bad input."""

import json
import shutil

import numpy as np
import pytest

from vidaccel.clips import video
from vidaccel.clips.embedded import embedded_model


def test_generate_compares_and_writes_everything(tmp_path, run, small):
    out, numbers = tmp_path / "new" / "clip.mp4", tmp_path / "numbers.json"
    code, stdout, stderr = run(
        "generate", *small, "--policy", "0,1,4", "--compare", "--out", out, "--json", numbers,
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


def test_generate_alone_prints_json_to_the_screen(tmp_path, run, small):
    out = tmp_path / "clip.mp4"
    code, stdout, stderr = run(
        "generate", "A RED striped circle moving right on a navy dotted background",
        *small, "--seed", 3, "--policy", "every 4", "--out", out, "--json", "-",
    )  # fmt: skip
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["report"]["transformers"][0]["timeline"] == "C---C---"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_command_line_gives_what_the_python_api_gives(tmp_path, run, small):
    import vidaccel
    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.clips.generate import generate
    from vidaccel.clips.load import load_pipeline

    out = tmp_path / "clip.mp4"
    assert run("generate", *small, "--policy", "every 3", "--out", out)[0] == 0
    pipe = vidaccel.accelerate(load_pipeline(device="cpu"), policy="every 3")
    call = {"prompt": EMBEDDED_PROMPT, "height": 64, "width": 64, "num_frames": 9}
    call |= {"num_inference_steps": 8, "guidance_scale": 5.0}
    pipe.set_progress_bar_config(leave=False)
    expected = generate(pipe, call, progress=False).frames
    assert pipe._progress_bar_config == {"leave": False}  # the bar is left as it was
    other = tmp_path / "expected.mp4"
    video.write_video(other, expected, 16)
    assert np.array_equal(video.read_video(out)[0], video.read_video(other)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected a whole number of 1 or more: '0'"),
        (["--steps", "many"], "whole number"),
        (["--size", "64"], "width x height"),
        (["--policy", "0,9"], "computes step 9, but the run has 8 steps"),
        (["--policy", "1,2"], "starts at step 0"),
        (["--policy", "0,5,3"], "strictly increase"),
        (["--policy", "0,-5"], "strictly increase"),
        (["--policy", "every 0"], "N >= 1"),
        (["--policy", "often"], "found 'often'"),
        (["--preset", "turbo"], "invalid choice"),
        (["--budget", "3"], "need a policy file in --policy, found 'auto'"),
        (["--out", "clip.avi"], "ends in .mp4"),
        (["--out", "/proc/nowhere/clip.mp4"], "cannot write"),
        (["--json", "/proc/nowhere/numbers.json"], "cannot write"),
        (["--model", "./nowhere", "a prompt"], "no model folder at nowhere"),
        (["--model", "."], "a prompt is needed"),
        (["--device", "warp"], "no device is called 'warp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, tmp_path, run, monkeypatch, small
):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("generate", *small, *arguments)
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr
    assert "step/s" not in stderr  # nothing was generated


def test_a_folder_that_is_no_model(tmp_path, run, small):
    code, _, stderr = run("generate", "x", "--model", tmp_path, *small)
    assert code == 2 and "no model_index.json" in stderr


def test_a_damaged_model_file(tmp_path, run, small):
    model, out = tmp_path / "model", tmp_path / "clip.mp4"
    shutil.copytree(embedded_model(), model)
    weights = next((model / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: 2**14])
    code, _, stderr = run("generate", "x", "--model", model, *small, "--out", out)
    assert code == 2 and f"cannot load {model}" in stderr
    assert "Traceback" not in stderr and not out.exists()


def test_no_ffmpeg(tmp_path, run, monkeypatch, small):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    code, _, stderr = run("generate", *small, "--out", tmp_path / "clip.mp4")
    assert code == 2 and "pip install imageio-ffmpeg" in stderr


def test_block_cache_and_sparse_attention_are_options(tmp_path, run):
    options = ["--steps", "8", "--size", "32x32", "--frames", "5", "--policy", "all"]
    options += ["--cache", "10", "--warmup-steps", "2", "--attention", "0.5"]
    code, stdout, stderr = run("generate", *options, "--out", tmp_path / "a.mp4", "--json", "-")
    assert code == 0, stderr
    part = json.loads(stdout)["report"]["transformers"][0]
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
def test_wrong_caches_and_attention_are_refused_in_one_line(option, message, run):
    code, _, stderr = run("generate", *option)
    assert code == 2 and message in stderr and stderr.count("\n") == 1
