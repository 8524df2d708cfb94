"""Two transformers in every step, each for a branch of the guidance."""

import pytest
import torch

from vidaccel import accelerate, build_policy, report
from vidaccel.calibration.replay import Replayer
from vidaccel.engine.engine import engine_of

pytestmark = pytest.mark.parametrize("family", ["ideogram4"], indirect=True)
PLAN = [0, 1, 4]


def test_each_runs_its_branch(family):
    accelerate(family.pipe, policy=PLAN, cache=None)
    family.run()
    for name, branch in (("transformer", "cond"), ("unconditional_transformer", "uncond")):
        engine = engine_of(getattr(family.pipe, name))
        assert {call.branch for call in engine.stats.calls} == {branch}
    assert [part.timeline for part in report(family.pipe).transformers] == ["CC--C-"] * 2


def test_a_replay_gives_back_what_each_gave(family):
    call = family.kwargs | {"num_inference_steps": 5}
    with Replayer(family.pipe, call) as replayer:
        assert replayer.noise_floor() == 0.0
        assert replayer.reference.switch is None
        # Held in both of them, as a plan would.
        assert replayer.error(1, 3) > 0


@pytest.mark.parametrize("method", ["exact", "gain"])
def test_a_policy_is_built(family, method):
    accelerate(family.pipe, policy=None, cache=None)
    plain = family.run(prompt="a", num_inference_steps=5)
    policy = build_policy(
        family.pipe,
        ["a"],
        num_inference_steps=5,
        max_skip=3,
        method=method,
        call_kwargs=family.kwargs,
        validate=False,
        progress=False,
    )
    accelerate(family.pipe, policy=policy, cache=None)
    fast = family.run(prompt="a", num_inference_steps=5)
    first, second = (part.timeline for part in report(family.pipe).transformers)
    assert first == second and "-" in first
    assert 0 < (fast - plain).abs().max() < 0.5 * plain.abs().max()


def test_a_lesson_says_why_it_learns_nothing(family):
    family.kwargs["num_inference_steps"] = 12  # of fewer steps none is reused
    plain = family.run()
    accelerate(family.pipe, policy="learn")
    assert torch.equal(family.run(), plain)
    shown = str(report(family.pipe))
    assert "nothing was learned from this run: a second transformer ran in the same step" in shown
    family.run()
    assert "-" in report(family.pipe).transformers[0].timeline
