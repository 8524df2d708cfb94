"""The tiny random pipelines as fixtures; every test runs on one thread, in a folder of its own."""

from pathlib import Path

import diffusers
import pytest
import torch
from packaging.version import Version

from tiny import (
    BATCH_SINCE,
    CASES,
    CORE,
    NO_BATCH,
    NO_OTHER_SCHEDULER,
    PER_PROMPT,
    SINCE,
    Case,
)

# Results depend on the number of threads, and several processes run tests at once.
torch.set_num_threads(1)

# The mark of every test that uses a fixture.
MARKS = {
    "browser": pytest.mark.browser,
    "cluster": pytest.mark.slow,
    "distributions": pytest.mark.slow,
    "ranks": pytest.mark.slow,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a fixture of `MARKS`."""
    for item in items:
        for name in MARKS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(MARKS[name])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test in a folder of its own: none needs the repository there, or leaves files in it.

    What the user of this machine has learned is out of sight as well.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDACCEL_HOME", str(tmp_path / "vidaccel-home"))


@pytest.fixture(autouse=True)
def on_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what other programs do meanwhile out of the notes on a run."""
    monkeypatch.setattr("vidaccel.clips.stopwatch.STAT", tmp_path / "no-stat")


def _built(name: str) -> Case:
    if since := _too_old(SINCE, name):
        pytest.skip(f"{name} {since}")
    case = CASES[name]()
    case.batch = NO_BATCH.get(name, _too_old(BATCH_SINCE, name))
    case.scheduler = NO_OTHER_SCHEDULER.get(name, "")
    case.per_prompt = PER_PROMPT.get(name, "")
    return case


def _too_old(since: dict[str, str], name: str) -> str:
    """That the installed diffusers is too old for a case; empty if it is not."""
    needed = since.get(name, "0")
    if Version(diffusers.__version__) >= Version(needed):
        return ""
    return f"needs diffusers {needed}, found {diffusers.__version__}"


@pytest.fixture(params=CORE)
def case(request: pytest.FixtureRequest) -> Case:
    """A pipeline of each kind."""
    return _built(request.param)


@pytest.fixture(
    params=[
        name if name in CORE else pytest.param(name, marks=pytest.mark.repeats) for name in CASES
    ]
)
def family(request: pytest.FixtureRequest) -> Case:
    """A pipeline of each supported family."""
    return _built(request.param)
