"""Number formats in blocks with a scale each: integers and, for comparison, floating ones.

The MX and NV formats are those of "INT v.s. FP" (arXiv 2510.25602, sections 2 and 3): integer codes
are symmetric, so that -127 and -7 are the least ones, and the scale of a block makes its largest
entry the largest code.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

ScaleFormat = Literal["float32", "ue8m0", "e4m3"]

E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-9  # the least above 0
_E4M3_BITS = torch.float8_e4m3fn


@dataclass(frozen=True)
class Format:
    """A number format of rows of channels.

    Attributes:
        name: its name in `LowPrecision`.
        largest: the largest code: 127 or 7 of integers, 448 of E4M3, 6 of E2M1.
        floating: the codes are floating-point numbers and no integers.
        block: channels with one scale; None: one scale for the whole row.
        scale: the numbers that a scale may be: any of "float32", powers of two ("ue8m0"), or E4M3
            times a scale of the whole tensor ("e4m3").
    """

    name: str
    largest: float
    floating: bool = False
    block: int | None = None
    scale: ScaleFormat = "float32"

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return 4 if self.largest < 8 else 8

    @property
    def bits_with_scale(self) -> float:
        """The bits of a code with its share of the scale; rows are taken for endless."""
        return self.bits + (8 / self.block if self.block else 0.0)


FORMATS = {
    known.name: known
    for known in (
        Format("int8", 127),
        Format("mxint8", 127, block=32, scale="ue8m0"),
        Format("nvint4", 7, block=16, scale="e4m3"),
        Format("mxint4", 7, block=32, scale="ue8m0"),
        Format("fp8", E4M3_MAX, floating=True),
        Format("mxfp8", E4M3_MAX, floating=True, block=32, scale="ue8m0"),
        Format("nvfp4", 6, floating=True, block=16, scale="e4m3"),
        Format("mxfp4", 6, floating=True, block=32, scale="ue8m0"),
    )
}


class Quantised(NamedTuple):
    """Numbers in a format.

    Attributes:
        codes: [..., K], int8, or E4M3 for floating formats; E2M1 is a part of E4M3.
        scales: [..., K / block] float32; [..., 1] for a scale per row.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def tensor_scale_of(x: torch.Tensor, form: Format) -> torch.Tensor | None:
    """Return the scale of a whole tensor, a scalar; None for formats without one."""
    if form.scale != "e4m3":
        return None
    return x.abs().amax().float() / (form.largest * E4M3_MAX)


def scales_of(
    x: torch.Tensor, form: Format, tensor_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scales of rows, as `Quantised` has them.

    A block of zeros has the scale 1, or the least that there is. NaN and infinity end up in the
    scale of their block, so that they come out again.

    Args:
        x: [..., K], K a multiple of the block.
        form: the format.
        tensor_scale: the scalar of `tensor_scale_of`; None takes that of `x`.
    """
    blocks = _blocked(x, form)
    scales = blocks.abs().amax(-1).float() / form.largest
    if form.scale == "ue8m0":
        scales = _power_above(scales)
    elif form.scale == "e4m3":
        whole = tensor_scale_of(x, form) if tensor_scale is None else tensor_scale
        assert whole is not None
        whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        least = torch.full_like(scales, E4M3_LEAST)
        scales = whole * torch.maximum(_e4m3(scales / whole), least)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def quantise(
    x: torch.Tensor,
    form: Format,
    *,
    scales: torch.Tensor | None = None,
    tensor_scale: torch.Tensor | None = None,
) -> Quantised:
    """Round to a format, to nearest, ties to even.

    Args:
        x: [..., K], K a multiple of the block.
        form: the format.
        scales: as `Quantised` has them; None takes those of `scales_of`.
        tensor_scale: the scalar of `tensor_scale_of`; None takes that of `x`.
    """
    if scales is None:
        scales = scales_of(x, form, tensor_scale)
    blocks = x.reshape(*scales.shape, x.shape[-1] // scales.shape[-1])
    codes = blocks.float() / scales.unsqueeze(-1)
    if not form.floating:
        return Quantised(
            codes.round().clamp(-form.largest, form.largest).to(torch.int8).reshape(x.shape), scales
        )
    codes = _e2m1(codes) if form.bits == 4 else _e4m3(codes)
    return Quantised(codes.to(_E4M3_BITS).reshape(x.shape), scales)


def dequantise(numbers: Quantised, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the numbers that codes and scales stand for."""
    codes, scales = numbers
    blocks = codes.to(torch.float32).reshape(*scales.shape, codes.shape[-1] // scales.shape[-1])
    return (blocks * scales.unsqueeze(-1)).reshape(codes.shape).to(dtype)


def rounded(x: torch.Tensor, form: Format) -> torch.Tensor:
    """Return what is left of numbers in a format, in their own type."""
    return dequantise(quantise(x, form), x.dtype)


def _blocked(x: torch.Tensor, form: Format) -> torch.Tensor:
    """Return x [..., K] as [..., K / block, block]."""
    block = form.block or x.shape[-1]
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _power_above(x: torch.Tensor) -> torch.Tensor:
    """Return the least power of two that is not below, as far as 8 bits of exponent go."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent, mantissa in [1/2, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    power = torch.ldexp(torch.ones_like(x), exponent)
    return torch.where((x == 0) | ~x.isfinite(), x, power)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3; what is larger than its largest number becomes that."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(_E4M3_BITS).to(x.dtype)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to E2M1: 0, 1/2, 1, 3/2, 2, 3, 4 and 6."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((x / step).round() * step).clamp(-6.0, 6.0)
