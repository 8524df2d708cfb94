"""Calls of whole and of modular pipelines: what they take, and what comes out of them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any

from vidaccel.engine import compat
from vidaccel.errors import ModelError

# The names of clips and of pictures: in what a whole pipeline returns, and in the state of a
# modular one.
_RESULTS = ("frames", "videos", "video", "images", "image")


def is_modular(pipe: Any) -> bool:
    """Tell whether a pipeline is made of blocks, whose inputs its call takes."""
    return hasattr(pipe, "blocks") and hasattr(pipe, "get_component_spec")


def parameters_of(pipe: Any) -> Mapping[str, Parameter]:
    """Return what the call of a pipeline takes, by name, with the defaults."""
    if not is_modular(pipe):
        return signature(type(pipe).__call__).parameters
    # What blocks name as required may come from blocks before them, which say so themselves.
    return {
        given.name: Parameter(given.name, Parameter.KEYWORD_ONLY, default=given.default)
        for given in pipe.blocks.inputs
        if given.name
    }


def outcome_of(pipe: Any, call: dict[str, Any], output_type: str) -> Any:
    """Run a pipeline and return its clips, or its pictures, one for each prompt.

    Args:
        pipe: the pipeline.
        call: arguments of its call; the output type is set here.
        output_type: "latent", "np" or what else it takes.

    Raises:
        ModelError: a modular pipeline decodes neither clips nor pictures.
    """
    if not is_modular(pipe):
        output = pipe(**call, output_type=output_type)
        return next(getattr(output, name) for name in _RESULTS if hasattr(output, name))
    # Latents are a value of its state like any other, whatever its decoder makes of them.
    kind = {} if output_type == "latent" else {"output_type": output_type}
    known = parameters_of(pipe)
    kind = {name: value for name, value in kind.items() if name in known}
    return pipe(**call, **kind, output=_result_name(pipe, output_type))


def first_clip(outcome: Any) -> Any:
    """Return the first clip of what `outcome_of` gives; a picture is a clip of one frame."""
    first = outcome[0]
    return first if isinstance(first, list) or first.ndim == 4 else outcome[:1]


def _result_name(pipe: Any, output_type: str) -> str:
    """Return the name of the value that is the result of a modular pipeline."""
    wanted = ("latents",) if output_type == "latent" else _RESULTS
    made = pipe.blocks.intermediate_output_names
    if found := next((name for name in wanted if name in made), None):
        return found
    raise ModelError(
        f"the blocks of this {type(pipe).__name__} make none of {', '.join(wanted)}, but "
        f"{', '.join(map(str, made))}"
    )


@contextmanager
def without_bar(pipe: Any) -> Iterator[None]:
    """Turn the progress bars of a pipeline off, and leave them as they were afterwards."""
    with ExitStack() as stack:
        for owner in compat.owners_of_loops(pipe):
            previous = compat.progress_bar_config(owner)
            owner.set_progress_bar_config(**{**previous, "disable": True})
            stack.callback(owner.set_progress_bar_config, **previous)
        yield
