"""Gather rows by an index, and its exact inverse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import (
    Impl,
    check_integers,
    check_layout,
    check_like,
    resolve,
    rows_contiguous,
)
from vidaccel.kernels.launch import launch
from vidaccel.kernels.tiles import block_d, load_tile


def permute(x: Tensor, order: Tensor, *, impl: Impl = "auto") -> Tensor:
    """See `reference.permute`: rows of x [B, H, S, D] in the order [B, H, S] int32."""
    return _moved(x, order, impl, scatter=False)


def unpermute(y: Tensor, order: Tensor, *, impl: Impl = "auto") -> Tensor:
    """See `reference.unpermute`: undoes `permute` exactly."""
    return _moved(y, order, impl, scatter=True)


def _moved(x: Tensor, sorted_idx: Tensor, impl: Impl, *, scatter: bool) -> Tensor:
    if resolve(impl, x, sorted_idx) == "reference":
        return reference.unpermute(x, sorted_idx) if scatter else reference.permute(x, sorted_idx)
    check_layout("x", x, reference=False)
    check_integers("order", sorted_idx, 3)
    check_like("order", sorted_idx, "x", x, 0, 1, 2)
    x = rows_contiguous(x)
    batch, heads, tokens, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(_move, x.device, triton.cdiv(tokens, MOVE["BLOCK_M"]), batch * heads)(
        x,
        sorted_idx.contiguous(),
        out,
        *x.stride()[:3],
        heads,
        tokens,
        SCATTER=scatter,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **MOVE,
    )
    return out


MOVE = {"BLOCK_M": 64, "num_warps": 4}


@triton.jit(do_not_specialize=["heads", "tokens"])
def _move(
    x,
    sorted_idx,
    out,
    batch_stride,
    head_stride,
    row_stride,
    heads,
    tokens,
    SCATTER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Move one tile of rows; int64 throughout, since offsets can pass 2^31."""
    batch_head = tl.program_id(1)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < tokens
    base = batch_head.to(tl.int64) * tokens
    token = tl.load(sorted_idx + base + offs_m, mask=mask_m, other=0).to(tl.int64)
    offs_m = offs_m.to(tl.int64)
    if SCATTER:
        source, target = offs_m, token
    else:
        source, target = token, offs_m
    # [BLOCK_M, BLOCK_D]
    x += batch * batch_stride + head * head_stride
    tile = load_tile(x, source, tl.cast(row_stride, tl.int64), offs_d, mask_m, HEAD_DIM)
    tl.store(
        out + (base + target)[:, None] * HEAD_DIM + offs_d[None, :],
        tile,
        mask=mask_m[:, None] & (offs_d < HEAD_DIM)[None, :],
    )
