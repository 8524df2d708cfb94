"""Queries and keys as int8 with a scale per token: half the memory, and twice the products.

Keys lose a vector that they share before they are rounded: trained models give some channels of
all keys a large offset, and what is left of a token beside it would hold few of the 127 levels.
What a vector taken from every key adds to the scores of a query is one number, which the softmax
does not see (SageAttention, arXiv 2410.02367). See `reference.to_int8` and `reference.key_shift`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import KernelError
from vidaccel.kernels.reference import LEAST, SAMPLES

QUANTISE = {"ROWS": 32, "num_warps": 4}
_LEAST, _SAMPLES = tl.constexpr(LEAST), tl.constexpr(SAMPLES)


@dataclass
class Int8Keys:
    """Rounded keys: D + 4 bytes a key and head, where 16-bit ones take 2 D.

    Attributes:
        values: [B, H, S, D] int8, sorted by cluster.
        scale: [B, H, S] fp32; NaN for a key that holds NaN or infinity.
        shift: [B, H, D] fp32, what was taken from every key.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def empty(cls, k: Tensor) -> Int8Keys:
        """Room for keys [B, H, S, D]."""
        batch, heads, tokens, width = k.shape

        def floats(*shape: int) -> Tensor:
            return torch.empty(batch, heads, *shape, dtype=torch.float32, device=k.device)

        values = torch.empty(k.shape, dtype=torch.int8, device=k.device)
        return cls(values, floats(tokens), floats(width))


def quantise_keys(k: Tensor, k_offsets: Tensor, clusters: int) -> Int8Keys:
    """Round sorted keys [B, H, S, D], less the mean of a sample of the first clusters: one launch.

    The last update of k-means does the same on its way, with no launch of its own.
    """
    if not 1 <= clusters <= k_offsets.shape[2] - 1:
        raise KernelError(
            f"shift_clusters must be from 1 to {k_offsets.shape[2] - 1}, found {clusters}"
        )
    batch, heads, tokens, width = k.shape
    keys = Int8Keys.empty(k)
    _quantise[(triton.cdiv(tokens, QUANTISE["ROWS"]), batch * heads)](
        k,
        k_offsets,
        keys.values,
        keys.scale,
        keys.shift,
        tokens,
        k_offsets.shape[2],
        clusters,
        D=width,
        DP=triton.next_power_of_2(width),
        **QUANTISE,
    )
    return keys


@triton.jit(do_not_specialize=["tokens", "ends", "clusters"])
def _quantise(
    k,
    k_offsets,
    values,
    scale,
    shift,
    tokens,
    ends,
    clusters,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some keys of one head."""
    group = tl.program_id(1).to(tl.int64)
    k += group * tokens * D
    count = tl.load(k_offsets + group * ends + clusters)
    mean = sampled_mean(k, D, k, count, False, D, DP, ROWS)
    column = tl.arange(0, DP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < tokens)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    tile = tl.load(k + place, mask=inside, other=0.0)
    whole, step = to_int8(tile.to(tl.float32) - mean[None, :])
    tl.store(values + group * tokens * D + place, whole, mask=inside)
    tl.store(scale + group * tokens + row, step, mask=row < tokens)
    if tl.program_id(0) == 0:
        tl.store(shift + group * D + column, mean, mask=column < D)


@triton.jit
def to_int8(x):
    """Rows [R, C] fp32 as int8 [R, C], and the scale [R] of each.

    Nothing here may be fused into a multiply-add, so that every chip rounds alike.
    """
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, float("inf")), 1)
    levels = tl.where(largest > _LEAST, tl.div_rn(127.0, largest), 0.0)
    x = x * levels[:, None]
    whole = tl.floor(x)
    whole += tl.where(x >= whole + 0.5, 1.0, 0.0)
    whole = tl.clamp(whole, -127.0, 127.0)  # of NaN a number: its scale is NaN
    scale = tl.where(largest < float("inf"), largest * (1.0 / 127.0), float("nan"))
    return whole.to(tl.int32).to(tl.int8), scale


@triton.jit
def sampled_mean(
    x,
    row_stride,
    order,
    count,
    ORDERED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """See `reference.key_shift`: x and `order` are those of a head, `count` its keys to sample."""
    column = tl.arange(0, DP)
    total = tl.zeros([ROWS, DP], tl.float32)
    for at in tl.static_range(0, _SAMPLES, ROWS):
        row = (at + tl.arange(0, ROWS)).to(tl.int64) * count // _SAMPLES
        known = row < count
        if ORDERED:
            row = tl.load(order + row, mask=known, other=0).to(tl.int64)
        tile = tl.load(
            x + row[:, None] * row_stride + column[None, :],
            mask=known[:, None] & (column < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        # The shift may be anything, so one key that is not finite must not spoil all.
        total += tl.where(tl.abs(tile) < float("inf"), tile, 0.0) * (1.0 / _SAMPLES)
    return tl.sum(total, 0).to(tl.bfloat16).to(tl.float32)
