"""VMAF by ffmpeg: its range, every size, one frame, and machines without it."""

import subprocess

import numpy as np
import pytest

from vidaccel.clips import vmaf as module
from vidaccel.clips.vmaf import vmaf, vmaf_of_frames, why_no_vmaf
from vidaccel.errors import MetricUnavailable, VideoError

CLIP = np.random.default_rng(0).integers(20, 230, (4, 32, 32, 3), dtype=np.uint8)

needs_vmaf = pytest.mark.skipif(bool(why_no_vmaf()), reason=why_no_vmaf())


@needs_vmaf
def test_equal_clips_are_best_and_every_frame_has_a_value():
    damaged = CLIP.copy()
    damaged[2] = CLIP[2, ::-1]
    equal, other = vmaf_of_frames(CLIP, CLIP), vmaf_of_frames(CLIP, damaged)
    assert len(equal) == len(other) == 4
    assert min(equal) > 90
    assert int(np.argmin(other)) == 2 and other[2] < min(equal) - 20
    assert vmaf(CLIP, damaged) == pytest.approx(np.mean(other))


@needs_vmaf
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 31, 45), (1, 9, 17)])
def test_pictures_and_odd_sizes_have_one(size):
    frames, height, width = size
    clip = np.random.default_rng(1).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    assert len(vmaf_of_frames(clip, clip)) == frames


@needs_vmaf
def test_a_size_that_ffmpeg_cannot_take_is_told():
    with pytest.raises(MetricUnavailable, match="ffmpeg failed on frames of 1x2000"):
        vmaf(np.zeros((1, 2000, 1, 3), np.uint8), np.zeros((1, 2000, 1, 3), np.uint8))


def test_an_ffmpeg_without_it_and_none_at_all_are_told(tmp_path, monkeypatch):
    bare = tmp_path / "ffmpeg"
    bare.write_text("#!/bin/sh\necho ' ... scale V->V'\n")
    bare.chmod(0o755)
    monkeypatch.setattr(module, "_ffmpeg", lambda: str(bare))
    with pytest.raises(MetricUnavailable, match=r"without libvmaf.*IMAGEIO_FFMPEG_EXE"):
        vmaf(CLIP, CLIP)

    def missing():
        raise RuntimeError("no ffmpeg exe could be found")

    monkeypatch.setattr(module, "_ffmpeg", missing)
    assert "needs ffmpeg (no ffmpeg exe" in why_no_vmaf()


def test_two_shapes_are_refused_before_a_program_starts(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(VideoError, match=r"\[4, 32, 32, 3\], found \[3, 32, 32, 3\]"):
        vmaf(CLIP, CLIP[:3])
