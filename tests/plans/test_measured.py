"""The records of clips that were measured: kept whole, bounded, by several processes."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from vidaccel.plans import measured
from vidaccel.plans.measured import MOST_RECORDS, MeasuredClip, add, forget, read, validation_of
from vidaccel.plans.plan import Plan

PLAN = Plan((0, 2, 5), 8)


def _clip(seed=0, psnr=40.0, plan=PLAN, ssim=0.9):
    return MeasuredClip.of(plan, "a red circle", seed, psnr=psnr, ssim=ssim, speedup=2.0)


def _add_many(place: str, first: int) -> None:
    for seed in range(first, first + 10):
        add(Path(place), _clip(seed))


def test_a_record_comes_back_and_holds_no_prompt(tmp_path):
    add(tmp_path / "new", _clip())
    assert read(tmp_path / "new") == [_clip()]
    (file,) = (tmp_path / "new").iterdir()
    assert "circle" not in file.read_text()
    add(tmp_path / "new", _clip(psnr=30.0))
    assert [clip.psnr for clip in read(tmp_path / "new")] == [30.0]
    forget(tmp_path / "new")
    assert not (tmp_path / "new").exists() and read(tmp_path / "new") == []


def test_equal_clips_count_as_much_as_can_be_averaged():
    assert _clip(psnr=float("inf")).psnr == measured.MOST_DECIBELS


def test_only_the_newest_are_kept(tmp_path):
    for seed in range(MOST_RECORDS + 3):
        add(tmp_path, _clip(seed))
        newest = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, ns=(seed + 1, seed + 1))
    # Those of times long ago are the older ones.
    add(tmp_path, _clip(1000))
    found = {clip.seed for clip in read(tmp_path)}
    assert len(found) == MOST_RECORDS and 1000 in found and 0 not in found


def test_damaged_foreign_and_newer_files_are_passed_over(tmp_path):
    add(tmp_path, _clip())
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "d.json").write_text(_clip().model_dump_json().replace("40.0", "NaN"))
    (tmp_path / "e.json").mkdir()
    assert read(tmp_path) == [_clip()]


@pytest.mark.slow
def test_several_processes_lose_nothing(tmp_path):
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(_add_many, [str(tmp_path)] * 3, [0, 10, 20]))
    assert {clip.seed for clip in read(tmp_path)} == set(range(30))


def test_records_come_to_a_validation():
    other = Plan((0, 1, 2, 4), 8)
    records = [_clip(0, 40.0), _clip(1, 30.0), _clip(0, 50.0, other, ssim=None)]
    three, four = validation_of(records)
    assert (three.budget, three.psnr, three.worst_psnr) == (3, 35.0, 30.0)
    assert three.kept and "2 clips" in three.candidate and three.ssim == pytest.approx(0.9)
    assert (four.budget, four.psnr, four.ssim) == (4, 50.0, None)
