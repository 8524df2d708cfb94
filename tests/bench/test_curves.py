"""Points from records, and curves from points."""

import json
from pathlib import Path

import pytest

from tiny.points import point
from vidaccel.bench import curves
from vidaccel.bench.curves import QualityResult, plain_summary, points_of
from vidaccel.bench.records import PlainRecord, VariantRecord, key_of


def test_front_keeps_what_is_not_beaten():
    points = [point("a", *xy) for xy in ((1.5, 50), (2, 40), (1.9, 39), (3, 41), (4, 30))]
    assert [p.speedup for p in curves.front(points)] == [1.5, 3, 4]


def test_equal_time_is_linear_in_time():
    points = [point("a", 1.0, 60.0), point("a", 2.0, 40.0), point("b", 2.5, 30.0)]
    equal = curves.equal_time(points)
    # 1 / 1.5 of the time lies a third of the way from 1 / 2 to 1.
    assert equal["a"]["1.5"].psnr == pytest.approx(40 + 20 / 3)
    assert equal["a"]["1.5"].worst_psnr == pytest.approx(38 + 20 / 3)
    assert equal["a"]["1.5"].lpips is None
    assert equal["a"]["2"].psnr == 40
    assert "3" not in equal["a"]
    assert list(equal["b"]) == ["2.5"]


def plain(at, seconds, session=1, digest="same"):
    """A plain generation."""
    return PlainRecord(**timing(at, seconds, session), digest=digest, adherence=None)


def measured(method, at, seconds, **others):
    """A generation of a method."""
    values = {"psnr": 30.0, "ssim": 0.9, "lpips": None, "flicker": 0.0, "adherence": None}
    return VariantRecord(method=method, setting={}, **timing(at, seconds), **(values | others))


def timing(at, seconds, session=1):
    times = {"at": at, "seconds": seconds, "cpu_seconds": seconds / 2, "denoising_seconds": None}
    return {"session": session, "blocks": 10, **times}


def test_speedups_come_from_the_plain_runs_beside():
    records = [
        plain(0, 100.0, session=0),
        plain(1, 8.0),
        measured("a", 2, 4.0),
        plain(3, 16.0),
        plain(4, 100.0),
    ]
    points, failed = points_of([records], [key_of("a", {})], "wall")
    assert points[0].wall_speedup == points[0].speedup == 3.0
    assert not failed
    # A prompt that is still missing: no point yet.
    both = [records, [plain(1, 8.0)]]
    assert points_of(both, [key_of("a", {})], "wall") == ([], {})


def test_whether_plain_clips_stay_the_same_is_measured():
    same = [plain(0, 1.0), measured("a", 1, 1.0), plain(2, 1.0)]
    assert plain_summary([same, same]).bit_equal_after_every_method
    changed = [*same[:2], plain(2, 1.0, digest="another")]
    assert not plain_summary([same, changed]).bit_equal_after_every_method
    # Nobody looked after the last method.
    assert not plain_summary([same[:2]]).bit_equal_after_every_method


def without_missing(value):
    """A result without what was not measured, or not known yet when the file was written."""
    if isinstance(value, dict):
        return {name: without_missing(each) for name, each in value.items() if each is not None}
    return [without_missing(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["quality", "combinations"])
def test_result_files_are_read_as_they_were_written(name):
    file = Path(__file__).parents[2] / "assets" / "results" / f"{name}.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(QualityResult.from_dict(stored).to_dict()))
    assert without_missing(found) == without_missing(stored)
