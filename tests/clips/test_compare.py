"""Two clips held against each other, and `vidaccel compare`."""

import json
import math
import socket

import numpy as np
import pytest

from vidaccel.cli import main as cli
from vidaccel.clips import metrics, video
from vidaccel.clips.compare import fidelity, fidelity_table


@pytest.fixture
def clips():
    """A clip of noise, and the same with one bad frame."""
    generator = np.random.default_rng(0)
    first = generator.integers(60, 200, (6, 32, 40, 3), dtype=np.uint8)
    second = first.copy()
    second[4] += generator.integers(0, 40, first[4].shape, dtype=np.uint8)
    return first, second


def test_the_worst_frame_is_found_and_the_means_are_those_of_the_clip(clips):
    found = fidelity(*clips)
    assert found["worst"]["psnr"]["frame"] == found["worst"]["ssim"]["frame"] == 4
    assert found["mean"]["psnr"] == metrics.psnr(*clips)
    assert found["mean"]["ssim"] == pytest.approx(metrics.ssim(*clips))
    assert [math.isinf(value) for value in found["per_frame"]["psnr"]] == [True] * 4 + [False, True]
    assert found["flicker"] == [metrics.flicker(clip) for clip in clips]
    assert set(found["mean"]) | set(found["unavailable"]) == {"psnr", "ssim", "lpips"}
    table = fidelity_table(found)
    assert "frame 4" in table and "PSNR" in table and "flicker" in table


def test_equal_clips_are_called_identical(clips):
    assert "identical" in fidelity_table(fidelity(clips[0], clips[0]))


def run(*arguments, capsys):
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_compare_from_the_command_line(clips, tmp_path, capsys):
    for name, clip in zip(("a.mp4", "b.mp4"), clips, strict=True):
        video.write_video(tmp_path / name, clip)
    out, numbers = tmp_path / "new" / "both.mp4", tmp_path / "numbers.json"
    code, stdout, stderr = run(
        "compare", tmp_path / "a.mp4", tmp_path / "b.mp4", "--out", out, "--json", numbers,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, stderr
    assert "frame 4" in stdout and f"wrote {out}" in stderr
    result = json.loads(numbers.read_text())
    assert (result["frames"], result["size"], result["fps"]) == (6, [40, 32], [16.0, 16.0])
    assert result["worst"]["psnr"]["frame"] == 4
    assert video.read_video(out)[0].shape[2] > 500
    assert (tmp_path / "new" / "both-contact-sheet.png").is_file()


def test_clips_that_cannot_be_compared(clips, tmp_path, capsys):
    video.write_video(tmp_path / "a.mp4", clips[0])
    video.write_video(tmp_path / "b.mp4", clips[1][:3])
    (tmp_path / "c.mp4").write_bytes(b"no clip")
    out = ["--out", tmp_path / "both.mp4"]
    for other, message in (
        ("b.mp4", "6 frames of 40x32 and "),
        ("c.mp4", "damaged, cut short or not a video"),
        ("d.mp4", "no video file"),
    ):
        code, _, stderr = run("compare", tmp_path / "a.mp4", tmp_path / other, *out, capsys=capsys)
        assert code == 2 and message in stderr and "Traceback" not in stderr
    code, _, stderr = run(
        "compare", tmp_path / "a.mp4", tmp_path / "a.mp4", "--out", "x.avi", capsys=capsys
    )
    assert code == 2 and ".mp4" in stderr


def test_a_port_that_is_taken(tmp_path, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, stderr = run(
            "demo", "--device", "cpu", "--out", tmp_path, "--server-port", port, capsys=capsys
        )
    assert code == 2 and "cannot serve the page" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no model_index.json"),
        (["--steps", "500"], "500 steps: this page takes 100 at most"),
        (["--size", "500x500"], "more pixels than 128x128"),
        (["--out", "/proc/nowhere"], "cannot write"),
    ],
)
def test_a_demo_that_cannot_be_served(arguments, message, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("demo", *arguments, capsys=capsys)
    assert code == 2 and message in stderr and "Traceback" not in stderr
