"""Pipelines that run a schedule several times, or call a model often in a step."""

from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version

from tiny import CASES, SINCE, STEPS
from vidaccel import DBCache, Plan, accelerate, report
from vidaccel.engine.stats import Call, CallStats

# Name of the case -> its windows, chunks, sections, stages or tiles, and the calls of one step.
WINDOWS = {
    "helios": (2, ["cond", "uncond"]),
    "helios_pyramid": (3, ["cond", "uncond"]),
    "framepack": (2, ["cond"]),
    "skyreels_df_long": (3, ["cond", "uncond"]),
    "skyreels_df_v2v": (3, ["cond", "uncond"]),
    "wan_animate": (2, ["cond", "uncond"]),
    "kandinsky6_sr": (4, ["cond"]),
    "ltx2": (1, ["cond_uncond", "uncond_stg", "uncond_modality"]),
}
PLAN = Plan((0, 1, 4), STEPS)
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2)


@pytest.fixture(params=WINDOWS)
def name(request: pytest.FixtureRequest) -> str:
    since = SINCE.get(request.param, "0")
    if Version(diffusers.__version__) < Version(since):
        pytest.skip(f"{request.param} needs diffusers {since}")
    return request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call of the transformer: a report knows those of the last window only."""
    made: list[Call] = []
    add = CallStats.add

    def note(stats: CallStats, call: Call, *others: Any) -> None:
        made.append(call)
        add(stats, call, *others)

    monkeypatch.setattr(CallStats, "add", note)
    return made


def expected(name: str, letters: str) -> list[tuple[int, str, bool]]:
    windows, branches = WINDOWS[name]
    steps = list(enumerate(letters))
    return [
        (step, branch, letter != "C")
        for _ in range(windows)
        for step, letter in steps
        for branch in branches
    ]


@pytest.mark.parametrize(
    ("settings", "letters"),
    [
        ({"policy": PLAN, "cache": None}, "CC--C-"),
        ({"policy": [0], "cache": None}, "C-----"),
        ({"policy": None, "cache": EAGER}, "CppCpp"),
        ({"policy": PLAN, "cache": DBCache(threshold=0)}, "CCCCCC"),
    ],
    ids=["plan", "first step", "cache", "guard"],
)
def test_every_window_begins_anew_and_its_branches_go_together(
    name: str, settings: dict[str, Any], letters: str, calls: list[Call]
):
    case = CASES[name]()
    accelerate(case.pipe, **settings)
    case.run()
    assert [(call.step, call.branch, call.reused) for call in calls] == expected(name, letters)
    assert report(case.pipe).transformers[0].bytes_held == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": None, "cache": DBCache(threshold=0, warmup_steps=0)},
        {"policy": Plan.every(1, STEPS), "cache": None},
        {"policy": Plan.every(1, STEPS), "cache": EAGER},
    ],
    ids=["threshold 0", "plan of all steps", "plan of all steps, cache"],
)
def test_windows_that_reuse_nothing_are_those_of_the_plain_pipeline(
    name: str, settings: dict[str, Any]
):
    case = CASES[name]()
    plain = case.run()
    accelerate(case.pipe, **settings)
    assert torch.equal(case.run(), plain)


def test_the_last_window_alone_answers_as_it_does_after_the_others(name: str, calls: list[Call]):
    case = CASES[name]()
    windows, branches = WINDOWS[name]
    model = case.pipe.transformer
    heard: list[tuple[Any, Any, Any]] = []

    def hear(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        heard.append((args, dict(kwargs), output))

    accelerate(case.pipe, policy=PLAN, cache=None)
    handle = model.register_forward_hook(hear, with_kwargs=True)
    case.run()
    handle.remove()
    last = STEPS * len(branches)
    assert len(heard) == len(calls) == windows * last
    # The scheduler still has the table of the last window; a new engine knows nothing.
    accelerate(case.pipe, policy=PLAN, cache=None)
    for call, (args, kwargs, output) in zip(calls[-last:], heard[-last:], strict=True):
        named = hasattr(model, "cache_context")
        with torch.no_grad(), model.cache_context(call.branch) if named else nullcontext():
            alone = model(*args, **kwargs)
        assert torch.equal(alone[0], output[0])
