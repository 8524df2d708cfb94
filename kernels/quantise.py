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
from vidaccel.kernels.launch import launch
from vidaccel.kernels.reference import LEAST, SAMPLES
from vidaccel.kernels.tiles import block_d, load_tile


def quantise_keys(k: Tensor, k_offsets: Tensor, clusters: int) -> Int8Keys:
    """Round sorted keys [B, H, S, D], less the mean of a sample of the first clusters: one launch.

    The last update of k-means does the same on its way, with no launch of its own.
    """
    if not 1 <= clusters <= k_offsets.shape[2] - 1:
        raise KernelError(
            f"shift_clusters must be from 1 to {k_offsets.shape[2] - 1}, found {clusters}"
        )
    batch, heads, tokens, head_dim = k.shape
    keys = Int8Keys.empty(k)
    launch(_quantise, k.device, triton.cdiv(tokens, QUANTISE["BLOCK_N"]), batch * heads)(
        k,
        k_offsets,
        keys.codes,
        keys.scale,
        keys.shift,
        tokens,
        k_offsets.shape[2],
        clusters,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **QUANTISE,
    )
    return keys


@dataclass
class Int8Keys:
    """Rounded keys: D + 4 bytes a key and head, where 16-bit ones take 2 D.

    Attributes:
        codes: [B, H, S, D] int8, sorted by cluster.
        scale: [B, H, S] fp32; NaN for a key that holds NaN or infinity.
        shift: [B, H, D] fp32, what was taken from every key.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def empty(cls, k: Tensor) -> Int8Keys:
        """Allocate for keys [B, H, S, D]."""
        batch, heads, tokens, head_dim = k.shape

        def floats(*shape: int) -> Tensor:
            return torch.empty(batch, heads, *shape, dtype=torch.float32, device=k.device)

        codes = torch.empty(k.shape, dtype=torch.int8, device=k.device)
        return cls(codes, floats(tokens), floats(head_dim))


QUANTISE = {"BLOCK_N": 32, "num_warps": 4}
_LEAST, _SAMPLES = tl.constexpr(LEAST), tl.constexpr(SAMPLES)


@triton.jit(do_not_specialize=["tokens", "num_offsets", "num_clusters"])
def _quantise(
    k,
    k_offsets,
    codes,
    scale,
    shift,
    tokens,
    num_offsets,
    num_clusters,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Round some keys of one head."""
    batch_head = tl.program_id(1).to(tl.int64)
    k += batch_head * tokens * HEAD_DIM
    num_sampled = tl.load(k_offsets + batch_head * num_offsets + num_clusters)
    mean = sampled_mean(k, HEAD_DIM, None, num_sampled, HEAD_DIM, BLOCK_D, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < tokens
    # [BLOCK_N, BLOCK_D]
    tile = load_tile(k, offs_n.to(tl.int64), HEAD_DIM, offs_d, mask_n, HEAD_DIM)
    rounded, step = to_int8(tile.to(tl.float32) - mean[None, :])
    place = offs_n.to(tl.int64)[:, None] * HEAD_DIM + offs_d[None, :]
    mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(codes + batch_head * tokens * HEAD_DIM + place, rounded, mask=mask)
    tl.store(scale + batch_head * tokens + offs_n, step, mask=mask_n)
    if tl.program_id(0) == 0:
        tl.store(shift + batch_head * HEAD_DIM + offs_d, mean, mask=offs_d < HEAD_DIM)


@triton.jit
def to_int8(x):
    """Round rows [R, C] fp32 to int8 [R, C], with the scale [R] of each; see `reference.to_int8`.

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
    sorted_idx,
    num_sampled,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the mean [BLOCK_D] of a sample of the first keys of a head; see `reference.key_shift`.

    Without `sorted_idx` x is sorted already.
    """
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.static_range(0, _SAMPLES, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64) * num_sampled // _SAMPLES
        mask_n = row < num_sampled
        if sorted_idx is not None:
            row = tl.load(sorted_idx + row, mask=mask_n, other=0).to(tl.int64)
        # [BLOCK_N, BLOCK_D]
        tile = load_tile(x, row, row_stride, offs_d, mask_n, HEAD_DIM).to(tl.float32)
        # The shift may be anything, so one key that is not finite must not spoil all.
        total += tl.where(tl.abs(tile) < float("inf"), tile, 0.0) * (1.0 / _SAMPLES)
    return tl.sum(total, 0).to(tl.bfloat16).to(tl.float32)
