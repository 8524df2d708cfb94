"""The types of arguments: each reads what was typed, or says in one line what it expected."""

import argparse
import math
import re
from collections.abc import Callable

# As far as a policy file goes: see `vidaccel.plans.schema`, which is not imported here because
# --help waits for no library.
MAX_STEPS = 1000
MAX_PIXELS = 16384  # a side
MAX_FRAMES = 100_000
MAX_SEED = 2**64 - 1  # of torch's generators


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argument type: whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        """Read one; raises ArgumentTypeError for anything else."""
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of {low} or more: {text!r}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"expected at most {high}: {text!r}")
        return value

    return read


def number(low: float = -math.inf, *, above: bool = False) -> Callable[[str], float]:
    """Return an argument type: finite numbers from `low` on, or `above` it."""
    if math.isinf(low):
        expected = "a number"
    else:
        expected = f"a number above {low:g}" if above else f"a number of {low:g} or more"

    def read(text: str) -> float:
        """Read one; raises ArgumentTypeError for anything else."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected {expected}: {text!r}")
        return value

    return read


def size(text: str) -> tuple[int, int]:
    """Read an argument: width and height in pixels, as in 832x480."""
    match = re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected width x height, such as 832x480: {text!r}")
    if max(map(len, match.groups())) > 9 or max(map(int, match.groups())) > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_PIXELS} pixels a side: {text!r}")
    return int(match[1]), int(match[2])


def seeds(text: str) -> list[int]:
    """Read an argument: whole numbers, separated by commas, each once."""
    found = [whole_number(0, MAX_SEED)(part) for part in text.split(",")]
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"expected each seed once: {text!r}")
    return found


def shares(text: str) -> list[float]:
    """Read an argument: numbers in (0, 1], separated by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 1 for share in found):
        raise argparse.ArgumentTypeError(f"numbers in (0, 1] expected, found {text!r}")
    return found
