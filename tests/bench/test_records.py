"""Records of generations: what shards keep, and what is read from them."""

import json

import pytest

from vidaccel.bench.records import (
    FailedRecord,
    PlainRecord,
    RecordFolder,
    VariantRecord,
    is_plan,
    record_of,
)
from vidaccel.errors import BenchError

TIMES = {"session": 7, "at": 1.5, "seconds": 2.0, "cpu_seconds": 1.0, "denoising_seconds": None}
SHOWN = {"color": True, "background": True, "motion": False}
PLAIN = {**TIMES, "blocks": 10, "method": None, "setting": {}, "digest": "ab", "adherence": SHOWN}
VARIANT = {
    **TIMES,
    "blocks": 6,
    "method": "vidaccel plan",
    "setting": {"steps": [0, 1, 3]},
    "psnr": float("inf"),
    "ssim": 1.0,
    "lpips": None,
    "flicker": 0.0,
    "adherence": None,
}
FAILED = {"method": "MagCache", "setting": {"threshold": 0.1}, "failed": "ValueError: no"}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PLAIN, PlainRecord),
        (VARIANT, VariantRecord),
        (VARIANT | {"steps_share": 0.5, "density": 0.3}, VariantRecord),
        (VARIANT | {"vmaf": 95.0, "cvvdp": 9.8, "worst_frames": {"psnr": 31.5}}, VariantRecord),
        (FAILED, FailedRecord),
    ],
)
def test_a_shard_is_read_as_it_was_written(data, kind):
    record = record_of(json.loads(json.dumps(data)))
    assert type(record) is kind
    assert record.to_dict() == data


def test_records_are_kept_by_prompt(tmp_path):
    folder = RecordFolder(tmp_path, {"seed": 0})
    plain, variant = record_of(PLAIN), record_of(VARIANT)
    folder.add("a", "plain-1", plain)
    folder.add("a", "x", variant)
    folder.add("bb", "x", record_of(FAILED))
    again = RecordFolder(tmp_path, {"seed": 0})
    assert again.plain("a") == [plain] and list(again.measured("a").values()) == [variant]
    assert again.plain("bb") == [] and again.records("c") == []
    with pytest.raises(BenchError, match="belongs to another run: its seed differs"):
        RecordFolder(tmp_path, {"seed": 1})


def test_a_shard_with_a_part_missing_is_named(tmp_path):
    folder = RecordFolder(tmp_path, {})
    folder.add("a", "plain-1", record_of(PLAIN))
    (shard,) = tmp_path.glob("*-plain-1.json")
    shard.write_text(json.dumps({name: PLAIN[name] for name in ("method", "setting", "at")}))
    with pytest.raises(BenchError, match=shard.name):
        RecordFolder(tmp_path, {}).records("a")


def test_a_plan_alone_is_told_from_other_settings():
    assert is_plan({"steps": [0, 2], "orders": [1]})
    assert not is_plan({"steps": 3})
    assert not is_plan({"steps": [0, 2], "threshold": 0.1})
