"""Semantic attention in Triton: at most 12 launches for two rounds of k-means and all the rest.

One launch prepares the centroids; each round takes four (assign, scan, rank, update), for queries
and keys together; the last update also writes keys and values in sorted order and their means;
two select and schedule; one attends. With `query_metric` keys are clustered in another metric than
they are attended to, so that one launch more gathers them. With `int8_qk` the last update writes
the keys in 8 bits: no launch more, and D - 4 bytes a key less memory than in 16 bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.block_sparse_attention import attend as work_off
from vidaccel.kernels.block_sparse_attention import new_schedule
from vidaccel.kernels.kmeans import Gathered, Rounds, gather_means, padded, rows_contiguous
from vidaccel.kernels.quantise import Int8Keys
from vidaccel.kernels.schedule import schedule_of
from vidaccel.kernels.select import select
from vidaccel.kernels.sort import Order

if TYPE_CHECKING:
    from vidaccel.kernels.semantic_attention import SemanticConfig, SemanticState


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> Tensor:
    """The Triton path of `semantic_attention`, whose arguments these are, checked."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, tokens, width = q.shape
    columns = config.key_clusters
    scale = config.scale if config.scale is not None else 1 / math.sqrt(width)
    k_sorted = Int8Keys.empty(k) if config.int8_qk else torch.empty_like(k, memory_format=_FLAT)
    v_sorted = torch.empty_like(v, memory_format=_FLAT)
    k_means, v_means = (
        torch.zeros(batch, heads, columns, width, dtype=torch.float32, device=q.device)
        if config.compensate
        else torch.empty(batch, heads, columns, width, dtype=torch.float32, device=q.device)
        for _ in range(2)
    )
    gathered = Gathered(v, k_sorted, v_sorted, v_means)
    rounds = None
    renew = state.key is None or state.calls % config.recluster_every == 0
    if renew:
        rounds = cluster(q, k, state, config, video, text_mask, gathered)
        state.selection = None
    query, key = state.query, state.key
    assert query is not None and key is not None
    if rounds is None or config.query_metric:
        order = Order.of([key.order], [key.offsets])
        gather_means([k], order, [columns], k_means, gathered=gathered)
    else:
        k_means = rounds.centroids(1)
    state.ended("clustering")

    names_q, names_k = query.offsets.shape[2] - 1, key.offsets.shape[2] - 1
    means = columns if config.compensate else None
    schedule = new_schedule(q, tokens, names_q, names_k, means, config.int8_qk)
    if state.selection is None or state.calls % config.reselect_every == 0:
        if rounds is None:
            q_means = query.centroids.float().contiguous().clone()
            gather_means([q], Order.of([query.order], [query.offsets]),
                         [config.query_clusters], q_means)  # fmt: skip
        else:
            q_means = rounds.centroids(0)
        logits = None
        if config.per_query_mass:
            logits = mass_logits(q, query.order, query.offsets, k_means, key.offsets,
                                 config.query_clusters, scale)  # fmt: skip
        state.selection, _ = select(
            q_means,
            k_means,
            key.offsets,
            names_q,
            scale=scale,
            top_p=config.top_p,
            min_ratio=config.min_ratio,
            logits=logits,
            schedule=schedule,
            q_offsets=query.offsets,
        )
    else:
        rows = config.query_clusters
        schedule_of(state.selection, query.offsets, key.offsets, schedule, rows)
    state.ended("selection")
    out, _ = work_off(
        q,
        k_sorted,
        v_sorted,
        query.offsets,
        key.offsets,
        schedule,
        scale=scale,
        q_order=query.order,
        k_means=k_means if config.compensate else None,
        v_means=v_means if config.compensate else None,
    )
    state.ended("attention")
    return out


def cluster(
    q: Tensor,
    k: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
    gathered: Gathered | None = None,
) -> Rounds:
    """Cluster both sides into the state; see `Rounds.update` for `gathered`."""
    from vidaccel.kernels.semantic_attention import Clustering

    xs = [q, k]
    part = slice(*video)
    if config.query_metric:
        factor = reference.query_metric(q[:, :, part])
        xs[1] = (k.to(factor.dtype) @ factor).to(k.dtype)
        gathered = None
    counts = (config.query_clusters, config.key_clusters)
    if state.query is None or state.key is None:
        sides = zip(xs, counts, strict=True)
        start = [reference.initial_centroids(x[:, :, part], count) for x, count in sides]
        iters = config.init_iters
    else:
        start, iters = [state.query.centroids, state.key.centroids], config.iters
    mask = None if text_mask is None else text_mask.to(torch.uint8).contiguous()
    rounds = Rounds.start(xs, start, video, mask)
    for turn in range(max(iters, 1)):
        last = turn == max(iters, 1) - 1
        rounds.assign()
        rounds.update(gathered if last else None, again=not last)
    found = []
    for side in (0, 1):
        # Without a round the centroids stay; the means are those of the tokens all the same.
        centroids = rounds.centroids(side) if iters else start[side]
        offsets = rounds.order.offsets(side)
        labels, order = rounds.order.labels(side), rounds.order.orders(side)
        found.append(Clustering(centroids, labels, order, offsets))
    state.query, state.key = found
    return rounds


_FLAT = torch.contiguous_format


def mass_logits(
    q: Tensor,
    q_order: Tensor,
    q_offsets: Tensor,
    k_means: Tensor,
    k_offsets: Tensor,
    rows: int,
    scale: float,
) -> Tensor:
    """Logarithm of `reference.query_mass`: [B, H, Qc, Kc] fp32, in one launch.

    Args:
        q: [B, H, S, D] in its own order.
        q_order, q_offsets: its clustering.
        k_means: [B, H, Kc, D] fp32.
        k_offsets: [B, H, Kc + 1] int32, or more.
        rows: number of query clusters.
        scale: factor on the scores.
    """
    batch, heads, tokens, width = q.shape
    columns = k_means.shape[2]
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    _mass[(rows, batch * heads)](
        q,
        *q.stride()[:3],
        q_order,
        q_offsets,
        k_means.to(q.dtype).contiguous(),
        k_offsets,
        out,
        scale,
        heads,
        tokens,
        rows,
        columns,
        q_offsets.shape[2] - 1,
        k_offsets.shape[2] - 1,
        D=width,
        DP=padded(width),
        **mass_config(width, q.dtype),
    )
    return out


def mass_config(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of `_mass`: queries, key clusters, warps.

    At width 64 the larger tiles and 8 warps nearly fit a step of the register count, to which the
    compiler then holds the kernel, and spills.
    """
    if dtype == torch.float32:
        return {"ROWS": 32, "CLUSTERS": 16, "num_warps": 4 if width == 64 else 8}
    return {"ROWS": 64, "CLUSTERS": 32 if width == 64 else 64, "num_warps": 4}


@triton.jit(do_not_specialize=["scale", "heads", "tokens", "rows", "columns", "names_q", "names_k"])
def _mass(
    q,
    batch_stride,
    head_stride,
    row_stride,
    order,
    q_offsets,
    k_means,
    k_offsets,
    out,
    scale,
    heads,
    tokens,
    rows,
    columns,
    names_q,
    names_k,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """One query cluster: the softmax of each of its queries over key clusters, and their mean."""
    row = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = group // heads
    head = group % heads
    begin = tl.load(q_offsets + group * (names_q + 1) + row)
    end = tl.load(q_offsets + group * (names_q + 1) + row + 1)
    width = tl.arange(0, DP)
    lane = tl.arange(0, CLUSTERS)
    line = out + (group * rows + row) * columns
    k_means += group * columns * D
    k_offsets += group * (names_k + 1)
    for at in range(0, columns, CLUSTERS):
        tl.store(line + at + lane, tl.zeros([CLUSTERS], tl.float32), mask=at + lane < columns)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        mine = place < end
        token = tl.load(order + group * tokens + place, mask=mine, other=0).to(tl.int64)
        tile = tl.load(
            q
            + batch * batch_stride
            + head * head_stride
            + token[:, None] * tl.cast(row_stride, tl.int64)
            + width[None, :],
            mask=mine[:, None] & (width < D)[None, :],
            other=0.0,
        )
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for at in range(0, columns, CLUSTERS):
            score = _mean_score(tile, k_means, k_offsets, at, columns, scale, D, DP, CLUSTERS)
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base[:, None]), 1)
            top = higher
        base = tl.where(top == float("-inf"), 0.0, top)
        share = tl.where(mine, 1.0 / total, 0.0)
        for at in range(0, columns, CLUSTERS):
            score = _mean_score(tile, k_means, k_offsets, at, columns, scale, D, DP, CLUSTERS)
            weight = tl.exp(score - base[:, None]) * share[:, None]
            known = at + lane < columns
            before = tl.load(line + at + lane, mask=known, other=0.0)
            tl.store(line + at + lane, before + tl.sum(weight, 0), mask=known)
    tl.debug_barrier()
    count = tl.maximum(end - begin, 1).to(tl.float32)
    for at in range(0, columns, CLUSTERS):
        known = at + lane < columns
        mass = tl.load(line + at + lane, mask=known, other=0.0)
        tl.store(line + at + lane, tl.log(mass / count), mask=known)


@triton.jit
def _mean_score(
    tile,
    k_means,
    k_offsets,
    at,
    columns,
    scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """Scores of a tile of queries and some key clusters, weighted by size."""
    width = tl.arange(0, DP)
    mean = at + tl.arange(0, CLUSTERS)
    known = mean < columns
    begin = tl.load(k_offsets + mean, mask=known, other=0)
    size = tl.load(k_offsets + mean + 1, mask=known, other=0) - begin
    kt = tl.load(
        k_means + mean[None, :] * D + width[:, None],
        mask=(size > 0)[None, :] & (width < D)[:, None],
        other=0.0,
    )
    score = tl.dot(tile, kt, input_precision="ieee") * scale
    score += tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
    return tl.where((size > 0)[None, :], score, float("-inf"))
