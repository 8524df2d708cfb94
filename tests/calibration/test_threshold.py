"""Suggested thresholds: what is predicted from one recorded run is what a run then does."""

import pytest
import torch

from tiny import STEPS
from tiny.hunyuan import hunyuan
from tiny.wan import wan, wan22
from vidaccel import DBCache, Plan, accelerate, report, suggest_threshold
from vidaccel.errors import PlanError

FREE = DBCache(warmup_steps=1, max_consecutive=None)


def settings(case):
    call = {k: v for k, v in case.kwargs.items() if k != "num_inference_steps"}
    return {"num_inference_steps": STEPS, "call_kwargs": call, "progress": False}


@pytest.fixture(params=[wan, wan22, hunyuan])
def spoken(request):
    """A pipeline whose prompt is ignored: the embeddings say what to show."""
    case = request.param()
    plain = case.pipe.encode_prompt
    case.pipe.encode_prompt = lambda *args, **kwargs: plain(
        *(None if i == 0 else a for i, a in enumerate(args)), **{**kwargs, "prompt": None}
    )
    case.pipe.check_inputs = lambda *args, **kwargs: None
    return case


def test_the_measured_speedup_is_at_least_the_wanted_one(spoken):
    found = suggest_threshold(spoken.pipe, "x", speedup=1.3, cache=FREE, **settings(spoken))
    assert found.speedup >= 1.3
    assert 0 < found.error < 1
    assert "_vidaccel_engine" not in vars(spoken.pipe.transformer)
    # The same numbers come out of a run with what was suggested.
    accelerate(spoken.pipe, policy=None, cache=found.cache)
    spoken.run()
    shown = report(spoken.pipe).transformers
    branches = [row for part in shown for row in part.branches]
    ratio = sum(b.blocks_without_vidaccel for b in branches) / sum(b.blocks_run for b in branches)
    assert found.speedup == pytest.approx(ratio)
    assert found.steps_computed == sum(part.timeline.count("C") for part in shown)


def test_a_lower_threshold_would_not_have_been_enough(spoken):
    found = suggest_threshold(spoken.pipe, "x", speedup=1.3, cache=FREE, **settings(spoken))
    higher = suggest_threshold(spoken.pipe, "x", speedup=1.6, cache=FREE, **settings(spoken))
    assert found.threshold <= higher.threshold
    assert found.error <= higher.error


def test_the_measured_error_is_within_the_wanted_one():
    case = wan()
    plain = case.pipe.encode_prompt
    case.pipe.encode_prompt = lambda *args, **kwargs: plain(**{**kwargs, "prompt": None})
    case.pipe.check_inputs = lambda *args, **kwargs: None
    reference = case.run()
    errors = {}
    for computed in range(2, STEPS):
        plan = Plan(tuple(range(computed)), STEPS)
        accelerate(case.pipe, policy=plan, cache=DBCache(threshold=1e9))
        latents = case.run()
        errors[computed] = float((latents - reference).abs().mean() / reference.abs().mean())
    bound = sorted(errors.values())[-1]
    found = suggest_threshold(case.pipe, "x", max_error=bound, cache=FREE, **settings(case))
    assert 0 < found.error <= bound
    accelerate(case.pipe, policy=None, cache=found.cache)
    latents = case.run()
    off = float((latents - reference).abs().mean() / reference.abs().mean())
    assert off == pytest.approx(found.error, rel=1e-5)
    assert not torch.equal(latents, reference)


def test_wishes_that_cannot_be_fulfilled_say_why():
    case = wan()
    plain = case.pipe.encode_prompt
    case.pipe.encode_prompt = lambda *args, **kwargs: plain(**{**kwargs, "prompt": None})
    case.pipe.check_inputs = lambda *args, **kwargs: None
    held = settings(case)
    with pytest.raises(PlanError, match=r"1\.00 times is the most with warmup_steps=6"):
        suggest_threshold(case.pipe, "x", speedup=2, cache=DBCache(warmup_steps=6), **held)
    with pytest.raises(PlanError, match="raise max_error"):
        suggest_threshold(case.pipe, "x", max_error=1e-12, cache=FREE, **held)
    assert "_vidaccel_engine" not in vars(case.pipe.transformer)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "either speedup or max_error"),
        ({"speedup": 2, "max_error": 0.1}, "either speedup or max_error"),
        ({"speedup": 1}, "speedup is a number above 1, found 1"),
        ({"speedup": float("nan")}, "speedup is a number above 1"),
        ({"max_error": 0}, "max_error is a number above 0"),
        ({"speedup": 2, "cache": DBCache(probe_blocks=0)}, "nothing to compare"),
    ],
)
def test_wrong_wishes_are_refused_before_any_run(wish, message):
    with pytest.raises(PlanError, match=message):
        suggest_threshold(wan().pipe, "x", num_inference_steps=STEPS, **wish)
