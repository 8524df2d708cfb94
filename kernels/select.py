"""Top-p selection of key clusters, with all lists built on the device.

Two launches. The first scores a block of query clusters and finds, for each row, the score above
which clusters are taken: 32 rounds of bisection over the bits of a float, instead of a sort. The
second writes the lists, and from them those of the attention kernel (block_lists.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.block_lists import (
    BLOCK_PARTIAL,
    LISTS,
    ROOM,
    BlockLists,
    size_bias,
    write_block_lists,
)
from vidaccel.kernels.common import (
    Impl,
    KernelError,
    Selection,
    check_integers,
    check_like,
    check_top_p,
    resolve,
)
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.tiles import block_d, load_tile


def select_top_p(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_counts: Tensor,
    *,
    scale: float,
    top_p: float,
    min_ratio: float,
    mass: Tensor | None = None,
    impl: Impl = "auto",
) -> Selection:
    """See `reference.select_top_p`, which this equals where no sum lies within rounding of p."""
    if resolve(impl, q_centroids, k_centroids, k_counts, mass) == "reference":
        return reference.select_top_p(
            q_centroids,
            k_centroids,
            k_counts,
            scale=scale,
            top_p=top_p,
            min_ratio=min_ratio,
            mass=mass,
        )
    check_integers("k_counts", k_counts, 3)
    check_like("k_centroids", k_centroids, "q_centroids", q_centroids, 0, 1, 3)
    check_like("k_counts", k_counts, "k_centroids", k_centroids, 0, 1, 2)
    offsets = torch.nn.functional.pad(k_counts.cumsum(-1), (1, 0)).int()
    logits = None if mass is None else mass.float().log()
    return select(
        q_centroids.float().contiguous(),
        k_centroids.float().contiguous(),
        offsets,
        q_centroids.shape[2],
        scale=scale,
        top_p=top_p,
        min_ratio=min_ratio,
        logits=logits,
    )


def select(
    q_means: Tensor,
    k_means: Tensor,
    k_offsets: Tensor,
    num_q_clusters: int,
    *,
    scale: float,
    top_p: float,
    min_ratio: float,
    logits: Tensor | None = None,
    lists: BlockLists | None = None,
    q_offsets: Tensor | None = None,
) -> Selection:
    """Select, and fill the lists of the attention kernel in the same launch: two launches.

    Args:
        q_means, k_means: [B, H, Qc, D] and [B, H, Kc, D] fp32.
        k_offsets: [B, H, Kc + 1] int32, or Kc + 3 with text and padding.
        num_q_clusters: Qc, or Qc + 2 with text and padding.
        scale, top_p, min_ratio: as in `select_top_p`.
        logits: [B, H, Qc, Kc] fp32 to take instead of the scores; empty clusters are left out.
        lists: to fill, with `q_offsets` [B, H, num_q_clusters + 1] int32.

    Raises:
        KernelError: a share is outside its range, or the clusters do not fit.
    """
    check_top_p(top_p, min_ratio)
    batch, heads, num_q_means, head_dim = q_means.shape
    num_k_means = k_means.shape[2]
    num_k_clusters = k_offsets.shape[2] - 1
    if num_k_clusters not in (num_k_means, num_k_means + 2):
        raise KernelError(f"{num_k_clusters} key labels for {num_k_means} key clusters")
    device = q_means.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.int32, device=device)

    sizes = (num_q_means, num_k_means, num_q_clusters, num_k_clusters)
    scores = torch.empty(batch, heads, num_q_means, num_k_means, dtype=torch.float32, device=device)
    threshold, num_selected = empty(num_q_clusters), empty(num_q_clusters)
    selection = Selection(
        indptr=empty(num_q_clusters + 1),
        indices=empty(num_q_clusters * num_k_clusters),
        tokens=empty(num_q_clusters),
    )
    config = threshold_config(chip(device))
    num_tiles = triton.cdiv(num_q_clusters, config["BLOCK_M"])
    launch(_threshold, device, num_tiles, batch * heads)(
        q_means,
        k_means,
        k_offsets,
        logits,
        scores,
        threshold,
        num_selected,
        selection.tokens,
        scale,
        top_p,
        max(1, math.floor(min_ratio * num_k_means)),
        *sizes,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **config,
    )
    # Without lists to fill the kernel has none of their arguments.
    nothing: tuple[tuple[Any, ...], tuple[Any, ...]] = ((None,) * 5, (None,) * 3)
    tensors, room = nothing if lists is None else (lists.tensors(), lists.room())
    launch(_lists, device, num_q_clusters, batch * heads)(
        scores,
        threshold,
        num_selected,
        selection.tokens,
        selection.indptr,
        selection.indices,
        k_offsets,
        q_offsets,
        *tensors,
        *room,
        *sizes,
        BLOCK_M=None if lists is None else lists.block_m,
        BLOCK_N=None if lists is None else lists.block_n,
        BLOCK_PARTIAL=BLOCK_PARTIAL,
        **LISTS,
    )
    return selection


def threshold_config(chip: int) -> dict[str, int]:
    """Return the tiles of query and of key clusters, how many are searched at once, warps."""
    scan, warps = (64, 4) if chip == 90 else (256, 8)  # measured; not all others compile well
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_SCAN": scan, "num_warps": warps}


SIZES = ["num_q_means", "num_k_means", "num_q_clusters", "num_k_clusters"]


@triton.jit(do_not_specialize=["scale", "top_p", "least", *SIZES])
def _threshold(
    q_means,
    k_means,
    k_offsets,
    logits,
    scores,
    threshold,
    num_selected,
    tokens,
    scale,
    top_p,
    least,
    num_q_means,
    num_k_means,
    num_q_clusters,
    num_k_clusters,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Score 16 query clusters, and find the least score that is taken, as an ordered integer.

    Also counts the clusters and the keys that each takes; it takes `least` clusters at least.
    """
    batch_head = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < num_q_means
    k_offsets += batch_head * (num_k_clusters + 1)
    score_rows = scores + (batch_head * num_q_means + offs_m[:, None]) * num_k_means
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    is_odd = tl.zeros([BLOCK_M], tl.int32)  # rows that hold NaN or infinity
    if logits is None:
        q_row = batch_head * num_q_means + offs_m
        # [BLOCK_M, BLOCK_D]
        q_tile = load_tile(q_means, q_row, HEAD_DIM, offs_d, mask_m, HEAD_DIM)
    for start in range(0, num_k_means, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_k_means
        # [BLOCK_N]
        begin = tl.load(k_offsets + offs_n, mask=mask_n, other=0)
        size = tl.load(k_offsets + offs_n + 1, mask=mask_n, other=0) - begin
        mask = mask_m[:, None] & mask_n[None, :]
        # [BLOCK_M, BLOCK_N]
        if logits is None:
            k_row = batch_head * num_k_means + offs_n
            k_tile = load_tile(k_means, k_row, HEAD_DIM, offs_d, mask_n, HEAD_DIM, TRANSPOSED=True)
            score = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
            score += tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
            odd = (size > 0)[None, :] & ((tl.abs(score) < float("inf")) == 0)
        else:
            logit_rows = logits + (batch_head * num_q_means + offs_m[:, None]) * num_k_means
            score = tl.load(logit_rows + offs_n[None, :], mask=mask, other=0.0)
            odd = (size > 0)[None, :] & (score != score)  # -inf is no mass
        score = tl.where((size > 0)[None, :], score, float("-inf"))
        tl.store(score_rows + offs_n[None, :], score, mask=mask)
        is_odd = tl.maximum(is_odd, tl.max((mask & odd).to(tl.int32), 1))
        m_i = tl.maximum(m_i, tl.max(tl.where(mask, score, float("-inf")), 1))
    tl.debug_barrier()  # the scores are read below by other threads than wrote them
    m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_k_means, BLOCK_SCAN):
        offs_n = start + tl.arange(0, BLOCK_SCAN)
        mask = mask_m[:, None] & (offs_n < num_k_means)[None, :]
        # [BLOCK_M, BLOCK_SCAN]
        score = tl.load(score_rows + offs_n[None, :], mask=mask, other=float("-inf"))
        l_i += tl.sum(tl.exp(score - m_i[:, None]), 1)

    # The largest bound such that the scores from it upwards exceed p and are enough, bit by bit.
    bound = tl.zeros([BLOCK_M], tl.uint32)
    bit = tl.full([BLOCK_M], 0x80000000, tl.uint32)
    for _ in range(0, 32):
        trial = bound | bit
        bit = bit >> 1
        mass = tl.zeros([BLOCK_M], tl.float32)
        count = tl.zeros([BLOCK_M], tl.int32)
        for start in range(0, num_k_means, BLOCK_SCAN):
            offs_n = start + tl.arange(0, BLOCK_SCAN)
            mask = mask_m[:, None] & (offs_n < num_k_means)[None, :]
            # [BLOCK_M, BLOCK_SCAN]
            score = tl.load(score_rows + offs_n[None, :], mask=mask, other=float("-inf"))
            above = mask & (_ordered(score) >= trial[:, None])
            mass += tl.sum(tl.where(above, tl.exp(score - m_i[:, None]), 0.0), 1)
            count += tl.sum(above.to(tl.int32), 1)
        bound = tl.where((mass > top_p * l_i) & (count >= least), trial, bound)
    # An empty cluster, at -inf, is taken only where everything is.
    bound = tl.maximum(bound, tl.full([BLOCK_M], 0x00800000, tl.uint32))
    # The row behind the query clusters is that of text.
    takes_all = (top_p >= 1.0) | (is_odd != 0) | (offs_m == num_q_means)
    bound = tl.where(takes_all, tl.zeros([BLOCK_M], tl.uint32), bound)

    count = tl.zeros([BLOCK_M], tl.int32)
    keys = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, num_k_means, BLOCK_SCAN):
        offs_n = start + tl.arange(0, BLOCK_SCAN)
        mask_n = offs_n < num_k_means
        # [BLOCK_SCAN]
        begin = tl.load(k_offsets + offs_n, mask=mask_n, other=0)
        size = tl.load(k_offsets + offs_n + 1, mask=mask_n, other=0) - begin
        mask = mask_m[:, None] & mask_n[None, :]
        # [BLOCK_M, BLOCK_SCAN]
        score = tl.load(score_rows + offs_n[None, :], mask=mask, other=float("-inf"))
        above = _ordered(score) >= bound[:, None]
        above = mask_n[None, :] & (offs_m <= num_q_means)[:, None] & above
        count += tl.sum(above.to(tl.int32), 1)
        keys += tl.sum(tl.where(above, size[None, :], 0), 1)
    if num_k_clusters > num_k_means:
        # All rows but that of padding take text, and padding takes itself.
        text_begin = tl.load(k_offsets + num_k_means)
        text_end = tl.load(k_offsets + num_k_means + 1)
        padding_end = tl.load(k_offsets + num_k_means + 2)
        is_padding = offs_m > num_q_means
        keys += tl.where(is_padding, padding_end - text_end, text_end - text_begin)
        count += 1
    mask_out = offs_m < num_q_clusters
    out = batch_head * num_q_clusters + offs_m
    tl.store(threshold + out, bound.to(tl.int32, bitcast=True), mask=mask_out)
    tl.store(num_selected + out, count, mask=mask_out)
    tl.store(tokens + out, keys, mask=mask_out)


@triton.jit(do_not_specialize=[*ROOM, *SIZES])
def _lists(
    scores,
    threshold,
    num_selected,
    tokens,
    indptr,
    indices,
    k_offsets,
    q_offsets,
    full_blocks,
    partial_blocks,
    num_blocks,
    q_tiles,
    mean_bias,
    max_full_blocks,
    max_partial_blocks,
    max_q_tiles,
    num_q_means,
    num_k_means,
    num_q_clusters,
    num_k_clusters,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the selection of one query cluster, and what the attention kernel makes of it."""
    q_cluster = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    begin = 0
    for start in range(0, q_cluster, BLOCK):
        other = start + offs
        # [BLOCK]
        before = tl.load(
            num_selected + batch_head * num_q_clusters + other, mask=other < q_cluster, other=0
        )
        begin += tl.sum(before, 0)
    count = tl.load(num_selected + batch_head * num_q_clusters + q_cluster)
    tl.store(indptr + batch_head * (num_q_clusters + 1) + q_cluster, begin)
    if q_cluster == num_q_clusters - 1:
        tl.store(indptr + batch_head * (num_q_clusters + 1) + num_q_clusters, begin + count)
    selected = indices + batch_head * num_q_clusters * num_k_clusters + begin
    bound = tl.load(threshold + batch_head * num_q_clusters + q_cluster).to(tl.uint32, bitcast=True)
    num_written = 0
    for start in range(0, num_k_clusters, BLOCK):
        k_cluster = start + offs
        mask = k_cluster < num_k_means
        # [BLOCK]
        score = tl.load(
            scores + (batch_head * num_q_means + q_cluster) * num_k_means + k_cluster,
            mask=mask & (q_cluster < num_q_means),
            other=float("-inf"),
        )
        take = mask & (q_cluster <= num_q_means) & (_ordered(score) >= bound)
        # All but padding see text, and padding sees itself.
        has_text = num_k_clusters > num_k_means
        take = take | ((k_cluster == num_k_means) & has_text & (q_cluster <= num_q_means))
        take = take | ((k_cluster == num_k_means + 1) & has_text & (q_cluster == num_q_means + 1))
        step = take.to(tl.int32)
        tl.store(selected + num_written + tl.cumsum(step, 0) - step, k_cluster, mask=take)
        if mean_bias is not None:
            bias = size_bias(k_offsets + batch_head * (num_k_clusters + 1), k_cluster, mask)
            tl.store(
                mean_bias + (batch_head * num_q_clusters + q_cluster) * num_k_means + k_cluster,
                tl.where(take | (q_cluster >= num_q_means), float("-inf"), bias),
                mask=mask,
            )
        num_written += tl.sum(step, 0)
    if full_blocks is not None:
        tl.debug_barrier()  # the list is read below by other threads than wrote it
        write_block_lists(
            selected,
            count,
            k_offsets + batch_head * (num_k_clusters + 1),
            tokens + batch_head * num_q_clusters,
            q_offsets + batch_head * (num_q_clusters + 1),
            full_blocks,
            partial_blocks,
            num_blocks,
            q_tiles,
            max_full_blocks,
            max_partial_blocks,
            max_q_tiles,
            q_cluster,
            batch_head,
            num_q_clusters,
            BLOCK_M,
            BLOCK_N,
            BLOCK_PARTIAL,
            BLOCK,
        )


@triton.jit
def _ordered(score):
    """Return an unsigned integer with the order of the floats; NaN lands at one of the ends."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
