"""The plans that follow from the deviations of one run."""

from vidaccel.learning.learned_policy import learned_edges, learned_policy
from vidaccel.plans.plan import RunSettings

STEPS = 12
SIGMAS = tuple(1 - step / STEPS for step in range(STEPS))


def settings():
    return RunSettings(
        transformer="WanTransformer3DModel",
        config_hash="0" * 64,
        num_inference_steps=STEPS,
        scheduler="FlowMatchEulerDiscreteScheduler",
        sigmas=SIGMAS,
    )


def test_the_last_steps_are_reused_where_that_costs_least():
    """A plan that has to compute the last step lacks it where it would do more."""
    holds = {
        (start, end): (end - start) * (0.1 if end == STEPS else 1.0)
        for start in range(STEPS)
        for end in range(start + 2, min(start + 5, STEPS + 1))
    }
    edges = learned_edges(holds, {}, SIGMAS, SIGMAS)
    policy = learned_policy(settings(), edges, level=1.0, shift=None, versions={})
    for budget in (4, 6, 8):
        plan = policy.plan(budget=budget)
        assert len(plan.steps) == budget and plan.steps[-1] < STEPS - 1
