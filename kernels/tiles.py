"""Pieces that several Triton kernels share: loads of tiles, the online softmax, constants.

Imports nothing of the package, so that every kernel and `common` can build on it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The first m_i of a running softmax: below every score, and finite, so that keys with the score
# -inf alone make no NaN.
LOWEST = tl.constexpr(-1e38)


def block_d(head_dim: int) -> int:
    """Return BLOCK_D, the width of the tiles that hold rows of a head dimension."""
    return int(triton.next_power_of_2(head_dim))


def interpreting() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on the CPU."""
    # Triton decides when a kernel is defined.
    return not isinstance(load_tile, JITFunction)


@triton.jit
def load_tile(
    base,
    rows,
    row_stride,
    offs_d,
    mask,
    HEAD_DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Load rows of a matrix as [len(rows), BLOCK_D], or as [BLOCK_D, len(rows)] if TRANSPOSED.

    Zeros stand in the columns `offs_d` [BLOCK_D] from HEAD_DIM on, and in the rows that `mask`
    hides; None hides none.
    """
    if TRANSPOSED:
        ptrs = base + rows[None, :] * row_stride + offs_d[:, None]
    else:
        ptrs = base + rows[:, None] * row_stride + offs_d[None, :]
    if mask is None:
        if offs_d.shape[0] == HEAD_DIM:
            tile = tl.load(ptrs)
        elif TRANSPOSED:
            tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[:, None], other=0.0)
        else:
            tile = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    elif TRANSPOSED:
        tile = tl.load(ptrs, mask=mask[None, :] & (offs_d < HEAD_DIM)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def online_softmax_update(m_i, l_i, acc, scores, row_scale):
    """Take one more tile of scores into a running softmax with base 2.

    Args:
        m_i: [BLOCK_M] largest score so far; LOWEST at first.
        l_i: [BLOCK_M] sum of 2^(score - m_i).
        acc: [BLOCK_M, BLOCK_D] sum of 2^(score - m_i) times value.
        scores: [BLOCK_M, BLOCK_N]; -inf where a key is hidden.
        row_scale: [BLOCK_M] factor on the scores, not negative; None where they are scaled.

    Returns:
        m_i, l_i, acc before the values of this tile are added, and their weights
        p [BLOCK_M, BLOCK_N].
    """
    if row_scale is None:
        m_new = tl.maximum(m_i, tl.max(scores, 1))
    else:
        m_new = tl.maximum(m_i, tl.max(scores, 1) * row_scale)
        scores = scores * row_scale[:, None]
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    return m_new, l_i, acc * alpha[:, None], p
