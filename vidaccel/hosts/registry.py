"""The supported transformer classes, and how a model of one's own joins them."""

import re
from typing import Any

from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.image_models import ROWS as IMAGE_ROWS
from vidaccel.hosts.left_out import ROWS as LEFT_OUT_ROWS
from vidaccel.hosts.left_out import UNTESTED
from vidaccel.hosts.spec import HostSpec
from vidaccel.hosts.video_models import ROWS as VIDEO_ROWS

# Components of pipelines that denoise, by their names.
_DENOISER = re.compile(r"transformer|unet|prior|\w+_transformer$")

# By the name of the class; a subclass is found under the name of its base.
HOSTS: dict[str, HostSpec] = {
    row.transformer: row for row in (*VIDEO_ROWS, *IMAGE_ROWS, *LEFT_OUT_ROWS)
}


def register_host(spec: HostSpec) -> HostSpec:
    """Add a transformer class to those that `accelerate` supports, or replace its row.

    Returns:
        The same `spec`.

    Raises:
        UnsupportedPipelineError: the row has no blocks, or names a stream that they do not return.
    """
    if not spec.unsupported:
        if not spec.blocks:
            raise UnsupportedPipelineError(
                f"the row of {spec.transformer} names no block list: give it "
                'blocks=(BlockList("blocks"),) with the attribute that holds its blocks'
            )
        returned = {name for blocks in spec.blocks for name in blocks.returns}
        read = {name for head in spec.heads for name in head.streams} | {spec.main}
        if unknown := sorted(read - returned):
            raise UnsupportedPipelineError(
                f"the row of {spec.transformer} reads {', '.join(unknown)}, but its blocks return "
                f"{', '.join(sorted(returned))}"
            )
    HOSTS[spec.transformer] = spec
    return spec


def find_transformers(pipe: Any) -> dict[str, tuple[Any, HostSpec]]:
    """Find the transformers of a pipeline with their rows, by component name.

    Raises:
        UnsupportedPipelineError: when `pipe` is no pipeline, none of its components has a row, one
            of several denoisers has none, or the row says why it cannot be accelerated.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedPipelineError(
            f"accelerate() takes a Diffusers pipeline, found {type(pipe).__name__}"
        )
    name_of_pipe, found = type(pipe).__name__, rows_among(components)
    for module, row in found.values():
        if row.unsupported:
            raise UnsupportedPipelineError(
                f"{name_of_pipe} cannot be accelerated: {type(module).__name__} {row.unsupported}"
            )
    denoisers = [
        f"{name} ({type(module).__name__})"
        for name, module in components.items()
        if module is not None and name not in found and _DENOISER.match(name)
    ]
    if found and denoisers:
        raise UnsupportedPipelineError(
            f"{name_of_pipe} has a denoiser that vidaccel does not support beside "
            f"{', '.join(found)}: {', '.join(denoisers)}; vidaccel.register_host adds its row"
        )
    if not found and not denoisers and any(map(_DENOISER.match, components)):
        raise UnsupportedPipelineError(
            f"no denoiser of this {name_of_pipe} is loaded yet: load its components first, "
            "pipe.load_components() or pipe.update_components(transformer=...)"
        )
    if not found:
        supported = ", ".join(name for name, row in HOSTS.items() if not row.unsupported)
        raise UnsupportedPipelineError(
            f"{name_of_pipe} has no transformer that vidaccel supports; "
            f"found {', '.join(denoisers) or 'no denoiser'}; supported: {supported}; "
            "vidaccel.register_host adds another"
        )
    return found


def rows_among(components: dict[str, Any]) -> dict[str, tuple[Any, HostSpec]]:
    """Return the components that have a row, with it, by name."""
    modules = {name: _within_peft(module) for name, module in components.items()}
    return {
        name: (module, row.of_component(name))
        for name, module in modules.items()
        if (row := _row_of(module)) is not None
    }


def has_denoiser(pipe: Any) -> bool:
    """Tell whether a denoiser of a pipeline is loaded, with a row or without."""
    components = pipe.components
    loaded = (name for name, module in components.items() if module is not None)
    return bool(rows_among(components)) or any(map(_DENOISER.match, loaded))


def config_of(transformer: Any) -> dict[str, Any]:
    """Return the config of a transformer without Diffusers' own entries, such as its path."""
    return {key: value for key, value in transformer.config.items() if not key.startswith("_")}


def markdown_table() -> str:
    """Make the table of supported models in Markdown, a line per row."""
    head = (
        "model",
        "pipelines tested",
        "step plans",
        "block cache",
        "SVG2",
        "diffusers",
    )
    rows = [head, ("---",) * len(head)]
    for row in HOSTS.values():
        if row.is_left_out:
            continue
        pipelines = ", ".join(f"`{name}`" for name in row.pipelines)
        pipelines += "".join(f"; not `{name}`, which {reason}" for name, reason in row.untested)
        if row.unsupported:
            cells = ("no", f"no: {row.transformer} {row.unsupported}", "")
        else:
            threshold = "yes" if row.threshold is None else f"yes, threshold {row.threshold:g}"
            cache = threshold + ("; no corrector blocks" if row.no_corrector else "")
            attention = "yes" if row.attention else f"no: {row.attention_note}"
            cells = ("yes", cache, attention)
        rows.append((row.family or row.transformer, pipelines, *cells, f"≥ {row.since}"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def families_of_diffusers() -> tuple[list[str], list[str]]:
    """Return the supported families that the installed Diffusers has, and those it lacks."""
    import diffusers

    families: tuple[list[str], list[str]] = ([], [])
    for row in HOSTS.values():
        if not row.unsupported:
            missing = not hasattr(diffusers, row.transformer)
            families[missing].append(row.family or row.transformer)
    return families


def left_out_list() -> str:
    """Make the list of what is not supported or tested in Markdown, a line per reason."""
    reasons: dict[str, list[str]] = {}
    for row in LEFT_OUT_ROWS:
        reasons.setdefault(row.unsupported, []).append(f"{row.family} (`{row.transformer}`)")
    for name, reason in UNTESTED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in reasons.items())


def _within_peft(module: Any) -> Any:
    """The model inside of a `PeftModel`, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _row_of(module: Any) -> HostSpec | None:
    # A module compiled as a whole is found under its original class, to be refused by name.
    cls = type(getattr(module, "_orig_mod", module))
    return next((HOSTS[base.__name__] for base in cls.__mro__ if base.__name__ in HOSTS), None)
