"""Finds out which run a generation is, as policies are held against it."""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.engine.adapters import active_adapters
from vidaccel.hosts.registry import config_of
from vidaccel.plans.plan import RunSettings


def run_settings_of(
    transformer: Any, pipelines: Iterable[Any], scheduler: Any, steps: int
) -> RunSettings:
    """Describe the running generation.

    Args:
        transformer: the transformer that is called.
        pipelines: those that may be running it.
        scheduler: the one that drives it.
        steps: length of the scheduler's table.
    """
    text = json.dumps(config_of(transformer), sort_keys=True, default=str)
    names = {getattr(pipe, "name_or_path", None) for pipe in pipelines}
    return RunSettings(
        steps,
        transformer=type(transformer).__name__,
        model_id=next((name for name in names if name and not Path(name).exists()), None),
        config_hash=sha256(text.encode()).hexdigest(),
        scheduler=type(scheduler).__name__,
        sigmas=noise_levels(scheduler, steps),
        adapters=active_adapters(transformer),
    )


def noise_levels(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Return the noise level of each of the `steps` steps.

    They are the scheduler's sigmas, or its timesteps from 1 to 0 where it has none.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= steps:
        return tuple(float(sigma) for sigma in sigmas[:steps].tolist())
    length = float(scheduler.config.num_train_timesteps)
    return tuple(float(t) / length for t in scheduler.timesteps.tolist())
