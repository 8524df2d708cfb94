"""Load a pipeline, and check what its call is given."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from vidaccel.clips.calling import parameters_of
from vidaccel.clips.embedded import embedded_model
from vidaccel.errors import ModelError, PlanError

# The files that tell what a whole pipeline and a modular one consist of.
_INDEX = ("model_index.json", "modular_model_index.json")


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
        ModelError: nothing there, damaged files, or no such device; the last before anything is
            loaded.
    """
    target = find_device(device, offload=offload)
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    source = find_model(model)
    try:
        with quiet_libraries():
            from diffusers import DiffusionPipeline, __version__

            # Diffusers renamed the argument in 0.42 and took **kwargs before and after.
            named = "dtype" if Version(__version__) >= Version("0.42") else "torch_dtype"
            kind = {named: dtype}
            if _is_modular(source):
                pipe = _load_modular(source, kind, target if offload else None)
            else:
                from_pretrained: Any = DiffusionPipeline.from_pretrained
                pipe = from_pretrained(source, **kind)
                if offload:
                    pipe.enable_model_cpu_offload(device=target)
            if not offload:
                pipe.to(target)
    # Every library below has exceptions of its own for a damaged file, an unknown id, no network
    # or no such device; none of them is about vidaccel, and the first line says which it is.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"cannot load {source} on {target}: {reason or repr(error)}") from error
    return pipe


def _is_modular(source: str) -> bool:
    """Tell whether a folder or hub id holds a modular pipeline alone."""
    from diffusers import DiffusionPipeline

    if (folder := Path(source)).exists():
        return not (folder / "model_index.json").is_file()
    try:
        DiffusionPipeline.load_config(source)
    except OSError as error:  # no such file, no such id, or no network: what is loaded next tells
        return "does not appear to have a file named model_index.json" in str(error)
    return False


def _load_modular(source: str, kind: dict[str, Any], offload_from: torch.device | None) -> Any:
    """Load a modular pipeline with its components; what is missing raises ValueError."""
    import diffusers

    library: Any = diffusers
    manager = None if offload_from is None else library.ComponentsManager()
    pipe = library.ModularPipeline.from_pretrained(source, components_manager=manager)
    pipe.load_components(**kind)
    # Diffusers logs what it cannot load, and goes on.
    missing = [
        name
        for name in pipe.null_component_names
        if pipe.get_component_spec(name).pretrained_model_name_or_path
    ]
    if missing:
        raise ValueError(f"of its components, {', '.join(missing)} could not be loaded")
    if manager is not None:
        manager.enable_auto_cpu_offload(device=offload_from)
    return pipe


def find_device(device: str | None = None, *, offload: bool = False) -> torch.device:
    """Return the device of that name; None is the GPU if there is one.

    Raises:
        ModelError: there is no such name, no such device here, or nothing to offload from it.
    """
    name = device or default_device()
    try:
        target = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"no device is called {device!r}; try cpu or cuda") from error
    try:
        torch.empty(1, device=target).cpu()
    # A backend that is not there raises what it likes, and "meta" holds no numbers.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise ModelError(f"there is no device {name} here ({reason}); try cpu") from error
    if offload and target.type == "cpu":
        raise ModelError("offload keeps idle parts off a GPU, and this is the CPU: leave it out")
    return target


def find_model(model: str | None) -> str:
    """Return the folder of a model, or its hub id; None is the embedded model.

    Raises:
        ModelError: there is no such folder, or no model in it, and it is no hub id.
    """
    source = str(embedded_model()) if model is None else model
    folder = Path(source).expanduser()
    if folder.exists():
        if not any((folder / name).is_file() for name in _INDEX):
            raise ModelError(f"{folder} is no Diffusers model: it has no {' or '.join(_INDEX)}")
        return str(folder)
    if model is None or source.count("/") != 1 or source[0] in "./~":
        raise ModelError(f"no model folder at {folder}; pass a folder or a hub id (org/name)")
    return source


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings and bars of libraries off the screen, as they come while a model is loaded."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    shown: list[Any] = []
    try:
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            bars: Any = library.utils.logging
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                shown.append(bars)
        yield
    finally:
        logging.disable(before)
        for bars in shown:
            bars.enable_progress_bar()


def call_arguments(pipe: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `wanted` that are not None.

    Raises:
        ModelError: the pipeline's call does not take one of them.
    """
    known = parameters_of(pipe)
    given = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ModelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    return given


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Find out what a pipeline would say to the arguments of its call before it runs anything.

    Args:
        pipe: the pipeline, or its outline.
        call: what its call is to be given.

    Raises:
        ModelError: something is missing, or of a wrong size or kind.
    """
    name, known = type(pipe).__name__, parameters_of(pipe)
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    missing = [
        key
        for key, parameter in known.items()
        if key != "self" and parameter.kind in kinds and parameter.default is Parameter.empty
        if key not in call
    ]
    if missing:
        raise ModelError(f"{name} needs {', '.join(missing)}")
    if found := _complaint(pipe, call):
        # What the pipeline says of its own defaults, it does not say of what was asked for: some
        # make sizes of their own before they check them.
        kept = {key: call[key] for key in ("prompt",) if key in call}
        if found != _complaint(pipe, kept):
            raise ModelError(f"{name}: {found}")


def _complaint(pipe: Any, call: Mapping[str, Any]) -> str:
    """Return what a pipeline's own check says of its arguments; "" for nothing."""
    if not hasattr(pipe, "check_inputs"):
        return ""
    defaults = {
        key: parameter.default
        for key, parameter in parameters_of(pipe).items()
        if parameter.default is not Parameter.empty
    }
    given = {**defaults, **call}
    try:
        wanted = signature(pipe.check_inputs).parameters
        pipe.check_inputs(**{key: given.get(key) for key in wanted})
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception:  # it wants what only the call makes, and will be heard when that runs
        return ""
    return ""


def steps_of(pipe: Any, call: dict[str, Any]) -> int:
    """Return the number of denoising steps that a call of the pipeline asks for.

    Raises:
        PlanError: it is not a whole number of 1 or more.
    """
    known = parameters_of(pipe).get("num_inference_steps")
    steps = call.get("num_inference_steps", None if known is None else known.default)
    if not isinstance(steps, int) or steps < 1:
        raise PlanError(f"num_inference_steps: found {steps!r}, expected a whole number >= 1")
    return steps
