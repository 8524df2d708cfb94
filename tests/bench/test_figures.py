"""The figure of quality against speed; that of sparse attention is drawn in its own test."""

import pytest

from tiny.points import point
from vidaccel.bench.curves import PlainSummary, QualityResult
from vidaccel.bench.figures import draw_quality


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    methods = ["vidaccel plan", "evenly spaced", "MagCache", "SeaCache"]
    points = [point(m, s, 60 - 8 * s - i) for i, m in enumerate(methods) for s in (1.5, 2, 3)]
    result = QualityResult({}, PlainSummary(4.0, 3.0, 1000, None, True), points, {}, {})
    draw_quality(result, tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000
