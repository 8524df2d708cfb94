"""`vidaccel compare`."""

import json

import pytest

from tiny.clips import with_one_bad_frame
from vidaccel.clips import video


def test_the_default_file_is_never_written_over(clips, run):
    video.write_video("a.mp4", clips[0])
    for expected in ("compare", "compare-2"):
        code, _, stderr = run("compare", "a.mp4", "a.mp4")
        assert code == 0 and f"wrote out/{expected}.mp4" in stderr


@pytest.fixture
def clips():
    return with_one_bad_frame()


def test_compare_from_the_command_line(clips, tmp_path, run):
    for name, clip in zip(("a.mp4", "b.mp4"), clips, strict=True):
        video.write_video(tmp_path / name, clip)
    out, numbers = tmp_path / "new" / "both.mp4", tmp_path / "numbers.json"
    code, stdout, stderr = run(
        "compare", tmp_path / "a.mp4", tmp_path / "b.mp4", "--out", out, "--json", numbers,
    )  # fmt: skip
    assert code == 0, stderr
    assert "frame 4" in stdout and f"wrote {out}" in stderr
    result = json.loads(numbers.read_text())
    assert (result["frames"], result["size"], result["fps"]) == (6, [40, 32], [16.0, 16.0])
    assert result["worst"]["psnr"]["frame"] == 4
    assert video.read_video(out)[0].shape[2] > 500
    assert (tmp_path / "new" / "both-contact-sheet.png").is_file()


def test_clips_that_cannot_be_compared(clips, tmp_path, run):
    video.write_video(tmp_path / "a.mp4", clips[0])
    video.write_video(tmp_path / "b.mp4", clips[1][:3])
    (tmp_path / "c.mp4").write_bytes(b"no clip")
    out = ["--out", tmp_path / "both.mp4"]
    for other, message in (
        ("b.mp4", "6 frames of 40x32 and "),
        ("c.mp4", "damaged, cut short or not a video"),
        ("d.mp4", "no video file"),
    ):
        code, _, stderr = run("compare", tmp_path / "a.mp4", tmp_path / other, *out)
        assert code == 2 and message in stderr and "Traceback" not in stderr
        assert stderr.count("a.mp4") <= 1 and stderr.count(other) == 1  # each is named once
    code, _, stderr = run("compare", tmp_path / "a.mp4", tmp_path / "a.mp4", "--out", "x.avi")
    assert code == 2 and ".mp4" in stderr
