"""What `policy="auto"` finds, and in which order."""

from dataclasses import replace

import pytest

from tiny import CASES
from tiny.policies import run_settings
from vidaccel import accelerate, report
from vidaccel.automatic import generic, known_plan
from vidaccel.engine.run_settings import noise_levels
from vidaccel.plans.generic import generic_steps
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.shipped import load_shipped
from vidaccel.plans.wish import Wish


def falling(steps):
    return tuple(1 - step / steps for step in range(steps))


def own_run(steps):
    """A run of the embedded model with its own scheduler."""
    policy = dict(load_shipped())["vidaccel--tiny-wan/50-steps.json"]
    sigmas = policy.scheduler.sigmas if steps == 50 else falling(steps)
    return RunSettings(
        steps,
        transformer=policy.model.transformer,
        config_hash=policy.model.config_hash,
        scheduler=policy.scheduler.name,
        sigmas=sigmas,
    )


def test_a_policy_that_is_made_for_the_run_comes_first():
    plan = known_plan(own_run(50), Wish("balanced"))
    assert plan.origin.startswith("vidaccel--tiny-wan/50-steps.json (measured)")
    assert len(plan.steps) == 16 and any(plan.orders)


@pytest.mark.parametrize(("preset", "most"), [("quality", 20), ("balanced", 14), ("fast", 8)])
def test_a_measured_one_is_carried_over_to_another_number_of_steps(preset, most):
    plan = known_plan(own_run(40), Wish(preset))
    assert "transferred from vidaccel--tiny-wan/" in plan.origin and "not validated" in plan.origin
    assert plan.num_inference_steps == 40 and len(plan.steps) <= most
    assert known_plan(own_run(40), Wish(preset)) == plan


@pytest.mark.parametrize("steps", [8, 10, 12])
def test_a_short_run_of_a_measured_model_reuses_gently(steps):
    plan = known_plan(own_run(steps), Wish("balanced")) or generic(own_run(steps), Wish())
    assert "generic schedule" in plan.origin and len(plan.steps) < steps


def test_lines_are_followed_further_without_guidance():
    run = own_run(30)
    guided = generic(run, Wish()).scales
    assert generic(replace(run, guidance_scale=5.0), Wish()).scales == guided
    free = generic(replace(run, guidance_scale=1.0), Wish()).scales
    assert all(a >= b for a, b in zip(free, guided, strict=True)) and free != guided


def test_a_published_list_is_carried_over_by_position():
    wan = RunSettings(
        30, "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers", sigmas=falling(30)
    )
    plan = known_plan(wan, Wish("balanced"))
    assert "carried over by position from Wan-AI--Wan2.1-T2V-14B-Diffusers" in plan.origin
    assert plan.steps[0] == 0 and plan.steps[-1] == 29 and any(plan.orders)
    exact = known_plan(replace(wan, num_inference_steps=50, sigmas=falling(50)), Wish("balanced"))
    assert exact.origin.startswith("Wan-AI--Wan2.1-T2V-14B-Diffusers/published-50-steps.json")
    assert any(exact.orders)  # a list without errors goes along damped lines


def test_of_another_model_nothing_is_known():
    run = run_settings(num_inference_steps=50, sigmas=falling(50))
    assert known_plan(run, Wish("balanced")) is None
    plan = generic(run, Wish())
    assert plan.steps == generic_steps(17, 50) and any(plan.orders)
    assert "generic schedule, 17 of 50 steps computed" in plan.origin
    assert "build-policy" in plan.origin
    assert not generic(replace(run, sigmas=None), Wish()).orders


@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux", "wan22"])
def test_a_model_of_its_own_runs_the_generic_schedule(name):
    case = CASES[name]()
    accelerate(case.pipe, attention=None)
    case.run(num_inference_steps=24)
    parts = report(case.pipe).transformers
    timeline = "".join(part.timeline for part in parts)
    levels = noise_levels(case.pipe.scheduler, 24)
    computed = generic_steps(8, 24, levels)
    expected = "".join("C" if step in computed else "-" for step in range(24))
    switch = len(parts[0].timeline) if len(parts) > 1 else 0
    # The first step of the second expert has nothing to reuse and is computed.
    assert timeline == expected[:switch] + ("C" + expected[switch + 1 :] if switch else expected)
    assert all("generic schedule" in part.policy for part in parts)


@pytest.mark.parametrize("steps", [8, 12])
def test_short_runs_reuse_something(steps):
    case = CASES["wan"]()
    accelerate(case.pipe, attention=None)
    case.run(num_inference_steps=steps)
    (part,) = report(case.pipe).transformers
    assert part.timeline.startswith("CCC") and "-" in part.timeline and "---" not in part.timeline
