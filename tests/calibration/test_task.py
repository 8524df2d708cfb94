"""The work of a build cut into items: their shards' names and what they cost."""

import json

import pytest

from vidaccel.calibration.segment_errors import Errors, segments
from vidaccel.calibration.task import AllByGain, OneSegment, SegmentsFrom, Task, read_task
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.errors import BuildError
from vidaccel.plans.plan import Plan

STEPS = 6


def task(method="exact"):
    return Task(("a", "b"), (0, 1), STEPS, 3, method, {"height": 16}, {})


def test_exact_work_is_cut_by_the_start_of_segments():
    items = task().items()
    assert items == [SegmentsFrom(start) for start in range(STEPS - 1)]
    assert [item.name for item in items] == ["0000", "0001", "0002", "0003", "0004"]
    forwards = sum(item.forwards(task()) for item in items)
    assert forwards == sum(STEPS - end for _, end in segments(STEPS, 3))
    # The reference of each sample, and once half of one for the noise floor.
    assert task().forwards() == 4 * (STEPS + forwards) + STEPS // 2


def test_estimated_work_is_one_item():
    assert task("gain").items() == task("lazy").items() == [AllByGain()]
    assert AllByGain().name == "all"
    assert AllByGain().forwards(task("gain")) == STEPS - 2  # one exact segment to step 2
    assert task("lazy").forwards() > task("gain").forwards()
    assert OneSegment(1, 4).forwards(task("lazy")) == STEPS - 4


def test_a_work_folder_keeps_each_item_in_a_file_of_its_own(tmp_path):
    folder = WorkFolder(tmp_path, task())
    held, lines = {(2, 4): 0.5, (2, 5): 1.5}, {(2, 4, 1): (0.1, 0.2, 0.3, 0.4)}
    errors = {
        SegmentsFrom(2): Errors(held, lines),
        OneSegment(2, 4): Errors({(2, 4): 0.25}),
        AllByGain(): Errors(held),
    }
    for item, found in errors.items():
        assert folder.load(3, item) is None
        folder.save(3, item, found)
    assert {path.name for path in tmp_path.iterdir()} == {
        "task.json",
        "sample-0003-0002.json",
        "sample-0003-0002-0004.json",
        "sample-0003-all.json",
    }
    text = (tmp_path / "sample-0003-0002.json").read_text()
    assert json.loads(text) == [[2, 4, 0.5], [2, 5, 1.5], [2, 4, 1, [0.1, 0.2, 0.3, 0.4]]]
    again = WorkFolder(tmp_path, read_task(tmp_path))
    assert {item: again.load(3, item) for item in errors} == errors


def test_a_work_folder_keeps_the_errors_of_whole_runs(tmp_path):
    folder = WorkFolder(tmp_path, task())
    plan, other = Plan((0, 2, 4), STEPS), Plan((0, 2, 4), STEPS).forecast(1)
    folder.save_trial(0, plan, 0.5)
    assert folder.load_trial(0, plan) == 0.5
    assert folder.load_trial(0, other) is None and folder.load_trial(1, plan) is None


def test_a_folder_without_a_task_is_no_work_folder(tmp_path):
    with pytest.raises(BuildError, match="is no work folder of a build"):
        read_task(tmp_path)
