"""Two clips against each other, frame by frame."""

import math

import pytest

from tiny.clips import with_one_bad_frame
from vidaccel.clips import metrics
from vidaccel.clips.fidelity import fidelity, fidelity_table


@pytest.fixture
def clips():
    return with_one_bad_frame()


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
