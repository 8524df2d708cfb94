"""Linear layers in low precision: activations rotated and rounded, and their product with weights.

The formats are told by plain numbers: codes from -`qmax` to `qmax`, a scale for every `block` of
channels, and the numbers that a scale may be. Codes of activations are int8 in memory; weights of 4
bits lie two in a byte. Everything here chooses between Triton and the torch twins of `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import Impl, resolve
from vidaccel.kernels.reference import pack_int4, unpack_int4

__all__ = ["pack_int4", "quantised_linear", "rotate_quantise", "token_haar", "unpack_int4"]


def rotate_quantise(
    x: Tensor,
    *,
    qmax: int = 127,
    block: int | None = None,
    scale_format: str = "float32",
    tensor_scale: Tensor | None = None,
    rotation: Tensor | None = None,
    high: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """See `reference.rotate_quantise`, which this equals but for codes next to a half."""
    reference.check_rotate_quantise(x, qmax, block, scale_format, tensor_scale, rotation, high)
    options: dict[str, Any] = {
        "qmax": qmax,
        "block": block,
        "scale_format": scale_format,
        "tensor_scale": tensor_scale,
        "rotation": rotation,
        "high": high,
    }
    if resolve(impl, x) == "reference":
        return reference.rotate_quantise(x, **options)
    # Triton need not be there for the reference.
    from vidaccel.kernels.rotate import rotate_quantise_triton

    return rotate_quantise_triton(x, **options)


def quantised_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    block: int | None = None,
    packed: bool = False,
    out_dtype: torch.dtype,
    impl: Impl = "auto",
) -> Tensor:
    """See `reference.quantised_linear`, which this equals up to rounding.

    On some chips blocks are multiplied in 16 bits (see `product`): exact where scales are powers of
    two, and else with scales rounded to bfloat16, unless the output is in fp32.
    """
    reference.check_quantised_linear(
        codes, scales, weight, weight_scales, bias, block, packed, out_dtype
    )
    tensors = (codes, scales, weight, weight_scales, bias)
    if resolve(impl, scales, weight_scales, bias) == "reference":
        return reference.quantised_linear(*tensors, block=block, packed=packed, out_dtype=out_dtype)
    from vidaccel.kernels.product import quantised_linear_triton

    return quantised_linear_triton(*tensors, block=block, packed=packed, out_dtype=out_dtype)


def token_haar(
    x: Tensor,
    grid: tuple[int, int, int],
    *,
    inverse: bool = False,
    levels: int = 3,
    impl: Impl = "auto",
) -> Tensor:
    """See `reference.token_haar`, which this equals up to rounding."""
    reference.check_token_haar(x, grid, levels)
    if resolve(impl, x) == "reference":
        return reference.token_haar(x, grid, inverse=inverse, levels=levels)
    from vidaccel.kernels.haar import token_haar_triton

    return token_haar_triton(x, grid, inverse=inverse, levels=levels)
