"""Load a pipeline, and check what its call is given."""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from vidaccel.clips.embedded import embedded_model
from vidaccel.errors import ModelError, PlanError


def default_device() -> str:
    """Return "cuda" where there is a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Any:
    """Load a Diffusers pipeline.

    Args:
        model: a folder in Diffusers format or a hub id; None for the embedded model.
        device: where it runs; None for the GPU if there is one.
        dtype: type of the weights; None for bfloat16 on a GPU and float32 elsewhere.
        offload: keep the parts that are not running in host memory (`enable_model_cpu_offload`).

    Raises:
        ModelError: nothing there, damaged files, or no such device.
    """
    from diffusers import DiffusionPipeline, __version__

    from_pretrained: Any = DiffusionPipeline.from_pretrained
    # Diffusers renamed the argument in 0.42 and took **kwargs before and after.
    dtype_argument = "dtype" if Version(__version__) >= Version("0.42") else "torch_dtype"
    try:
        target = torch.device(device or default_device())
    except RuntimeError as error:
        raise ModelError(f"no device is called {device!r}; try cpu or cuda") from error
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    source = str(embedded_model()) if model is None else model
    folder = Path(source).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is no Diffusers model: it has no model_index.json")
        source = str(folder)
    elif model is None or source.count("/") != 1 or source[0] in "./~":
        raise ModelError(f"no model folder at {folder}; pass a folder or a hub id (org/name)")
    try:
        pipe = from_pretrained(source, **{dtype_argument: dtype})
        if offload:
            pipe.enable_model_cpu_offload(device=target)
        else:
            pipe.to(target)
    # Every library below has exceptions of its own for a damaged file, an unknown id, no network
    # or no such device; none of them is about vidaccel, and the first line says which it is.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"cannot load {source} on {target}: {reason or repr(error)}") from error
    return pipe


def call_arguments(pipe: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `wanted` that are not None.

    Raises:
        ModelError: the pipeline's call does not take one of them.
    """
    known = signature(type(pipe).__call__).parameters
    given = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ModelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    return given


def steps_of(pipe: Any, call: dict[str, Any]) -> int:
    """Return the number of denoising steps that a call of the pipeline asks for.

    Raises:
        PlanError: it is not a whole number of 1 or more.
    """
    default = signature(type(pipe).__call__).parameters["num_inference_steps"].default
    steps = call.get("num_inference_steps", default)
    if not isinstance(steps, int) or steps < 1:
        raise PlanError(f"num_inference_steps: found {steps!r}, expected a whole number >= 1")
    return steps
