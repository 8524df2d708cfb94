"""`vidaccel env` and `vidaccel hosts`."""

import json
import re
import sys

import pytest
import torch

import vidaccel
from vidaccel.cli.env import capabilities
from vidaccel.clips import metrics
from vidaccel.clips.cvvdp import load_cvvdp
from vidaccel.environment import environment
from vidaccel.hosts import BlockList, HostSpec
from vidaccel.hosts.registry import HOSTS, families_of_diffusers, left_out_list, markdown_table

TORCH = torch.__version__.partition("+")[0]


def test_env_for_people_and_programs(run):
    code, stdout, _ = run("env")
    assert code == 0
    assert TORCH in stdout and "families of models, which vidaccel hosts lists" in stdout
    assert "HunyuanVideo 1.5" in " ".join(stdout.split())
    assert max(map(len, stdout.splitlines())) < 200
    code, stdout, _ = run("env", "--json")
    found = json.loads(stdout)
    assert found["packages"]["torch"] == TORCH
    assert found["works"]["video files"].startswith("yes")
    assert found["works"]["embedded model"].startswith("yes")


def test_every_place_tells_the_same_version(run):
    assert environment()["vidaccel"] == vidaccel.__version__
    assert run("--version")[1] == f"vidaccel {vidaccel.__version__}\n"


def test_hosts_prints_a_row_for_each_model(run):
    code, stdout, _ = run("hosts")
    assert code == 0 and max(map(len, stdout.splitlines())) <= 100
    told = " ".join(stdout.split())
    for row in HOSTS.values():
        if row.is_left_out:
            assert row.family in told and row.unsupported in told
        else:
            assert f"\n{row.family or row.transformer} " in stdout
    notes = dict(re.findall(r"^\((\d+)\) (.*)", stdout, re.MULTILINE))
    latte = next(line for line in stdout.splitlines() if line.startswith("Latte "))
    assert notes[re.search(r"no \((\d+)\)", latte)[1]].startswith("attention within a frame")
    assert "|" not in stdout
    assert run("hosts", "--markdown")[1] == f"{markdown_table()}\n\n{left_out_list()}\n"


def test_families_of_later_releases_are_told_apart(run, monkeypatch):
    row = HostSpec("ComingTransformer3DModel", (), (BlockList("blocks"),), family="Coming")
    monkeypatch.setitem(HOSTS, row.transformer, row)
    here, later = families_of_diffusers()
    assert "LTX-Video" in here and "Coming" not in here
    assert "Coming" in later and "\nlater Diffusers" in run("env")[1]


def test_lpips_is_usable_when_its_weights_are_there(run, tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    file = tmp_path / "alex.pth"
    monkeypatch.setattr(metrics, "lpips_weights", lambda: ("https://weights", file))
    assert "\nLPIPS             not yet: installed, its weights are not; " in run("env")[1]
    file.touch()
    assert capabilities()["LPIPS"] == "yes"


def test_what_is_installed_and_does_not_work_is_told(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("vidaccel.cli.env.import_module", broken)
    found = capabilities()
    for part in ("LPIPS", "SSIM"):
        assert found[part].startswith("no: installed, but it does not work here (operator")
    monkeypatch.setattr("vidaccel.cli.env.find_spec", lambda name: None)
    assert capabilities()["SSIM"] == 'no: pip install "vidaccel[metrics]"'


def test_vmaf_and_colorvideovdp_say_what_is_missing(monkeypatch):
    load_cvvdp.cache_clear()
    monkeypatch.setattr("vidaccel.clips.vmaf.why_no_vmaf", lambda: "its ffmpeg is too small")
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    found = capabilities()
    assert found["VMAF"] == "no: its ffmpeg is too small"
    assert found["ColorVideoVDP"].startswith("no: it needs the package cvvdp")
    monkeypatch.setattr("vidaccel.clips.vmaf.why_no_vmaf", lambda: "")
    assert capabilities()["VMAF"] == "yes"
