"""What the commands share: argument types, checks before any work, and how results come out."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidaccel.dbcache import DBCache
from vidaccel.errors import AttentionError, OutputError, PlanError, PolicyError
from vidaccel.svg2.settings import SVG2


def at_least(low: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `low` on."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of {low} or more: {text!r}")
        return value

    return whole_number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument("--device", help="cuda, cpu, ...; the GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU"
    )
    parser.add_argument("--offload", action="store_true", help="keep idle parts in host memory")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that sets a block cache; `cache_of` reads them."""
    defaults = DBCache()
    group = parser.add_argument_group("block cache")
    for name, low, text in (
        ("probe_blocks", 0, "blocks that always run first"),
        ("corrector_blocks", 0, "blocks that always run last"),
        ("warmup_steps", 0, "first steps that are computed"),
        ("max_consecutive", 0, "reused steps in a row"),
        ("forecast_order", 0, "0 holds the residual, 1 and 2 extend it over the noise level"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=at_least(low),
            default=getattr(defaults, name),
            metavar="N",
            help=text,
        )


def cache_of(arguments: argparse.Namespace) -> Any:
    """What the options say, as `accelerate(cache=...)` takes it.

    Raises:
        PlanError: they are no such settings.
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


def sparse_attention_of(arguments: argparse.Namespace) -> Any:
    """What `--attention` says, as `accelerate(attention=...)` takes it.

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


def size(text: str) -> tuple[int, int]:
    """An argument type: width and height in pixels, as in 832x480."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected width x height, such as 832x480: {text!r}")
    return int(match[1]), int(match[2])


def shares(value: str) -> list[float]:
    """A type of argument: numbers in (0, 1], separated by commas."""
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"numbers in (0, 1] expected, found {value!r}")
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; empty lines are left out."""
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


def check_writable(*paths: Path | None) -> None:
    """Find out now whether files can be written later; raises OutputError if not.

    None and "-", which is the screen, are no files.
    """
    for path in paths:
        if path is None or str(path) == "-":
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a"):
                pass
            if new:
                path.unlink()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error


def print_result(text: str, json_path: Path | None) -> None:
    """Print for people; to stderr when stdout is taken by JSON."""
    print(text, file=sys.stderr if str(json_path) == "-" else sys.stdout)


def finite(value: Any) -> Any:
    """What JSON can hold: it knows no infinity, so the PSNR of equal clips becomes null."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write a result, sorted and indented; to stdout for the path "-", nowhere for None."""
    if path is None:
        return
    text = json.dumps(finite(result), indent=2, sort_keys=True)
    if str(path) == "-":
        print(text)
    else:
        path.write_text(text + "\n")
