"""Fixtures on the tiny random pipelines, and how to look at what they do."""

from typing import Any

import diffusers
import pytest
from packaging.version import Version
from tiny import CASES, CORE, NO_BATCH, NO_OTHER_SCHEDULER, SINCE, STEPS, Case, embeds, generator
from tiny.hunyuan import hunyuan
from tiny.wan import wan, wan22, wan_v2v, wan_vace

from vidaccel.hosts import find_transformers

__all__ = [
    "CASES",
    "STEPS",
    "Case",
    "count_blocks",
    "embeds",
    "generator",
    "hunyuan",
    "transformers_of",
    "wan",
    "wan22",
    "wan_v2v",
    "wan_vace",
]


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


def transformers_of(pipe: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def count_blocks(pipe: Any) -> dict[str, int]:
    """Counts the calls of every real block with hooks of its own; the dict is live."""
    counts = {"blocks": 0}

    def count(module: Any, args: Any) -> None:
        counts["blocks"] += 1

    for transformer, host in find_transformers(pipe).values():
        for blocks in host.blocks:
            for block in transformer._modules[blocks.name]:
                block.register_forward_pre_hook(count)
    return counts
