"""The options that commands share: types of arguments, groups, and what is read from them."""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vidaccel.dbcache import DBCache
from vidaccel.errors import AttentionError, PlanError, PolicyError
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


# Types of arguments.


def at_least(low: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from `low` on."""

    def whole_number(text: str) -> int:
        """Read one; raises ArgumentTypeError for anything else."""
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of {low} or more: {text!r}")
        return value

    return whole_number


def size(text: str) -> tuple[int, int]:
    """Read an argument: width and height in pixels, as in 832x480."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected width x height, such as 832x480: {text!r}")
    return int(match[1]), int(match[2])


def shares(text: str) -> list[float]:
    """Read an argument: numbers in (0, 1], separated by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"numbers in (0, 1] expected, found {text!r}")
    return found


# Groups of options, and what is read from them.


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
        group.add_argument("--threads", type=at_least(1), help="CPU threads of torch")


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


def pipeline_of(arguments: argparse.Namespace) -> Any:
    """Load the pipeline that the arguments name, on as many threads as they say.

    Raises:
        ModelError: it cannot be loaded.
    """
    if getattr(arguments, "threads", None) is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    return loader_of(arguments)()


def add_clip_options(parser: argparse.ArgumentParser, *, guidance: bool = False) -> None:
    """Add --size and --frames, and --guidance where it is asked for; `call_of` reads them."""
    group = parser.add_argument_group("clip")
    group.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels")
    group.add_argument("--frames", type=at_least(1), help="number of frames")
    if guidance:
        group.add_argument("--guidance", type=float, help="guidance scale")


def call_of(pipe: Any, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the arguments of a pipeline's call.

    Args:
        pipe: the pipeline of `pipeline_of`.
        arguments: those of the command line, with the options of `add_clip_options`.
        more: other arguments of the call; None counts for left out.

    Returns:
        What was given; what was left out is the embedded model's own, or the pipeline's default.

    Raises:
        ModelError: the pipeline takes no such argument.
    """
    from vidaccel.clips.embedded import EMBEDDED_CALL
    from vidaccel.clips.load import call_arguments

    width, height = arguments.size or (None, None)
    asked = {"height": height, "width": width, "num_frames": arguments.frames}
    asked |= {"guidance_scale": getattr(arguments, "guidance", None), **more}
    defaults = EMBEDDED_CALL if arguments.model is None else {}
    given = {name: value for name, value in asked.items() if value is not None}
    return call_arguments(pipe, defaults | given)


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
            type=at_least(0),
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


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json; `vidaccel.cli.output` writes there."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers there, or - for the screen"
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
