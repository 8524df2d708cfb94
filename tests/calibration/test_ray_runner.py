"""Measuring on a real local Ray cluster of two workers."""

import os
import signal
import sys
from collections import Counter

import pytest

from tiny import embeds
from tiny.wan import wan
from vidaccel.calibration import ray_runner
from vidaccel.calibration.build import build_policy
from vidaccel.calibration.task import SegmentsFrom
from vidaccel.errors import BuildError, PlanError

ray = pytest.importorskip("ray")
STEPS = 5


class Prompts:
    """Stands in for a text encoder; a class, so that it travels to the workers."""

    def __call__(self, prompt, negative_prompt=None, **_):
        return embeds(len(prompt)), embeds(99)


def pipeline():
    pipe = wan().pipe
    pipe.encode_prompt = Prompts()
    return pipe


def build_for(pipe, prompts=("a", "bb"), **options):
    call = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}
    arguments = {"num_inference_steps": STEPS, "max_skip": 3, "call_kwargs": call}
    return build_policy(
        pipe, prompts, **arguments | {"validate": False, "progress": False} | options
    )


@pytest.fixture(scope="module")
def cluster():
    """Room for two workers, which can import what is beside this file."""
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def test_a_killed_worker_changes_nothing(cluster, tmp_path, monkeypatch):
    expected = build_for(pipeline())
    mark = str(tmp_path / "died")

    class Mortal(ray_runner.RayWorker):
        """Dies, as a killed process does, when one item is measured for the first time."""

        def measure(self, sample, item):
            if (sample, item) == (1, SegmentsFrom(2)) and not os.path.exists(mark):
                open(mark, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().measure(sample, item)

    monkeypatch.setattr(ray_runner, "RayWorker", Mortal)
    monkeypatch.setattr(ray_runner, "REPLACEMENTS", 0)  # the other one takes over
    work = tmp_path / "work"
    assert build_for(pipeline(), workers=2, workdir=work) == expected
    assert os.path.exists(mark)
    shards = Counter(path.name[:11] for path in work.glob("sample-*.json"))
    assert shards == {"sample-0000": STEPS - 1, "sample-0001": STEPS - 1}
    assert ray.is_initialized()  # it was there before, and is left running


def test_plans_improved_by_workers_are_the_same(cluster, tmp_path):
    options = {"num_inference_steps": 8, "method": "gain", "validate": True, "improve": 5}
    expected = build_for(pipeline(), **options)
    found = build_for(pipeline(), workers=2, workdir=tmp_path, **options)
    assert found.plans == expected.plans
    assert list(tmp_path.glob("trial-*.json"))


def test_workers_that_keep_dying_end_the_build(cluster, monkeypatch):
    class Dead:
        def __init__(self, load, task):
            os._exit(1)

        def run_info(self):
            pass

    monkeypatch.setattr(ray_runner, "RayWorker", Dead)
    with pytest.raises(BuildError, match=r"all workers died: .*; run again to go on"):
        build_for(pipeline(), workers=1)


def test_ray_that_is_missing_or_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BuildError, match=r'pip install "vidaccel\[ray\]"'):
        build_for(pipeline(), workers=2)
    with pytest.raises(PlanError, match="workers: found -1"):
        build_for(pipeline(), workers=-1)
