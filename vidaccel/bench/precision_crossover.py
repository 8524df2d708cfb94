"""Integers against floating formats on Gaussian numbers: the crest factor at which they are even.

Of "INT v.s. FP" (arXiv 2510.25602, section 3): the noise of integers grows with the crest factor of
a block, largest over root mean square, and that of floating numbers hardly does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from vidaccel.environment import environment
from vidaccel.precision.formats import FORMATS, Format, dequantise, quantise

# Integer and floating format, and the crest factor at which the paper has them even.
PAIRS = {
    "MX8": ("mxint8", "mxfp8", 7.55),
    "MX4": ("mxint4", "mxfp4", 2.04),
    "NV4": ("nvint4", "nvfp4", 2.39),
}
# No 32 numbers have a crest factor over 5.66, so that MXINT8 is ahead on every block of its own
# size: the point at which it no longer would be is found on longer ones.
_BLOCKS = {"MX8": 256}


@dataclass(frozen=True)
class CrossoverPoint:
    """A pair of formats at one crest factor.

    Attributes:
        pair: "MX8", "MX4" or "NV4".
        block: numbers with one scale.
        crest: largest over root mean square of each block.
        integer, floating: signal over the noise of rounding, in dB.
    """

    pair: str
    block: int
    crest: float
    integer: float
    floating: float


@dataclass(frozen=True)
class CrossoverResult:
    """The result of `crossover`.

    Attributes:
        points: by pair, by crest factor.
        even_at: pair -> crest factor at which both are as good; None where they never are.
        published: what the paper has for it.
        environment: hardware and versions.
    """

    points: list[CrossoverPoint]
    even_at: dict[str, float | None]
    published: dict[str, float]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and numbers."""
        return asdict(self)


def crossover(blocks: int = 8192, *, seed: int = 0) -> CrossoverResult:
    """Measure every pair over crest factors.

    Args:
        blocks: Gaussian blocks of each crest factor.
        seed: seed of the numbers.
    """
    points, even = [], {}
    for pair, (integer, floating, _) in PAIRS.items():
        size = _BLOCKS.get(pair) or FORMATS[integer].block or 0
        own = []
        for step in range(60):
            crest = 1.5 * 1.04**step
            if crest >= 0.95 * math.sqrt(size):
                break
            x = gaussian_blocks(blocks, size, crest, seed)
            if x is None:
                continue
            ratios = [_ratio(x, replace(FORMATS[name], block=size)) for name in (integer, floating)]
            own.append(CrossoverPoint(pair, size, crest, *ratios))
        points += own
        even[pair] = _even(own)
    published = {pair: crest for pair, (_, _, crest) in PAIRS.items()}
    return CrossoverResult(points, even, published, environment())


def gaussian_blocks(count: int, size: int, crest: float, seed: int) -> torch.Tensor | None:
    """Return Gaussian numbers [N, size] whose largest one is set to give one crest factor.

    Blocks in which it would not be the largest any more are left out; None where hardly any is
    left. Each block is of a random size, so that powers of two are met at all distances.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    place = x.abs().argmax(1, keepdim=True)
    others = x.scatter(1, place, 0.0)
    largest = (crest**2 * others.square().sum(1) / (size - crest**2)).sqrt()
    x = x.scatter(1, place, (largest[:, None] * x.gather(1, place).sign()))
    fits = others.abs().amax(1) <= largest
    x = x * torch.exp2(torch.rand(count, 1, generator=generator, dtype=torch.float64))
    return x[fits].float() if int(fits.sum()) >= count // 100 + 1 else None


def _ratio(x: torch.Tensor, form: Format) -> float:
    """Return the mean over the blocks of signal over noise, in dB."""
    noise = (dequantise(quantise(x, form)) - x).square().sum(1)
    return float((10 * torch.log10(x.square().sum(1) / noise.clamp_min(1e-30))).mean())


def _even(points: Sequence[CrossoverPoint]) -> float | None:
    """Return the crest factor at which the integers fall behind, between the two points around."""
    for one, two in pairwise(points):
        before, after = one.integer - one.floating, two.integer - two.floating
        if before > 0 >= after:
            return one.crest + (two.crest - one.crest) * before / (before - after)
    return None


def crossover_table(result: CrossoverResult) -> str:
    """Return the result of `crossover` for people."""
    lines = ["pair  block  even at  published"]
    for pair, even in result.even_at.items():
        block = next(point.block for point in result.points if point.pair == pair)
        found = "-" if even is None else f"{even:.2f}"
        lines.append(f"{pair:4s}  {block:5d}  {found:>7s}  {result.published[pair]:9.2f}")
    return "\n".join(lines)
