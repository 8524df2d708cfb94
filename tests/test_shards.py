"""Folders of shards: what they keep, whose they are, and what is damaged."""

import json

import pytest

from vidaccel import shards
from vidaccel.errors import BenchError, BuildError
from vidaccel.shards import ShardFolder


def test_a_shard_is_there_when_it_was_written(tmp_path):
    folder = ShardFolder(tmp_path / "deep" / "work", {"steps": 5}, "run", BenchError)
    assert folder.read("b-1") is None and folder.names("*-1") == []
    folder.write("b-1", {"psnr": float("inf")})
    folder.write("a-1", [1, 2])
    folder.write("a-2", [])
    again = ShardFolder(tmp_path / "deep" / "work", {"steps": 5}, "run", BenchError)
    assert again.read("b-1") == {"psnr": float("inf")}
    assert again.read("a-1", sum) == 3 and again.read("a-2") == []
    assert again.names("*-1") == ["a-1", "b-1"]
    assert not list(again.path.glob(".*"))


def test_a_folder_of_another_measurement_is_refused(tmp_path):
    ShardFolder(tmp_path, {"prompts": ("a",), "steps": 5}, "build", BuildError)
    ShardFolder(tmp_path, {"prompts": ["a"], "steps": 5}, "build", BuildError)
    for manifest, named in (
        ({"prompts": ["a"], "steps": 6}, "its steps differs"),
        ({"steps": 5}, "its prompts differs"),
        ({"prompts": ["b"], "steps": 5, "metric": "l1"}, "its metric, prompts differ"),
    ):
        with pytest.raises(BuildError, match=f"belongs to another build: {named}; use another"):
            ShardFolder(tmp_path, manifest, "build", BuildError)


@pytest.mark.parametrize("text", ["[[", "", "null", '{"error": "much"}', '{"other": 1}', "[1]"])
def test_a_damaged_shard_is_named(text, tmp_path):
    folder = ShardFolder(tmp_path, {}, "build", BuildError)
    (tmp_path / "trial-1.json").write_text(text)
    with pytest.raises(BuildError, match=r"cannot read .*trial-1\.json .*; remove it and run"):
        folder.read("trial-1", lambda data: float(data["error"]))


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_manifest_is_named(text, tmp_path):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(BenchError, match=r"cannot read .*task\.json"):
        ShardFolder(tmp_path, {}, "run", BenchError)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    folder = ShardFolder(tmp_path, {}, "run", BenchError)

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_text", full)
    with pytest.raises(BenchError, match=r"No space left on device; .* goes on from there"):
        folder.write("a", 1)
    assert json.loads((tmp_path / "task.json").read_text()) == {}
