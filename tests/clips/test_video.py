import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vidaccel.clips import video
from vidaccel.clips.metrics import psnr
from vidaccel.errors import VideoError


def smooth(frames: int = 9, height: int = 64, width: int = 64) -> video.Clip:
    """A soft bright spot that crosses a colour gradient."""
    t, y, x = np.meshgrid(
        np.linspace(0.2, 0.8, frames),
        np.linspace(0, 1, height),
        np.linspace(0, 1, width),
        indexing="ij",
    )
    spot = np.exp(-((x - t) ** 2 + (y - 0.5) ** 2) / 0.03)
    return np.rint(255 * np.stack([spot, 0.3 + 0.3 * x, 0.5 * y], -1)).astype(np.uint8)


@pytest.fixture
def clip() -> video.Clip:
    return smooth()


@pytest.mark.parametrize(
    "form",
    [
        lambda c: c,
        lambda c: c / 255,
        lambda c: (c / 255).astype(np.float32),
        lambda c: list(c),
        lambda c: [Image.fromarray(frame) for frame in c],
        lambda c: [Image.fromarray(frame).convert("RGBA") for frame in c],
        lambda c: torch.from_numpy(c),
        lambda c: torch.from_numpy(c / 255).permute(0, 3, 1, 2),
        lambda c: (torch.from_numpy(c) / 255).requires_grad_(),
    ],
)
def test_as_uint8_takes_every_output_form_of_a_pipeline(clip, form):
    np.testing.assert_array_equal(video.as_uint8(form(clip)), clip)


def test_as_uint8_takes_bfloat16(clip):
    tensor = (torch.from_numpy(clip) / 255).bfloat16()
    assert np.abs(video.as_uint8(tensor).astype(int) - clip).max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: c[0], r"\[64, 64, 3\]"),
        (lambda c: c[None], r"\[1, 9, 64, 64, 3\].*frames\[0\]"),
        (lambda c: [[Image.fromarray(frame) for frame in c]], r"frames\[0\]"),
        (lambda c: c[..., :2], r"\[9, 64, 64, 2\]"),
        (lambda c: c[:0], r"\[0, 64, 64, 3\]"),
        (lambda c: [], "frames of one size"),
        (lambda c: [c[0], c[0][:4]], "frames of one size"),
        (lambda c: None, r"found \[\]"),
        (lambda c: c.astype(int), "int64"),
        (lambda c: c.astype(float), r"range of 0 to 2\d\d"),
        (lambda c: c / 127.5 - 1, "range of -1 to"),
        (lambda c: np.where(c > 250, np.nan, c / 255), "nan"),
    ],
)
def test_as_uint8_says_what_it_found(clip, wrong, message):
    with pytest.raises(VideoError, match=message):
        video.as_uint8(wrong(clip))


@pytest.mark.parametrize("fps", [16, 23.976, 8.5])
def test_a_clip_survives_the_file(clip, tmp_path, fps):
    video.write_video(tmp_path / "clip.mp4", clip, fps)
    back, rate = video.read_video(tmp_path / "clip.mp4")
    assert back.shape == clip.shape
    assert rate == pytest.approx(fps, abs=0.01)
    assert psnr(clip, back) > 45


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 50, 100)])
def test_colours_do_not_shift(tmp_path, colour):
    video.write_video(tmp_path / "flat.mp4", np.full((2, 32, 32, 3), colour, np.uint8))
    back, _ = video.read_video(tmp_path / "flat.mp4")
    assert np.abs(back.astype(int) - colour).max() <= 3


def test_odd_sizes_grow_by_their_edge(tmp_path):
    odd = smooth(3, 33, 47)
    video.write_video(tmp_path / "odd.mp4", odd)
    back, _ = video.read_video(tmp_path / "odd.mp4")
    assert back.shape == (3, 34, 48, 3)
    assert psnr(odd, back[:, :33, :47]) > 40


def test_one_frame_is_a_video(tmp_path):
    video.write_video(tmp_path / "one.mp4", smooth(1))
    assert len(video.read_video(tmp_path / "one.mp4")[0]) == 1


def test_the_index_comes_first(clip, tmp_path):
    video.write_video(tmp_path / "clip.mp4", clip)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(clip, tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(video, "CRF", "best")
    with pytest.raises(VideoError, match=r"could not encode the clip \[9, 64, 64, 3\]: .*best"):
        video.write_video(path, clip)
    with pytest.raises(VideoError, match="fps above 0, found nan"):
        video.write_video(path, clip, math.nan)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("keep", [0, 0.02, 0.5, 0.95])
def test_a_damaged_file_is_an_error(clip, tmp_path, keep):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(VideoError, match="damaged"):
        video.read_video(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(VideoError, match="no video file"):
        video.read_video(tmp_path / "clip.mp4")


def test_check_writable_leaves_only_the_folder(tmp_path):
    video.check_writable(tmp_path / "new" / "deep" / "clip.mp4")
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_check_writable_names_what_stands_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for path, message in {
        "clip.gif": "ends in .mp4",
        "folder.mp4": "folder",
        "file/clip.mp4": "File exists",
        "file/deep/clip.mp4": "Not a directory",
        "n" * 300 + ".mp4": "too long",
    }.items():
        with pytest.raises(VideoError, match=message):
            video.check_writable(tmp_path / path)


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
def test_check_writable_does_not_trust_permission_bits():
    with pytest.raises(VideoError, match=r"cannot write /proc/x/clip\.mp4"):
        video.check_writable("/proc/x/clip.mp4")


def test_a_missing_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(VideoError, match="pip install imageio-ffmpeg"):
        video.check_writable(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(VideoError, match="pip install imageio-ffmpeg"):
        video.check_writable(tmp_path / "clip.mp4")


def test_write_image_is_lossless(clip, tmp_path):
    video.write_image(tmp_path / "new" / "frame.png", clip[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "frame.png")), clip[0])
    with pytest.raises(VideoError, match=r"ends in \.png"):
        video.write_image(tmp_path / "frame.jpg", clip[0])


def test_side_by_side_enlarges_and_labels(clip):
    shown = video.side_by_side({"plain": clip, "fast": clip})
    frames, height, width, _ = shown.shape
    assert frames == 9
    assert height > 256
    assert width > 512
    large = clip.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(shown[:, -256:, :256], large)
    np.testing.assert_array_equal(shown[:, -256:, -256:], large)
    bar = shown[:, :-256]
    assert bar.max() > 200
    assert (bar == bar[:1]).all()


def test_side_by_side_takes_clips_of_different_sizes(clip):
    shown = video.side_by_side({"small": clip, "tall": smooth(9, 300, 100)})
    np.testing.assert_array_equal(shown[:, -300:, -100:], smooth(9, 300, 100))
    assert (shown[:, -44:, :256] == video.BACKGROUND).all()


def test_contact_sheet_shows_first_and_last_frame_and_the_difference(clip):
    clip = clip // 2
    second = clip + np.uint8(10)
    plain = video.contact_sheet({"plain": clip, "fast": second}, columns=3, difference=False)
    sheet = video.contact_sheet({"plain": clip, "fast": second}, columns=3, amplify=5)
    np.testing.assert_array_equal(sheet[: len(plain) - 16], plain[:-16])
    row = plain[-16 - 192 : -16, 16:-16]
    np.testing.assert_array_equal(row[:, :192], second[0].repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(row[:, -192:], second[-1].repeat(3, 0).repeat(3, 1))
    assert (sheet[-16 - 192 : -16, 16 : 16 + 192] == 50).all()


def test_contact_sheet_shrinks_large_frames_and_copes_with_few():
    sheet = video.contact_sheet({"one": smooth(2, 640, 320)}, columns=6)
    assert sheet.shape[1] == 16 + 160 + 4 + 160 + 16


def test_a_long_label_is_cut_to_its_clip():
    short = video._label("a label", 300, 20)
    long = video._label("a label " * 40, 300, 20)
    assert long.shape == short.shape
    assert long.max() > 200
    assert (long[:, -4:] == video.BACKGROUND).mean() > 0.9


def test_comments_come_back_from_a_clip(tmp_path):
    clip = tmp_path / "clip.mp4"
    for text in ("", "plain", 'a=b; c#d \\ "e"\nsecond line', "é漢" * 100, "x" * 30_000):
        video.write_video(clip, np.zeros((2, 16, 16, 3), np.uint8), comment=text)
        assert video.read_comment(clip) == text
    with pytest.raises(VideoError, match="no video file"):
        video.read_comment(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("layout", [video.side_by_side, video.contact_sheet])
def test_layouts_need_clips_that_match(clip, layout):
    with pytest.raises(VideoError, match="no clip"):
        layout({})
    with pytest.raises(VideoError, match=r"plain \[9, 64, 64, 3\], fast \[8, 64, 64, 3\]"):
        layout({"plain": clip, "fast": clip[:8]})


def test_import_is_light():
    heavy = ["torch", "imageio", "imageio_ffmpeg", "lpips", "skimage", "diffusers"]
    code = f"import sys, vidaccel.clips.metrics; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
