"""Fixtures on the tiny random pipelines."""

import diffusers
import pytest
from packaging.version import Version
from tiny import CASES, CORE, NO_BATCH, NO_OTHER_SCHEDULER, SINCE, Case


def _built(name: str) -> Case:
    since = SINCE.get(name, "0")
    if Version(diffusers.__version__) < Version(since):
        pytest.skip(f"{name} needs diffusers {since}, found {diffusers.__version__}")
    case = CASES[name]()
    case.batch, case.scheduler = NO_BATCH.get(name, ""), NO_OTHER_SCHEDULER.get(name, "")
    return case


@pytest.fixture(params=CORE)
def case(request: pytest.FixtureRequest) -> Case:
    """A pipeline of each kind."""
    return _built(request.param)


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> Case:
    """A pipeline of each supported family."""
    return _built(request.param)
