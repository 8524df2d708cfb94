"""The options that commands share, in groups, and what is read from them."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import MAX_FRAMES, MAX_SEED, MAX_STEPS, number, size, whole_number
from vidaccel.dbcache import DBCache
from vidaccel.errors import AttentionError, ModelError, PlanError, PolicyError
from vidaccel.svg2.settings import SVG2


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the defaults of options, where there is one to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unnamed = action.default is None or action.default is False or action.default == ""
        return action.help if unnamed else super()._get_help_string(action)


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command with a line of help to the subparsers of another, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_Help
    )
    return parser


def add_model_options(
    parser: argparse.ArgumentParser, *, any_model: bool = True, threads: bool = False
) -> None:
    """Add the options that `loader_of`, `pipeline_of` and `call_of` read.

    Args:
        parser: the parser of a command.
        any_model: take --model; otherwise the command runs the embedded model alone.
        threads: take --threads.
    """
    group = parser.add_argument_group("model")
    if any_model:
        group.add_argument("--model", help="folder or hub id; the embedded model if left out")
    else:
        parser.set_defaults(model=None)
    group.add_argument("--device", help="cuda, cpu, ...; the GPU if there is one")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights; bfloat16 on a GPU and float32 elsewhere if left out",
    )
    group.add_argument("--offload", action="store_true", help="keep idle parts in host memory")
    if threads:
        group.add_argument("--threads", type=whole_number(1), help="CPU threads of torch")


def loader_of(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that loads the pipeline which the arguments name; workers take it along."""
    import torch

    from vidaccel.clips.load import load_pipeline

    return partial(
        load_pipeline,
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        offload=arguments.offload,
    )


def pipeline_of(
    arguments: argparse.Namespace, resolver: Any = None, steps: int | None = None, **call: Any
) -> Any:
    """Load the pipeline that the arguments name, on as many threads as they say.

    What is wrong about a run is found before its weights are loaded where its config files tell.

    Args:
        arguments: those of the command line.
        resolver: the `Resolver` of the acceleration, if there is one; it is held against the model.
        steps: number of denoising steps, if it is known.
        call: other arguments of the pipeline's call that are known by now.

    Raises:
        ModelError: it cannot be loaded, or does not take its arguments.
        PlanError: the acceleration does not fit it.
    """
    from vidaccel.clips.load import find_device
    from vidaccel.clips.outline import check_acceleration, outline_of

    find_device(arguments.device, offload=arguments.offload)
    if (outline := outline_of(arguments.model)) is not None:
        call |= {"num_inference_steps": steps}
        checked = call_of(outline, arguments, **call)
        if resolver is not None:
            check_acceleration(outline, checked, resolver)
    if getattr(arguments, "threads", None) is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    return loader_of(arguments)()


def add_clip_options(parser: argparse.ArgumentParser, *, guidance: bool = False) -> None:
    """Add --size and --frames, and --guidance where it is asked for; `call_of` reads them."""
    group = parser.add_argument_group("clip")
    group.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels")
    group.add_argument("--frames", type=whole_number(1, MAX_FRAMES), help="number of frames")
    if guidance:
        group.add_argument("--guidance", type=number(), help="guidance scale")


def call_of(pipe: Any, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the arguments of a pipeline's call.

    Args:
        pipe: the pipeline of `pipeline_of`.
        arguments: those of the command line, with the options of `add_clip_options`.
        more: other arguments of the call; None counts for left out.

    Returns:
        What was given; what was left out is the embedded model's own, or the pipeline's default.

    Raises:
        ModelError: the pipeline takes no such argument, or not with this value.
    """
    from vidaccel.clips.embedded import EMBEDDED_CALL
    from vidaccel.clips.load import call_arguments, check_call

    width, height = getattr(arguments, "size", None) or (None, None)
    asked = {"height": height, "width": width, "num_frames": getattr(arguments, "frames", None)}
    asked |= {"guidance_scale": getattr(arguments, "guidance", None), **more}
    defaults = EMBEDDED_CALL if arguments.model is None else {}
    given = {name: value for name, value in asked.items() if value is not None}
    call = call_arguments(pipe, defaults | given)
    check_call(pipe, {"prompt": "a prompt", **call})
    return call


def model_name(arguments: argparse.Namespace) -> str:
    """Return the name of the model for results: what --model says, or tiny-wan."""
    return arguments.model or "tiny-wan"


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a block cache; `cache_of` reads them."""
    defaults = DBCache()
    group = parser.add_argument_group("block cache")
    for name, text in (
        ("probe_blocks", "blocks that always run first"),
        ("corrector_blocks", "blocks that always run last"),
        ("warmup_steps", "first steps that are computed"),
        ("max_consecutive", "reused steps in a row"),
        ("forecast_order", "0 holds the residual, 1 and 2 extend it over the noise level"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole_number(0),
            default=getattr(defaults, name),
            metavar="N",
            help=text,
        )


def cache_of(arguments: argparse.Namespace) -> Any:
    """Return the block cache of the arguments, as `accelerate(cache=...)` takes it.

    Raises:
        PlanError: there are no such settings.
    """
    text = getattr(arguments, "cache", "model")
    if text in ("auto", "none"):
        return None if text == "none" else "auto"
    try:
        threshold = None if text == "model" else float(text)
    except ValueError:
        raise PlanError(
            f"--cache is auto, none, model or a threshold such as 0.08, found {text!r}"
        ) from None
    return DBCache(
        threshold,
        probe_blocks=arguments.probe_blocks,
        corrector_blocks=arguments.corrector_blocks,
        warmup_steps=arguments.warmup_steps,
        max_consecutive=arguments.max_consecutive,
        forecast_order=arguments.forecast_order,
    )


def attention_of(arguments: argparse.Namespace) -> Any:
    """Return the attention of the arguments, as `accelerate(attention=...)` takes it.

    Raises:
        AttentionError: it is no share of attention mass.
    """
    text = arguments.attention
    if text in ("auto", "none"):
        return None if text == "none" else "auto"
    try:
        top_p = float(text)
    except ValueError:
        raise AttentionError(
            f"--attention is auto, none or a share of attention mass such as 0.9, found {text!r}"
        ) from None
    # Asked for by name, it is for short clips too.
    return SVG2(top_p=top_p, min_tokens=0)


def add_steps_option(parser: argparse.ArgumentParser, least: int, default: int) -> None:
    """Add --steps, of which there have to be so many at least."""
    steps = whole_number(least, MAX_STEPS)
    parser.add_argument("--steps", type=steps, default=default, help="denoising steps")


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    """Add --seed, of one seed."""
    seed = whole_number(0, MAX_SEED)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")


def add_prompts_option(parser: argparse.ArgumentParser) -> None:
    """Add --prompts; `read_prompts` reads them."""
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one per line")


def add_workdir_option(parser: argparse.ArgumentParser, *older: str) -> None:
    """Add --workdir, also under older names."""
    parser.add_argument(
        "--workdir", *older, type=Path, help="keeps what is measured; go on from there"
    )


def add_plot_option(parser: argparse.ArgumentParser) -> None:
    """Add --plot."""
    parser.add_argument(
        "--plot",
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw the curves there: .png, .svg or .pdf; needs matplotlib",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json; `vidaccel.cli.output` writes there."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there, or - for the screen"
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that were typed by mistake.

    Raises:
        ModelError: one is empty, or the words of one prompt came as prompts of their own.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ModelError("the prompt is empty: say what to show")
    if len(prompts) > 1 and not any(len(prompt.split()) > 1 for prompt in prompts):
        raise ModelError(
            f"found {len(prompts)} prompts of one word each: put quotes around one prompt"
        )


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line; empty lines are left out.

    Raises:
        PolicyError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PolicyError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} is not UTF-8 text: {error.reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PolicyError(f"{path} holds no prompt; write one per line")
    return prompts
