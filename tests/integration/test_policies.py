"""Policies on the pipelines that they were measured on, and carried over to other noise grids."""

import numpy as np
import pytest

from tiny.building import prompted
from tiny.policies import run_settings
from tiny.wan import wan
from vidaccel import accelerate, report
from vidaccel.calibration.build import build_policy
from vidaccel.calibration.replay import Replayer
from vidaccel.clips.load import load_pipeline
from vidaccel.errors import PolicyError
from vidaccel.lemica.transfer import transferred
from vidaccel.plans.policy import CachePolicy

CALL = {"height": 16, "width": 16, "num_frames": 9, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def built():
    """A pipeline and its policy of 12 steps."""
    case = prompted(wan())
    policy = build_policy(
        case.pipe,
        ["a"],
        num_inference_steps=12,
        max_skip=5,
        call_kwargs=CALL,
        validate=False,
        progress=False,
    )
    return case.pipe, policy


def test_a_measured_policy_tells_its_model(built):
    pipe, policy = built
    model = policy.model
    assert (model.pipeline, model.experts, model.config["num_layers"]) == ("WanPipeline", 1, 3)
    assert model.config_hash is not None
    accelerate(pipe, policy=policy)
    pipe("a", num_inference_steps=12, output_type="latent", **CALL)
    assert "model" not in report(pipe).transformers[0].policy


def test_an_unchanged_grid_keeps_errors_and_plans(built):
    _, policy = built
    run = run_settings(
        num_inference_steps=12,
        model_id=None,
        sigmas=policy.scheduler.sigmas,
        scheduler=policy.scheduler.name,
    )
    same = transferred(policy, run)
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
    accelerate(pipe, policy=policy)
    with pytest.raises(PolicyError, match="num_inference_steps: the policy is for 12"):
        pipe(prompt="a", num_inference_steps=9, output_type="latent", **CALL)
    accelerate(pipe, policy=policy, allow_transfer=True)
    pipe(prompt="a", num_inference_steps=9, output_type="latent", **CALL)
    shown = report(pipe).transformers[0]
    assert 3 <= shown.timeline.count("C") < 9
    assert "transferred from 12 steps, not validated" in shown.policy


def test_the_embedded_model_is_the_one_its_policy_was_measured_on():
    pipe = accelerate(load_pipeline(device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    caption = "a red dotted circle moving up on a teal striped background"
    pipe(caption, height=48, width=48, num_frames=5, num_inference_steps=50, output_type="latent")
    shown = report(pipe).transformers[0]
    assert shown.policy == "auto: vidaccel--tiny-wan/50-steps.json (measured)"
    assert shown.timeline.count("C") == 16
