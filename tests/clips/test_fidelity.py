"""Two clips against each other, frame by frame."""

import dataclasses
import math
import sys

import pytest

from tiny.clips import with_one_bad_frame
from vidaccel.clips import metrics
from vidaccel.clips.cvvdp import load_cvvdp
from vidaccel.clips.fidelity import MEASURES, fidelity, fidelity_table, summary
from vidaccel.clips.vmaf import why_no_vmaf
from vidaccel.errors import VideoError


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
    assert set(found["mean"]) | set(found["unavailable"]) == set(MEASURES)
    for name in ("vmaf", "cvvdp"):
        assert name in found["unavailable"] or len(found["per_frame"][name]) == len(clips[0])
    table = fidelity_table(found)
    assert "frame 4" in table and "flicker" in table
    assert all(measure.title in table for measure in MEASURES.values())


def test_equal_clips_are_called_identical(clips):
    assert "identical" in fidelity_table(fidelity(clips[0], clips[0]))


def test_vmaf_and_colorvideovdp_are_measured_where_they_are_installed(clips):
    pytest.importorskip("pycvvdp")
    if why_no_vmaf():
        pytest.skip(why_no_vmaf())
    found = fidelity(*clips, leave_out=("lpips",))
    assert set(found["mean"]) == {"psnr", "ssim", "vmaf", "cvvdp"}
    assert found["unavailable"] == {}
    assert found["worst"]["vmaf"]["frame"] == 4
    assert found["worst"]["cvvdp"]["frame"] >= 4  # it looks back in time
    assert found["worst"]["cvvdp"]["value"] < found["mean"]["cvvdp"] < 10


def test_a_picture_has_the_measures_of_a_clip(clips):
    found = fidelity(clips[0][4:5], clips[1][4:5])
    assert all(len(values) == 1 for values in found["per_frame"].values())
    assert found["flicker"] == [0, 0]


def test_summary_is_the_same_in_one_level(clips):
    found, flat = fidelity(*clips), summary(*clips)
    assert {name: flat[name] for name in found["mean"]} == found["mean"]
    before, after = flat["flicker_of"]
    assert flat["flicker"] == after - before
    assert flat["worst"] == found["worst"]


def test_what_is_missing_is_told_and_takes_nothing_else_along(clips, monkeypatch):
    load_cvvdp.cache_clear()
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    found = summary(*clips)
    assert found["cvvdp"] is None and found["ssim"] is None and found["psnr"] > 20
    assert {"ssim", "cvvdp"} <= set(found["unavailable"])


def test_a_measure_that_fails_harms_nothing_else(clips, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("no pixels\nat all")

    monkeypatch.setitem(MEASURES, "vmaf", dataclasses.replace(MEASURES["vmaf"], measure=broken))
    found = fidelity(*clips)
    assert found["unavailable"]["vmaf"] == "it failed (ZeroDivisionError: no pixels)"
    assert "VMAF is not available: it failed" in fidelity_table(found)
    assert found["mean"]["psnr"] > 20


def test_shapes_must_match(clips):
    with pytest.raises(VideoError, match="expected a clip of the reference's shape"):
        fidelity(clips[0], clips[1][:4])
