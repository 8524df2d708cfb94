"""Finds out which run a generation is, as policies are held against it."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.engine.adapters import active_adapters
from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.registry import config_of, find_transformers
from vidaccel.plans.plan import RunSettings

# Names on the hub, <org>/<model> or <model>; what else a pipeline is loaded from is a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# The attribute in which a transformer holds the low precision that it is in.
PRECISION = "_vidaccel_precision"

# Longer texts in a config are no words that name a kind of layer.
_MAX_WORD = 128


def run_settings_of(
    transformer: Any,
    pipelines: Iterable[Any],
    scheduler: Any,
    steps: int,
    shape: tuple[int, ...] | None = None,
) -> RunSettings:
    """Describe the running generation.

    Args:
        transformer: the transformer that is called.
        pipelines: those that may be running it.
        scheduler: the one that drives it.
        steps: length of the scheduler's table.
        shape: that of the latents of one sample.
    """
    config = config_of(transformer)
    serving = list(pipelines)
    serving = [pipe for pipe in serving if pipe.scheduler is scheduler] or serving
    return RunSettings(
        steps,
        transformer=type(transformer).__name__,
        model_id=next(filter(None, (_hub_id(pipe, transformer) for pipe in serving)), None),
        config_hash=_hash(_own_entries(type(transformer), config)),
        full_config_hash=_hash(config),
        scheduler=type(scheduler).__name__,
        shift=shift_of(scheduler),
        sigmas=noise_levels(scheduler, steps),
        adapters=active_adapters(transformer),
        config={key: value for key, value in config.items() if _is_plain(value)},
        pipeline=_only({type(pipe).__name__ for pipe in serving}),
        experts=_only({_count_transformers(pipe) for pipe in serving}),
        guidance_scale=_only({guidance_scale(pipe) for pipe in serving}),
        latents=shape,
        precision=_precision_of(transformer),
    )


def guidance_scale(pipe: Any, *, second: bool = False) -> float | None:
    """Return the guidance scale of the call that a pipeline is running; None where it has none.

    Args:
        pipe: the pipeline.
        second: that of the second of two transformers.
    """
    names = ["_guidance_scale_2"] if second else []
    places = [(pipe, name) for name in [*names, "_guidance_scale", "guidance_scale"]]
    places.append((getattr(pipe, "guider", None), "guidance_scale"))
    for place, name in places:
        value = getattr(place, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _precision_of(transformer: Any) -> str | None:
    found = vars(transformer).get(PRECISION)
    return None if found is None else str(found.settings.name)


def _hub_id(pipe: Any, transformer: Any) -> str | None:
    """Return the name on the hub that a pipeline was loaded from; None where that was a folder."""
    name = getattr(pipe, "name_or_path", None)
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    # A relative path of a folder looks like a name on the hub once the working directory is
    # another. What comes from the hub lies in its cache, what comes from a folder below that.
    place = str(transformer.config.get("_name_or_path", ""))
    return None if place.startswith(f"{name}/") else name


def _own_entries(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config that are not the defaults of its class.

    Newer versions of a class add entries, with defaults that leave older models what they are.
    """
    defaults = inspect.signature(cls).parameters
    return {
        name: value
        for name, value in config.items()
        if name not in defaults or _text(defaults[name].default) != _text(value)
    }


def _hash(config: Mapping[str, Any]) -> str:
    return sha256(_text(config).encode()).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_WORD
    return value is None or isinstance(value, int)


def _count_transformers(pipe: Any) -> int | None:
    try:
        return len(find_transformers(pipe))
    except UnsupportedPipelineError:  # it has been taken apart since
        return None


def _only(found: set[Any]) -> Any:
    """Return the only entry of a set; None where there are several."""
    return next(iter(found)) if len(found) == 1 else None


def shift_of(scheduler: Any) -> float | None:
    """Return the shift of a scheduler's noise levels; None where it has none, or one per run."""
    config = scheduler.config
    shift = config.get("shift", config.get("flow_shift"))
    return None if shift is None or config.get("use_dynamic_shifting") else float(shift)


def noise_levels(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Return the noise level of each of the `steps` steps.

    They are the scheduler's sigmas, or its timesteps from 1 to 0 where it has none.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= steps:
        return tuple(float(sigma) for sigma in sigmas[:steps].tolist())
    length = float(scheduler.config.num_train_timesteps)
    return tuple(float(t) / length for t in scheduler.timesteps.tolist())
