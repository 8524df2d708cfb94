"""Every example runs, at sizes that take seconds."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from vidaccel.clips import video
from vidaccel.clips.embedded import embedded_model
from vidaccel.plans.policy import CachePolicy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SMALL = ["--steps", "6", "--size", "48", "--frames", "5"]
QUIET = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(name, *arguments, folder):
    environment = os.environ | QUIET | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_examples_are_short():
    for path in EXAMPLES.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path


@pytest.mark.slow
def test_quickstart(tmp_path):
    shown = run("quickstart.py", folder=tmp_path)
    assert "WanTransformer3DModel" in shown and "16 " in shown
    assert video.read_video(tmp_path / "quickstart.mp4")[0].shape == (17, 96, 96, 3)


@pytest.mark.slow
def test_build_policy(tmp_path):
    shown = run("build_policy.py", *SMALL, folder=tmp_path)
    policy = CachePolicy.load(tmp_path / "policy.json")
    assert policy.num_inference_steps == 6 and policy.provenance == "measured"
    assert "policy.json" in shown and "reused" in shown


@pytest.mark.slow
def test_ray_calibration(tmp_path):
    pytest.importorskip("ray")
    shown = run("ray_calibration.py", *SMALL, "--workers", 2, folder=tmp_path)
    assert CachePolicy.load(tmp_path / "policy.json").provenance == "measured"
    assert len(list((tmp_path / "build" / "ray-policy").glob("sample-*.json"))) == 2
    assert "6 steps, measured" in shown


@pytest.mark.slow
def test_own_model(tmp_path):
    shown = run("own_model.py", folder=tmp_path)
    assert "C--C--C--" in shown
    assert "120  360" in shown


@pytest.mark.slow
def test_compare_settings(tmp_path):
    shown = run("compare_settings.py", *SMALL, folder=tmp_path)
    lines = [line for line in shown.splitlines() if " dB " in line]
    assert lines[0].strip().startswith("every 3rd step")
    assert lines[0].endswith("C--C--") and len(lines) == 2
    assert Image.open(tmp_path / "compare-settings.png").width > 100


@pytest.mark.slow
def test_wan22_with_two_transformers(tmp_path):
    from diffusers import WanPipeline, WanTransformer3DModel

    one = WanPipeline.from_pretrained(embedded_model())
    second = WanTransformer3DModel.from_pretrained(embedded_model(), subfolder="transformer")
    WanPipeline(**one.components | {"transformer_2": second}, boundary_ratio=0.6).save_pretrained(
        tmp_path / "model"
    )
    shown = run(
        "wan22.py", "a red circle", "--model", tmp_path / "model", "--steps", 8,
        "--size", "64x48", "--frames", 5, folder=tmp_path,
    )  # fmt: skip
    assert ".transformer " in shown and ".transformer_2 " in shown
    assert video.read_video(tmp_path / "wan22.mp4")[0].shape == (5, 48, 64, 3)


@pytest.mark.slow
def test_modular_with_another_guider(tmp_path):
    shown = run("modular.py", "--steps", 8, "--size", 48, "--frames", 5, folder=tmp_path)
    assert "pred_cond_skip" in shown and "-" in shown.split("last: ")[1].splitlines()[0]
    assert video.read_video(tmp_path / "modular.mp4")[0].shape == (5, 48, 48, 3)


@pytest.mark.slow
def test_minimax_h3_with_two_workflows(tmp_path):
    shown = run("minimax_h3.py", folder=tmp_path)
    assert shown.count("C-C-C-C-C-C-") == 2
    assert "transformer_ref " in shown and "text to video: " in shown


@pytest.mark.slow
def test_the_space_is_what_its_read_me_says(tmp_path):
    pytest.importorskip("gradio")
    for name in (EXAMPLES / "space").iterdir():
        shutil.copy(name, tmp_path)
    for name in ("vidaccel", "kernels", "policies", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    front = (tmp_path / "README.md").read_text().split("---")[1]
    fields = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert fields["sdk"] == "gradio" and (tmp_path / fields["app_file"]).is_file()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | QUIET
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, fields["app_file"]],
            cwd=tmp_path, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                    config = json.load(answer)
                break
            except OSError:
                time.sleep(0.2)
        assert config["title"] == "vidaccel"
        assert "Model: tiny-wan" in json.dumps(config)
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_torchrun_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--size", "64", "--frames", "5", "--steps", "8", "--out", "clip.mp4"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "torchrun.py"), *options],
        cwd=tmp_path, env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("WanPipeline.transformer") == 1  # one of them tells
    assert video.read_video(tmp_path / "clip.mp4")[0].shape == (5, 64, 64, 3)
