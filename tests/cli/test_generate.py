"""`vidaccel generate`, end to end on the embedded model, and what it says to bad input."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from tiny.cogvideo import cogvideox_i2v
from vidaccel.cli.generate import check_steps
from vidaccel.clips import video
from vidaccel.clips.embedded import EMBEDDED_PROMPT, embedded_model
from vidaccel.clips.fidelity import MEASURES
from vidaccel.errors import PolicyError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.store import shipped_policies
from vidaccel.resolve import Resolver


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
    assert set(result["adherence"][0]) == {"color", "background", "motion", "shape"}
    assert result["settings"]["num_inference_steps"] == 8
    assert result["environment"]["packages"]["torch"]
    assert set(result["metrics"]["worst"]) | set(result["metrics"]["unavailable"]) == set(MEASURES)
    for row in ("steps computed", "8 of 8", "3 of 8", "flicker", "shows the motion"):
        assert row in stdout
    for measure in MEASURES.values():
        assert f"{measure.title} (worst frame)" in stdout
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


def test_a_model_may_make_a_step_less_than_it_is_asked_for():
    """As MiniMax-H3 does: a policy for 50 steps is for a call of 51, where the model is its own."""
    resolver = Resolver("vidaccel/tiny-wan/50-steps")
    asked = {"policy": "vidaccel/tiny-wan/50-steps", "steps": 51}
    check_steps(Namespace(**asked, model="some/model"), resolver)
    with pytest.raises(PolicyError, match="for 50, this run has 51"):
        check_steps(Namespace(**asked, model=None), resolver)
    with pytest.raises(PolicyError, match="for 50, this run has 52"):
        check_steps(Namespace(**(asked | {"steps": 52}), model="some/model"), resolver)


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
        (["--max-error", "0.1"], "only its errors tell"),
        (["--psnr", "40"], "only its errors tell"),
        (["--speedup", "2", "--policy", "every 2"], "speedup: only a policy has a plan for that"),
        (["--speedup", "nan"], "expected a number above 0: 'nan'"),
        (["--max-error", "-1"], "expected a number of 0 or more: '-1'"),
        (["--policy", "vidaccel/tiny-wan"], "policies for 30 and 50 steps, this run has 8"),
        (["--policy", "vidaccel/tiny-wan/50-steps"], "the policy is for 50, this run has 8"),
        (["--policy", "Wan-AI/Wan2.1-T2V-14B-Diffusers"], "the policy is for"),
        (["--cache", "0.1", "--policy", "all", "--probe-blocks", "12"], "has 10 blocks"),
        (["--size", "47x47"], "have to be divisible by 16 but are 47 and 47"),
        (["--size", "100000x100000"], "at most 16384 pixels a side"),
        (["--frames", "1000000000"], "expected at most 100000"),
        (["--steps", "100000000"], "expected at most 1000"),
        (["--guidance", "nan"], "expected a number: 'nan'"),
        (["--seed", "-1"], "expected a whole number of 0 or more"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
        (["--offload"], "offload keeps idle parts off a GPU"),
        ([""], "the prompt is empty"),
        (["a red circle", " "], "the prompt is empty"),
        (["a", "red", "circle"], "put quotes around one prompt"),
        (["a red circle", "--prompts", "prompts.txt"], "give one or the other"),
        (["--image", "nowhere.png"], "no picture at nowhere.png"),
        (["--out", "clip.avi"], "ends in .mp4"),
        (["--out", "/proc/nowhere/clip.mp4"], "cannot write"),
        (["--json", "/proc/nowhere/numbers.json"], "cannot write"),
        (["--model", "./nowhere", "a prompt"], "no model folder at nowhere"),
        (["--model", "."], "it has no model_index.json"),
        (["--model", str(embedded_model())], "a prompt is needed"),
        (["--device", "warp"], "no device is called 'warp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, run, small, no_weights):
    code, _, stderr = run("generate", *small, *arguments)
    assert code == 2
    assert message in stderr
    assert stderr.count("\n") == 1


def test_a_hub_model_that_is_not_there_is_named_and_not_the_prompt(run, monkeypatch, no_weights):
    def download(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for prompt in ([], ["a red circle"]):
        code, _, stderr = run("generate", "--model", "nosuch/model", *prompt)
        assert code == 2 and "no model folder at nosuch/model, and the hub" in stderr


@pytest.mark.parametrize("policy", ["auto", "vidaccel/tiny-wan", "vidaccel/tiny-wan/30-steps"])
def test_wishes_choose_a_plan_of_what_auto_finds_and_of_shipped_policies(policy, tmp_path, run):
    policy_of_30 = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/30-steps.json"])
    options = ["--size", "32x32", "--frames", 5, "--steps", 30, "--device", "cpu", "--quiet"]
    options += ["--policy", policy, "--out", tmp_path / "a.mp4", "--json", "-"]
    wish = ["--budget", 9] if policy == "auto" else ["--max-error", 0.05]
    code, stdout, stderr = run("generate", *options, *wish)
    assert (code, stderr) == (0, "")
    part = json.loads(stdout)["report"]["transformers"][0]
    wanted = policy_of_30.plan(budget=9) if policy == "auto" else policy_of_30.plan(max_error=0.05)
    assert part["timeline"].count("C") == len(wanted.steps)
    assert ("tiny-wan" in part["policy"]) and len(part["timeline"]) == 30


def test_several_prompts_and_seeds_are_made_in_one_go(tmp_path, run, tiny):
    out, numbers = tmp_path / "clip.mp4", tmp_path / "numbers.json"
    prompts = ["a red circle moving up", "a blue square moving left"]
    code, stdout, stderr = run(
        "generate", *prompts, *tiny, "--seed", "0,5", "--out", out, "--json", numbers,
    )  # fmt: skip
    assert code == 0, stderr
    clips = json.loads(numbers.read_text())["clips"]
    made = [(clip["settings"]["prompt"], clip["settings"]["seed"]) for clip in clips]
    assert made == [(prompt, seed) for prompt in prompts for seed in (0, 5)]
    files = [tmp_path / f"clip-{i}.mp4" for i in (1, 2, 3, 4)]
    assert [clip["files"] for clip in clips] == [[str(file)] for file in files]
    assert "(4 of 4, seed 5)" in stderr and stdout.count("policy: ") == 4
    alone = tmp_path / "alone.mp4"
    assert run("generate", prompts[1], *tiny, "--seed", 5, "--out", alone)[0] == 0
    assert np.array_equal(video.read_video(alone)[0], video.read_video(files[3])[0])
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    code, stdout, stderr = run("generate", "--prompts", file, *tiny, "--quiet", "--out", alone)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [str(tmp_path / f"alone-{i}.mp4") for i in (1, 2)]


def test_the_default_file_is_never_written_over(run, tiny):
    for expected in ("video", "video-2", "video-3"):
        code, stdout, _ = run("generate", *tiny, "--quiet")
        assert (code, stdout) == (0, f"out/{expected}.mp4\n")
    Path("out/video-4-plain.mp4").touch()
    code, stdout, _ = run("generate", *tiny, "--quiet", "--compare")
    assert stdout.splitlines()[0] == "out/video-5.mp4" and len(stdout.splitlines()) == 4
    code, stdout, _ = run("generate", *tiny, "--quiet", "--out", "out/video.mp4")
    assert (code, stdout) == (0, "out/video.mp4\n")  # this name was asked for


def test_libraries_say_nothing_on_the_way(run, tiny):
    code, _, stderr = run("generate", *tiny)
    lines = re.split(r"[\r\n]+", stderr.strip())
    bars = [line for line in lines if line.startswith("vidaccel:") and "step" in line]
    rest = [line for line in lines if line not in bars]
    assert code == 0 and len(rest) == 2, rest
    assert rest[0].startswith("tiny-wan: ") and rest[1] == "wrote out/video.mp4"


def test_the_table_tells_of_attention_and_of_what_the_numbers_are_of(run, tiny):
    every_second = ["--steps", 4, "--policy", "every 2"]
    code, stdout, _ = run("generate", *tiny, "--compare", "--policy", "all", "--attention", "0.5")
    assert code == 0
    assert re.search(r"^attention +dense +sparse$", stdout, re.MULTILINE)
    assert re.search(r"^  density +100\.0% +\d+\.\d%$", stdout, re.MULTILINE)
    assert "attention: SVG2(top_p=0.5" in stdout
    assert "note: nothing was reused" in stdout
    assert "note: sparse attention runs as its PyTorch reference on a CPU" in stdout
    assert "vidaccel compare of the .mp4 files counts what their compression has lost" in stdout
    code, stdout, _ = run("generate", *tiny, *every_second, "--compare")
    assert re.search(r"^attention +dense +dense$", stdout, re.MULTILINE)
    assert "nothing was reused" not in stdout and "sparse attention" not in stdout
    code, stdout, _ = run("compare", "out/video-2-plain.mp4", "out/video-2.mp4")
    assert code == 0 and "so what their compression has lost counts" in stdout


def test_equal_clips_are_called_identical(run, tiny):
    code, stdout, _ = run("generate", *tiny, "--compare", "--policy", "all")
    assert code == 0 and re.search(r"^PSNR \(worst frame\) +identical$", stdout, re.MULTILINE)
    assert "inf" not in stdout


def test_a_number_of_frames_that_the_model_does_not_make(run, tiny):
    code, stdout, stderr = run("generate", *tiny, "--frames", 10, "--json", "numbers.json")
    assert code == 0, stderr
    assert "note: WanPipeline made 11 frames, not 10" in stdout
    assert json.loads(Path("numbers.json").read_text())["notes"]
    assert len(video.read_video("out/video.mp4")[0]) == 11


def test_an_image_goes_to_a_pipeline_that_takes_one(run, tiny, generate_by, monkeypatch):
    Image.new("RGB", (20, 10), (200, 0, 0)).save("start.png")
    code, _, stderr = run("generate", *tiny, "--image", "start.png")
    assert code == 2 and "WanPipeline takes no image" in stderr
    case, asked = cogvideox_i2v(), []
    case.pipe.save_pretrained("model")

    def generate(pipe, call, **_):
        asked.append(call)
        raise KeyboardInterrupt

    generate_by(generate)
    monkeypatch.setattr("vidaccel.clips.load.load_pipeline", lambda *_, **__: case.pipe)
    arguments = ["generate", "a red circle", "--model", "model", "--device", "cpu"]
    code, _, stderr = run(*arguments)
    assert code == 2 and "needs image" in stderr and not asked
    assert run(*arguments, "--image", "start.png")[0] == 130
    assert asked[0]["image"].size == (20, 10)
    Path("start.png").write_bytes(b"no picture")
    code, _, stderr = run(*arguments, "--image", "start.png")
    assert code == 2 and "start.png is damaged or no picture" in stderr


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


def test_clips_are_there_when_their_measuring_is_interrupted(tmp_path, run, small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vidaccel.clips.compare.summary", interrupted)
    arguments = ("--policy", "every 4", "--compare", "--out", "clip.mp4")
    assert run("generate", EMBEDDED_PROMPT, *small, *arguments)[0] == 130
    assert video.read_video(tmp_path / "clip.mp4")[0].shape == (9, 64, 64, 3)
    assert video.read_video(tmp_path / "clip-plain.mp4")[0].shape == (9, 64, 64, 3)
