"""Attention of query clusters to selected key clusters on sm_90, where products run by themselves.

Does what `_attend` does, from the same lists, in the order of FlashAttention-3 (arXiv 2407.08608,
section 3.2): in a turn the scores of these keys and the product of the weights and values of the
keys before are under way together, and the softmax of the scores runs beside that product. Triton
waits for each product where it stands, so this is written in Gluon, its lower level, whose layouts,
copies and waits are explicit. Keys and values are copied turns ahead, into rings of stages.

On an H100 at a density of 30 % (assets/results/gpu) it is 1.1 to 1.2 times as fast as `_attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vidaccel.kernels.block_lists import BLOCK_PARTIAL, BlockLists
from vidaccel.kernels.block_sparse_attention import SIZES, ClusterMeans
from vidaccel.kernels.common import rows_contiguous
from vidaccel.kernels.launch import launch
from vidaccel.kernels.tiles import LOG2_E

_LN_2 = gl.constexpr(0.6931471805599453)
_LOWEST = gl.constexpr(-1e38)

# What `_walk` walks over.
FULL = gl.constexpr(0)  # BLOCK_N keys in a row
PARTIAL = gl.constexpr(1)  # packed pieces of BLOCK_PARTIAL keys in a row at most
MEANS = gl.constexpr(2)  # the means of clusters, each with a bias


def hopper_config(head_dim: int, dtype: torch.dtype) -> dict[str, int | bool] | None:
    """Return the tile of queries and keys, stages of copies, where a turn starts them, and warps.

    None for head sizes and types that this kernel does not take. Two programs fit a multiprocessor;
    `vidaccel bench gpu --part tune` times others.
    """
    if head_dim not in (64, 128) or dtype not in (torch.float16, torch.bfloat16):
        return None
    return {
        "BLOCK_M": 64,
        "BLOCK_N": 64,
        "STAGES": 3,
        "COPY_FIRST": head_dim == 64,
        "num_warps": 4,
    }


def attend_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    sorted_idx: Tensor | None,
    means: ClusterMeans | None = None,
    config: dict[str, int | bool],
) -> tuple[Tensor, Tensor]:
    """Work off block lists as `attend` does: one launch. k and v are contiguous.

    Args:
        q, k, v, q_offsets, k_offsets, lists, scale, sorted_idx, means: as `attend` takes them.
        config: as `hopper_config` returns it; the lists are made for its tile.
    """
    q = rows_contiguous(q)
    batch, heads, num_queries, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    max_full_blocks, max_partial_blocks, max_q_tiles = lists.room()
    mean_args: tuple[Tensor | int | None, ...] = (None,) * 5
    if means is not None:
        mean_args = (
            means.k_means.contiguous(),
            means.v_means.contiguous(),
            lists.mean_bias,
            lists.num_means,
            means.num_compensated,
        )
    launch(_attend_on_hopper, q.device, max_q_tiles * batch * heads)(
        q,
        out,
        lse,
        *q.stride()[:3],
        *out.stride()[:3],
        sorted_idx,
        q_offsets,
        lists.q_tiles,
        k,
        v,
        lists.full_blocks,
        lists.partial_blocks,
        lists.num_blocks,
        *mean_args,
        scale * LOG2_E.value,
        heads,
        num_queries,
        q_offsets.shape[2] - 1,
        max_q_tiles,
        v.shape[2],
        max_full_blocks,
        max_partial_blocks,
        HEAD_DIM=head_dim,
        BLOCK_PARTIAL=BLOCK_PARTIAL,
        NUM_WARPS=config["num_warps"],
        **config,
    )
    return out, lse


@gluon.jit(do_not_specialize=["qk_scale_log2", *SIZES])
def _attend_on_hopper(
    q,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    sorted_idx,
    q_offsets,
    q_tiles,
    k,
    v,
    full_blocks,
    partial_blocks,
    num_blocks,
    k_means,
    v_means,
    mean_bias,
    num_means,
    num_compensated,
    qk_scale_log2,
    heads,
    num_queries,
    num_q_clusters,
    max_q_tiles,
    num_keys,
    max_full_blocks,
    max_partial_blocks,
    HEAD_DIM: gl.constexpr,
    BLOCK_PARTIAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    COPY_FIRST: gl.constexpr,
):
    """Attend with one tile of queries. Scores are in powers of two: the scale holds log2(e)."""
    dtype: gl.constexpr = q.dtype.element_ty
    # Rows are copied 16 bytes a thread.
    copy_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1], [1, 0]
    )
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    shared_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )

    # Tiles of one head run together, so that its keys and values stay in the L2 cache.
    batch_head = (gl.program_id(0) // max_q_tiles).to(gl.int64)
    tile = gl.program_id(0) % max_q_tiles
    q_cluster = gl.load(q_tiles + batch_head * 2 * max_q_tiles + tile)
    if q_cluster >= 0:
        batch = batch_head // heads
        head = batch_head % heads
        first = gl.load(q_tiles + batch_head * 2 * max_q_tiles + max_q_tiles + tile)
        end = gl.load(q_offsets + batch_head * (num_q_clusters + 1) + q_cluster + 1)
        q += batch * q_batch_stride + head * q_head_stride
        out += batch * out_batch_stride + head * out_head_stride
        lse += batch_head * num_queries
        k += batch_head * num_keys * HEAD_DIM
        v += batch_head * num_keys * HEAD_DIM
        row = batch_head * num_q_clusters + q_cluster
        full_blocks += row * max_full_blocks
        partial_blocks += row * max_partial_blocks
        num_blocks += row * 2
        num_full = gl.load(num_blocks)
        num_partial = gl.load(num_blocks + 1)
        if sorted_idx is not None:
            sorted_idx += batch_head * num_queries

        q_idx, mask_m = _query_rows(sorted_idx, first, end, BLOCK_M, gl.SliceLayout(1, copy_layout))
        offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, copy_layout))
        q_tile = gl.load(
            q + q_idx[:, None] * q_row_stride + offs_d[None, :], mask=mask_m[:, None], other=0.0
        )
        q_shared = gl.allocate_shared_memory(dtype, [BLOCK_M, HEAD_DIM], shared_layout)
        q_shared.store(q_tile)
        # The barrier comes with the first wait for copies.
        fence_async_shared()
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], shared_layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], shared_layout)

        m_i = gl.full([BLOCK_M], _LOWEST, gl.float32, row_layout)
        l_i = gl.full([BLOCK_M], 0.0, gl.float32, row_layout)
        acc = gl.full([BLOCK_M, HEAD_DIM], 0.0, gl.float32, acc_layout)

        m_i, l_i, acc = _walk(
            num_full,
            m_i,
            l_i,
            acc,
            q_shared,
            k_ring,
            v_ring,
            k,
            v,
            full_blocks,
            num_keys,
            qk_scale_log2,
            FULL,
            BLOCK_PARTIAL,
            copy_layout,
            score_layout,
            acc_layout,
            COPY_FIRST,
        )
        m_i, l_i, acc = _walk(
            num_partial,
            m_i,
            l_i,
            acc,
            q_shared,
            k_ring,
            v_ring,
            k,
            v,
            partial_blocks,
            num_keys,
            qk_scale_log2,
            PARTIAL,
            BLOCK_PARTIAL,
            copy_layout,
            score_layout,
            acc_layout,
            COPY_FIRST,
        )
        if k_means is not None:
            num_used = gl.where(q_cluster < num_compensated, num_means, 0)
            m_i, l_i, acc = _walk(
                (num_used + BLOCK_N - 1) // BLOCK_N,
                m_i,
                l_i,
                acc,
                q_shared,
                k_ring,
                v_ring,
                k_means + batch_head * num_means * HEAD_DIM,
                v_means + batch_head * num_means * HEAD_DIM,
                mean_bias + row * num_means,
                num_means,
                qk_scale_log2,
                MEANS,
                BLOCK_PARTIAL,
                copy_layout,
                score_layout,
                acc_layout,
                COPY_FIRST,
            )

        total = gl.where(l_i == 0.0, 1.0, l_i)  # 0 for a query without keys
        total = gl.convert_layout(total, gl.SliceLayout(1, acc_layout))
        result = gl.convert_layout((acc / total[:, None]).to(dtype), copy_layout)
        # Read again: kept, they would take registers all along.
        q_idx, mask_m = _query_rows(sorted_idx, first, end, BLOCK_M, gl.SliceLayout(1, copy_layout))
        gl.store(
            out + q_idx[:, None] * out_row_stride + offs_d[None, :], result, mask=mask_m[:, None]
        )
        q_idx, mask_m = _query_rows(sorted_idx, first, end, BLOCK_M, row_layout)
        gl.store(lse + q_idx, (m_i + gl.log2(l_i)) * _LN_2, mask=mask_m)


@gluon.jit
def _query_rows(sorted_idx, first, end, BLOCK_M: gl.constexpr, layout: gl.constexpr):
    """Return the queries [BLOCK_M] of a tile, int64, and which of them are of its cluster."""
    offs_m = first + gl.arange(0, BLOCK_M, layout)
    mask_m = offs_m < end
    if sorted_idx is None:
        q_idx = offs_m.to(gl.int64)
    else:
        q_idx = gl.load(sorted_idx + offs_m, mask=mask_m, other=0).to(gl.int64)
    return q_idx, mask_m


@gluon.jit
def _walk(
    num_tiles,
    m_i,
    l_i,
    acc,
    q_shared,
    k_ring,
    v_ring,
    k,
    v,
    blocks,
    num_rows,
    scale,
    MODE: gl.constexpr,
    BLOCK_PARTIAL: gl.constexpr,
    copy_layout: gl.constexpr,
    score_layout: gl.constexpr,
    acc_layout: gl.constexpr,
    COPY_FIRST: gl.constexpr,
):
    """Attend to `num_tiles` tiles of keys. Nothing is under way before it and after it.

    Turn i multiplies with K_i and V_(i-1), and copies K_(i + STAGES - 1) and V_(i + STAGES - 2)
    as one group. They take the places of K_(i-1) and V_(i-2), whose products each warp has waited
    for before the barrier that opens turn i. The group with K_i and V_(i-1) is that of turn
    i - STAGES + 1: STAGES - 2 later ones may be under way.
    """
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_M: gl.constexpr = q_shared.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    dtype: gl.constexpr = k_ring.dtype
    if num_tiles > 0:
        no_scores = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, score_layout)
        v_start = 0
        for ahead in gl.static_range(0, STAGES - 1):
            k_start = _start(blocks, ahead, num_tiles, BLOCK_N, MODE)
            _copy(
                k_ring, k, k_start, ahead, num_tiles, blocks, num_rows, MODE, BLOCK_PARTIAL,
                copy_layout,
            )  # fmt: skip
            if ahead > 0:
                _copy(
                    v_ring, v, v_start, ahead - 1, num_tiles, blocks, num_rows, MODE,
                    BLOCK_PARTIAL, copy_layout,
                )  # fmt: skip
            async_copy.commit_group()
            v_start = k_start
        k_start = _start(blocks, STAGES - 1, num_tiles, BLOCK_N, MODE)

        # Turn 0: no weights yet.
        async_copy.wait_group(STAGES - 2)
        scores = warpgroup_mma(
            q_shared, k_ring.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        hidden = _hidden(blocks, 0, num_rows, MODE, BLOCK_N, BLOCK_PARTIAL, score_layout)
        _copy_both(
            k_ring, v_ring, k, v, k_start, v_start, 0, num_tiles, blocks, num_rows, MODE,
            BLOCK_PARTIAL, copy_layout,
        )  # fmt: skip
        v_start = k_start
        k_start = _start(blocks, STAGES, num_tiles, BLOCK_N, MODE)
        scores = warpgroup_mma_wait(0, deps=[scores])
        m_i, l_i, alpha_scores, p = _softmax(m_i, l_i, scores, scale, hidden, MODE, BLOCK_PARTIAL)
        alpha = gl.convert_layout(alpha_scores, acc_row_layout)
        acc = acc * alpha[:, None]
        weights = gl.convert_layout(p.to(dtype), weight_layout)

        for i in range(1, num_tiles):
            async_copy.wait_group(STAGES - 2)
            if COPY_FIRST:
                _copy_both(
                    k_ring, v_ring, k, v, k_start, v_start, i, num_tiles, blocks, num_rows, MODE,
                    BLOCK_PARTIAL, copy_layout,
                )  # fmt: skip
            scores = warpgroup_mma(
                q_shared,
                k_ring.index(i % STAGES).permute((1, 0)),
                no_scores,
                use_acc=False,
                is_async=True,
            )
            acc_later = warpgroup_mma(weights, v_ring.index((i - 1) % STAGES), acc, is_async=True)
            hidden = _hidden(blocks, i, num_rows, MODE, BLOCK_N, BLOCK_PARTIAL, score_layout)
            if not COPY_FIRST:
                _copy_both(
                    k_ring, v_ring, k, v, k_start, v_start, i, num_tiles, blocks, num_rows, MODE,
                    BLOCK_PARTIAL, copy_layout,
                )  # fmt: skip
            v_start = k_start
            # For the next turn: its latency is hidden by this one.
            k_start = _start(blocks, i + STAGES, num_tiles, BLOCK_N, MODE)
            scores = warpgroup_mma_wait(1, deps=[scores])
            m_i, l_i, alpha_scores, p = _softmax(
                m_i, l_i, scores, scale, hidden, MODE, BLOCK_PARTIAL
            )
            acc, weights = warpgroup_mma_wait(0, deps=[acc_later, weights])
            alpha = gl.convert_layout(alpha_scores, acc_row_layout)
            acc = acc * alpha[:, None]
            weights = gl.convert_layout(p.to(dtype), weight_layout)

        # The last weights: their values are in the group that turn `num_tiles` would wait for.
        async_copy.wait_group(0)
        acc_later = warpgroup_mma(
            weights, v_ring.index((num_tiles - 1) % STAGES), acc, is_async=True
        )
        acc = warpgroup_mma_wait(0, deps=[acc_later])
    return m_i, l_i, acc


@gluon.jit
def _start(blocks, index, num_tiles, BLOCK_N: gl.constexpr, MODE: gl.constexpr):
    """Return the first row of a tile; any number for those behind the last one."""
    start = index * BLOCK_N
    if MODE == FULL:
        # The entry behind the last one is there to be read.
        start = gl.load(blocks + gl.minimum(index, num_tiles))
    return start


@gluon.jit
def _copy_both(
    k_ring,
    v_ring,
    k,
    v,
    k_start,
    v_start,
    turn,
    num_tiles,
    blocks,
    num_rows,
    MODE: gl.constexpr,
    BLOCK_PARTIAL: gl.constexpr,
    copy_layout: gl.constexpr,
):
    """Start the copies of a turn, as one group."""
    STAGES: gl.constexpr = k_ring.shape[0]
    _copy(
        k_ring, k, k_start, turn + STAGES - 1, num_tiles, blocks, num_rows, MODE, BLOCK_PARTIAL,
        copy_layout,
    )  # fmt: skip
    _copy(
        v_ring, v, v_start, turn + STAGES - 2, num_tiles, blocks, num_rows, MODE, BLOCK_PARTIAL,
        copy_layout,
    )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def _copy(
    ring,
    base,
    start,
    index,
    num_tiles,
    blocks,
    num_rows,
    MODE: gl.constexpr,
    BLOCK_PARTIAL: gl.constexpr,
    copy_layout: gl.constexpr,
):
    """Start to copy a tile of keys or values to its stage; zeros where there are none."""
    STAGES: gl.constexpr = ring.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    HEAD_DIM: gl.constexpr = ring.shape[2]
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy_layout))
    offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, copy_layout))
    stage = ring.index(index % STAGES)
    if MODE == PARTIAL:
        packed = gl.load(
            blocks + index * (BLOCK_N // BLOCK_PARTIAL) + offs_n // BLOCK_PARTIAL,
            mask=index < num_tiles,
            other=0,
        )
        mask = offs_n % BLOCK_PARTIAL < packed % 32
        rows = (packed // 32 + offs_n % BLOCK_PARTIAL).to(gl.int64)
        pointers = base + rows[:, None] * HEAD_DIM + offs_d[None, :]
        async_copy.async_copy_global_to_shared(stage, pointers, mask=mask[:, None])
    else:
        # A number for all of the tile, and offsets that stay the same.
        tile = base + start.to(gl.int64) * HEAD_DIM
        pointers = tile + (offs_n[:, None] * HEAD_DIM + offs_d[None, :])
        if MODE == MEANS:
            mask = offs_n < num_rows - start
            async_copy.async_copy_global_to_shared(stage, pointers, mask=mask[:, None])
        else:
            async_copy.async_copy_global_to_shared(stage, pointers, mask=index < num_tiles)


@gluon.jit
def _hidden(
    blocks,
    index,
    num_rows,
    MODE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_PARTIAL: gl.constexpr,
    score_layout: gl.constexpr,
):
    """Return what hides keys of a tile: [BLOCK_N] lengths of their pieces, or biases, or 0."""
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
    if MODE == PARTIAL:
        pieces: gl.constexpr = BLOCK_N // BLOCK_PARTIAL
        # One read for a piece; which one a register is of is known when compiling.
        hidden = gl.full([BLOCK_N], 0, gl.int32, gl.SliceLayout(0, score_layout))
        for piece in gl.static_range(0, pieces):
            packed = gl.load(blocks + index * pieces + piece)
            hidden = gl.where(offs_n // BLOCK_PARTIAL == piece, packed % 32, hidden)
    elif MODE == MEANS:
        mean = index * BLOCK_N + offs_n
        hidden = gl.load(blocks + mean, mask=mean < num_rows, other=float("-inf"))
    else:
        hidden = 0
    return hidden


@gluon.jit
def _softmax(m_i, l_i, scores, scale, hidden, MODE: gl.constexpr, BLOCK_PARTIAL: gl.constexpr):
    """Take one more tile of scores into the softmax: m_i, l_i, the factor of acc, weights."""
    if MODE == FULL:
        m_new = gl.maximum(m_i, gl.max(scores, 1) * scale)
        p = gl.exp2(scores * scale - m_new[:, None])
    else:
        if MODE == PARTIAL:
            offs_n = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
            shown = offs_n % BLOCK_PARTIAL < hidden
            scores = gl.where(shown[None, :], scores * scale, float("-inf"))
        else:
            scores = scores * scale + hidden[None, :]
        m_new = gl.maximum(m_i, gl.max(scores, 1))
        p = gl.exp2(scores - m_new[:, None])
    alpha = gl.exp2(m_i - m_new)
    l_i = l_i * alpha + gl.sum(p, 1)
    return m_new, l_i, alpha, p
