"""Gather rows by an index, and its exact inverse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import Impl, check_integers, check_layout, check_like, resolve

MOVE = {"ROWS": 64, "num_warps": 4}


def permute(x: Tensor, order: Tensor, *, impl: Impl = "auto") -> Tensor:
    """See `reference.permute`: rows of x [B, H, S, D] in the order [B, H, S] int32."""
    return _moved(x, order, impl, scatter=False)


def unpermute(y: Tensor, order: Tensor, *, impl: Impl = "auto") -> Tensor:
    """See `reference.unpermute`: undoes `permute` exactly."""
    return _moved(y, order, impl, scatter=True)


def _moved(x: Tensor, order: Tensor, impl: Impl, *, scatter: bool) -> Tensor:
    if resolve(impl, x, order) == "reference":
        return reference.unpermute(x, order) if scatter else reference.permute(x, order)
    check_layout("x", x, reference=False)
    check_integers("order", order, 3)
    check_like("order", order, "x", x, 0, 1, 2)
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _move[(triton.cdiv(tokens, MOVE["ROWS"]), batch * heads)](
        x,
        order.contiguous(),
        out,
        *x.stride()[:3],
        heads,
        tokens,
        SCATTER=scatter,
        D=width,
        DP=triton.next_power_of_2(width),
        **MOVE,
    )
    return out


@triton.jit(do_not_specialize=["heads", "tokens"])
def _move(
    x,
    order,
    out,
    batch_stride,
    head_stride,
    row_stride,
    heads,
    tokens,
    SCATTER: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move one tile of rows; int64 throughout, since offsets can pass 2^31."""
    group = tl.program_id(1)
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    mine = place < tokens
    base = group.to(tl.int64) * tokens
    other = tl.load(order + base + place, mask=mine, other=0).to(tl.int64)
    place = place.to(tl.int64)
    if SCATTER:
        source, target = place, other
    else:
        source, target = other, place
    both = mine[:, None] & (column < D)[None, :]
    tile = tl.load(
        x
        + batch * batch_stride
        + head * head_stride
        + source[:, None] * tl.cast(row_stride, tl.int64)
        + column[None, :],
        mask=both,
        other=0.0,
    )
    tl.store(out + (base + target)[:, None] * D + column[None, :], tile, mask=both)
