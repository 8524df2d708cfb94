"""ColorVideoVDP: its range, every size, one frame, and machines without it."""

import logging
import sys

import numpy as np
import pytest

from vidaccel.clips import cvvdp as cvvdp_module
from vidaccel.clips.cvvdp import cvvdp, load_cvvdp
from vidaccel.errors import MetricUnavailable, VideoError

CLIP = np.random.default_rng(0).integers(60, 190, (3, 24, 24, 3), dtype=np.uint8)


@pytest.fixture
def installed():
    pytest.importorskip("pycvvdp")


def test_equal_clips_have_ten_and_damage_takes_from_it(installed):
    damaged = CLIP.copy()
    damaged[1] = 255 - CLIP[1]
    jod, frames = cvvdp(CLIP, CLIP)
    assert jod == pytest.approx(10, abs=1e-3) and frames == pytest.approx([10] * 3, abs=1e-3)
    jod, frames = cvvdp(CLIP, damaged)
    assert jod < 9.5 and int(np.argmin(frames)) >= 1
    assert min(frames) < jod < max(frames)


@pytest.mark.parametrize("size", [(1, 24, 24), (2, 17, 25), (2, 5, 5)])
def test_pictures_and_odd_sizes_have_one(installed, size):
    clip = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    jod, frames = cvvdp(clip, clip)
    assert len(frames) == size[0]
    assert jod == pytest.approx(10, abs=1e-3)


def test_what_would_take_a_cpu_many_minutes_is_left(installed, monkeypatch):
    monkeypatch.setattr(cvvdp_module, "MOST_ON_CPU", 2 * 24 * 24)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MetricUnavailable, match="many minutes on a CPU"):
        cvvdp(CLIP, CLIP)
    assert cvvdp(CLIP[:2], CLIP[:2])[0] > 9.9


def test_its_import_leaves_the_path_and_the_log_alone(installed):
    load_cvvdp.cache_clear()
    path, disabled = list(sys.path), logging.root.manager.disable
    load_cvvdp()
    assert sys.path == path
    assert logging.root.manager.disable == disabled


def test_without_the_package_it_says_what_to_install(monkeypatch):
    load_cvvdp.cache_clear()
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    with pytest.raises(MetricUnavailable, match=r"cvvdp.*pip install \"vidaccel\[metrics\]\""):
        cvvdp(CLIP, CLIP)


def test_two_shapes_are_refused():
    with pytest.raises(VideoError, match=r"\[3, 24, 24, 3\], found \[2, 24, 24, 3\]"):
        cvvdp(CLIP, CLIP[:2])
