"""Fillings of others: Spectrum's Chebyshev forecast, and MeanCache's average velocity."""

import numpy as np
import pytest
import torch

from tiny.wan import wan, wan_unipc
from vidaccel import accelerate, restore
from vidaccel.bench.fillings import (
    average_velocity,
    chebyshev_features,
    chebyshev_weights,
    widening_steps,
)
from vidaccel.errors import UnsupportedPipelineError
from vidaccel.plans.plan import Plan


def test_chebyshev_polynomials_follow_what_they_can_follow():
    known, level = [1.0, 0.97, 0.9, 0.8, 0.6, 0.5], 0.4

    def curve(t):
        return 2.0 - 3.0 * t + t**3

    weights = chebyshev_weights(known, level, ridge=1e-12)
    assert weights @ curve(np.array(known)) == pytest.approx(curve(level), abs=1e-4)
    held_down = chebyshev_weights(known, level, ridge=0.1)
    assert np.abs(held_down).sum() < np.abs(weights).sum()


@pytest.mark.parametrize("budget", [10, 12, 17, 25, 38])
def test_widening_steps_give_the_budget_and_widen(budget):
    steps = widening_steps(budget, 50)
    assert len(steps) == budget and steps[:5] == (0, 1, 2, 3, 4)
    gaps = np.diff(steps)[4:]
    assert (np.diff(gaps) >= 0).all()


def test_chebyshev_features_take_the_place_of_what_goes_into_the_head():
    case, plan = wan(), Plan((0, 1, 3), 6)
    accelerate(case.pipe, policy=plan, attention=None)
    hooks = len(case.pipe.transformer.norm_out._forward_pre_hooks)
    with chebyshev_features(case.pipe, 0.1):
        seen = []
        head = case.pipe.transformer.norm_out
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        case.run(num_inference_steps=6)
        handle.remove()
    assert len(case.pipe.transformer.norm_out._forward_pre_hooks) == hooks
    sigmas = case.pipe.scheduler.sigmas[:6] / case.pipe.scheduler.sigmas[0]
    first = seen[::2] if len(seen) == 12 else seen  # of one branch
    weights = chebyshev_weights(sigmas[[0, 1]].tolist(), float(sigmas[2]), ridge=0.1)
    wanted = weights[0] * first[0] + weights[1] * first[1]
    torch.testing.assert_close(first[2], wanted.to(first[2].dtype), rtol=1e-3, atol=1e-3)


def test_an_average_velocity_over_one_step_holds_and_over_more_follows():
    case, given = wan(), []
    scheduler = case.pipe.scheduler
    step = scheduler.step

    def record(velocity, *args, **options):
        given.append(velocity.clone())
        return step(velocity, *args, **options)

    accelerate(case.pipe, policy=Plan((0, 1, 3), 6), attention=None)
    outcomes = {}
    for span in (1, 2):
        given.clear()
        scheduler.step = record
        with average_velocity(case.pipe, span):
            case.run(num_inference_steps=6)
        assert vars(scheduler)["step"] is record
        del scheduler.step
        outcomes[span] = list(given)
    held, followed = outcomes[1], outcomes[2]
    assert len(held) == len(followed) == 6
    torch.testing.assert_close(held[2], held[1], rtol=1e-3, atol=1e-4)
    # Two steps back the velocity was another one, and the change between goes on.
    assert not torch.allclose(followed[2], followed[1], rtol=1e-3, atol=1e-4)
    restore(case.pipe)


def test_an_average_velocity_needs_a_flow():
    case = wan_unipc()
    accelerate(case.pipe, policy="every 2", attention=None)
    with (
        pytest.raises(UnsupportedPipelineError, match="samples no flow"),
        average_velocity(case.pipe, 2),
    ):
        pass
