"""`vidaccel env` and `vidaccel hosts`."""

import json

import torch

import vidaccel
from vidaccel.environment import environment

TORCH = torch.__version__.partition("+")[0]


def test_env_for_people_and_programs(run):
    code, stdout, _ = run("env")
    assert code == 0
    assert TORCH in stdout and "WanTransformer3DModel" in stdout
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
    assert code == 0 and "`WanPipeline`" in stdout and stdout.startswith("|")
