"""The outline of a model: its pipeline, made of config files alone and without weights.

What a call or an acceleration gets wrong is found on it within a second, where loading the weights
can take minutes.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidaccel.api import accelerate, restore
from vidaccel.clips.load import find_model, quiet_libraries, steps_of
from vidaccel.engine.run_settings import run_settings_of
from vidaccel.errors import ModelError
from vidaccel.hosts.registry import find_transformers
from vidaccel.resolve import Resolver

_FILES = ("model_index.json", "*/config.json", "*/scheduler_config.json")


def outline_of(model: str | None = None) -> Any:
    """Make the outline of a model: its transformers, VAE and scheduler, and nothing that has text.

    Args:
        model: a folder in Diffusers format or a hub id, of which only config files are downloaded;
            None for the embedded model.

    Returns:
        A pipeline that cannot run; None where the configs alone do not make one.

    Raises:
        ModelError: there is no such model.
    """
    source = find_model(model)
    with quiet_libraries():
        folder = Path(source) if Path(source).exists() else _configs(source)
        # The model may well load all the same: it is found out then.
        with suppress(Exception):
            return _outline(folder, source)
    return None


def _configs(hub_id: str) -> Path:
    """Download the config files of a model; raises ModelError where there is none of that name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    nowhere = f"no model folder at {hub_id}"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_FILES)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{nowhere}, and no model of that name on the hub") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{nowhere}, and the hub cannot be reached: pass a folder, or try again with a network"
        ) from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{nowhere}, and the hub does not give it: {reason}") from error


def _outline(folder: Path, source: str) -> Any:
    """Make the pipeline of a folder, with None for each part that is not of Diffusers."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        parts[name] = value
        if isinstance(value, list):
            library, kind = value
            cls = getattr(diffusers, kind) if library == "diffusers" else None
            parts[name] = None if cls is None else _part(cls, folder / name)
    pipe = getattr(diffusers, index["_class_name"])(**parts)
    pipe.register_to_config(_name_or_path=source)
    return pipe


def _part(cls: Any, folder: Path) -> Any:
    """Make a part from its config; the tensors of a model hold no numbers and take no memory."""
    with torch.device("meta"):
        if issubclass(cls, torch.nn.Module):
            return cls.from_config(cls.load_config(folder))
    return cls.from_pretrained(folder)


def check_acceleration(pipe: Any, call: dict[str, Any], resolver: Resolver) -> None:
    """Find out whether an acceleration fits a run, as far as config files can tell.

    The noise levels of the run are not known before it begins; a policy is held against them then.

    Args:
        pipe: the pipeline, or its outline; it is left without acceleration.
        call: arguments of its call.
        resolver: the policy and the block cache.

    Raises:
        VidaccelError: as `accelerate` and the first step would.
    """
    steps = steps_of(pipe, call)
    restore(accelerate(pipe, policy=resolver, attention=None))
    for transformer, host in find_transformers(pipe).values():
        try:
            run = run_settings_of(transformer, [pipe], pipe.scheduler, steps)
        except (AttributeError, TypeError, ValueError):  # no table of times yet
            continue
        resolver.decide(replace(run, sigmas=None), host)
