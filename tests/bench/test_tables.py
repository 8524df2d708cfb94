"""Tables of quality against speed."""

from tiny.points import point
from vidaccel.bench.curves import PlainSummary, QualityResult, equal_time
from vidaccel.bench.tables import equal_time_table, points_table, quality_table


def test_a_row_per_method_at_equal_times():
    points = [point("a", 1.0, 60.0), point("a", 2.0, 40.0), point("b", 2.5, 30.0)]
    table = equal_time_table(equal_time(points))
    assert table.splitlines()[1].split() == [
        *("a", "46.7", "(44.7)", "40.0", "(38.0)"),
        *4 * ["-"],
    ]


def test_what_was_left_out_stands_below():
    points = [point("vidaccel plan", s, 60 - 8 * s) for s in (1.5, 2, 3)]
    settings = {"prompts": ["a", "bb"], "clock": "wall"}
    plain = PlainSummary(4.0, 3.0, 1000, None, True)
    text = quality_table(QualityResult(settings, plain, points, {}, {}, {"x": "why"}))
    assert text.startswith("2 prompts; plain 4.00 s")
    assert text.endswith("x: why")


def test_measures_that_every_point_has_get_a_table():
    settings = {"prompts": ["a"], "clock": "cpu"}
    plain = PlainSummary(4.0, 3.0, 1000, None, True)
    more = {"vmaf": 95.0, "worst_vmaf": 90.0, "cvvdp": 9.5, "worst_cvvdp": 9.25}
    more |= {"worst_frame_psnr": 31.25}
    points = [point("a", s, 60 - 8 * s, **more) for s in (1.5, 2, 3)]
    text = quality_table(QualityResult(settings, plain, points, {}, {}))
    assert "\nVMAF:\n" in text and "95.0 (90.0)" in text
    assert "\nColorVideoVDP:\n" in text and "9.50 (9.25)" in text
    row = points_table(QualityResult(settings, plain, points, {}, {})).splitlines()[2].split()
    assert row[-6:] == ["31.2", "-", "95.0", "9.50", "+0.00", "-"]
    older = [*points, point("b", 2, 40)]
    assert "VMAF" not in quality_table(QualityResult(settings, plain, older, {}, {}))
