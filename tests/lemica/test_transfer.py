"""Policies carried over to other noise grids."""

import json

import numpy as np
import pytest

from tiny import embeds
from tiny.policies import forecasting, parse, run_settings, valid
from tiny.wan import wan
from vidaccel import accelerate, report
from vidaccel.calibration.build import build_policy
from vidaccel.calibration.replay import Replayer
from vidaccel.errors import PolicyError
from vidaccel.lemica.transfer import transferred
from vidaccel.plans.policy import CachePolicy
from vidaccel.resolve import Resolver

CALL = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def built():
    """A pipeline and its policy of 12 steps."""
    pipe = wan().pipe
    pipe.encode_prompt = lambda prompt, negative_prompt=None, **_: (embeds(len(prompt)), embeds(99))
    policy = build_policy(
        pipe, ["a"], num_inference_steps=12, max_skip=5, call_kwargs=CALL, validate=False,
        progress=False,
    )  # fmt: skip
    return pipe, policy


def test_an_unchanged_grid_keeps_errors_and_plans(built):
    _, policy = built
    same = transferred(policy, run_settings(
        num_inference_steps=12, model_id=None, sigmas=policy.scheduler.sigmas,
        scheduler=policy.scheduler.name,
    ))  # fmt: skip
    found = {(e.start, e.end): e.mean for e in same.edges if e.order == 0}
    for edge in (e for e in policy.edges if e.order == 0):
        assert found[edge.start, edge.end] == pytest.approx(edge.mean, rel=1e-6)
    for budget in policy.budgets():
        assert same.plan(budget=budget).steps == policy.plan(budget=budget).steps
    assert (same.provenance, same.validation) == ("transferred", None)
    assert same.source == f"12 steps of: {policy.source}"
    assert CachePolicy.from_json(same.to_json()) == same


def test_another_number_of_steps_gets_about_its_own_errors(built):
    pipe, policy = built
    with Replayer(pipe, {**CALL, "prompt": "a", "num_inference_steps": 18}) as replayer:
        moved = transferred(policy, replayer.run_settings)
        held = [e for e in moved.edges if e.order == 0]
        ratios = [e.mean / replayer.error(e.start, e.end) for e in held[:: len(held) // 12]]
    assert 0.5 < np.median(ratios) < 2.0
    assert max(e.end - e.start for e in held) > 5  # as far in noise level, so more steps
    assert moved.budgets()[-1] == 18


def test_a_transfer_happens_when_it_is_asked_for_and_is_marked(built):
    pipe, policy = built
    with pytest.raises(PolicyError, match="num_inference_steps: the policy is for 12"):
        pipe(prompt="a", num_inference_steps=9, output_type="latent", **CALL) if accelerate(
            pipe, policy=policy
        ) else None
    accelerate(pipe, policy=policy, allow_transfer=True)
    pipe(prompt="a", num_inference_steps=9, output_type="latent", **CALL)
    shown = report(pipe).transformers[0]
    assert 3 <= shown.timeline.count("C") < 9
    assert "transferred from 12 steps, not validated" in shown.policy


def test_what_cannot_be_transferred():
    other = run_settings(num_inference_steps=9, sigmas=tuple(np.linspace(1, 0.1, 9)))
    assert transferred(parse(forecasting()), other).num_inference_steps == 9
    for change, message in (
        ({"edges": []}, "edges: found none"),
        ({"scheduler": {}}, "edges: found none"),
        ({"scheduler": {"sigmas": [1, 1, 0.8, 0.6, 0.4, 0.1]}}, "of the policy do not fall"),
    ):
        with pytest.raises(PolicyError, match=message):
            transferred(parse(valid() | change), other)
    with pytest.raises(PolicyError, match=r"scheduler.sigmas: this run has none"):
        transferred(parse(valid()), run_settings(num_inference_steps=9, sigmas=None))
    with pytest.raises(PolicyError, match=r"model.id: the policy is for org/tiny-wan"):
        transferred(parse(valid()), run_settings(model_id="org/other"))
    source = Resolver(parse(json.loads(json.dumps(valid()))), allow_transfer=True)
    with pytest.raises(PolicyError, match=r"model.transformer"):
        source.plan(run_settings(transformer="CogVideoXTransformer3DModel"))
