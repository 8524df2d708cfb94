"""Measures how far a sampler goes in each step, per unit of change of the transformer's output."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def step_weights(scheduler: Any, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return how far the latents move in each step per unit of the output, up to sign.

    Exact for Euler's method; multistep samplers spread the same over their next steps. The latents
    are measured in the scale in which they are x0 + sigma * noise, or (1 - sigma) * x0 + sigma *
    noise with flow matching.

    Args:
        scheduler: the scheduler.
        sigmas: noise level of each step.
    """
    config = scheduler.config
    levels = np.asarray([*noise_to_signal(scheduler, sigmas), 0.0])
    moved = levels[:-1] - levels[1:]
    kind = config.get("prediction_type")
    if _is_flow(scheduler) or kind in (None, "epsilon"):
        return tuple(moved.tolist())
    at = levels[:-1]
    if kind == "v_prediction":
        return tuple((moved / np.sqrt(1.0 + at**2)).tolist())
    return tuple((moved / np.maximum(at, 1e-6)).tolist())  # predicts the sample


def noise_to_signal(scheduler: Any, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return the noise of each step over its signal; with flow matching the noise level itself."""
    totals = getattr(scheduler, "alphas_cumprod", None)
    if _is_flow(scheduler) or totals is None:
        return tuple(sigmas)
    places = scheduler.timesteps[: len(sigmas)].cpu().long().clamp(0, len(totals) - 1)
    kept = totals.cpu().double()[places]
    return tuple(((1.0 - kept) / kept).clamp(min=0.0).sqrt().tolist())


def noise_share(scheduler: Any, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Return the share of noise in the latents of each step, from 1 for noise to 0 for none."""
    levels = np.asarray(noise_to_signal(scheduler, sigmas))
    share = levels if _is_flow(scheduler) else levels / (1.0 + levels)
    return tuple(share.tolist())


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return bool(
        "FlowMatch" in type(scheduler).__name__
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )
