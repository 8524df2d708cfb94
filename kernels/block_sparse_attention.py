"""Attention of query clusters to the key clusters that are selected for them.

One program per tile of queries. It reads its queries through the sorted order and writes its
output back through it, walks the full tiles of keys without a mask, then the tiles made of
pieces. Compensation is a second kernel that adds the means of the clusters that were not selected.
With keys in int8 (see `quantise`) scores are products of whole numbers; all else stays as it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import Impl, Selection, check_integers, check_like, resolve
from vidaccel.kernels.kmeans import padded, rows_contiguous
from vidaccel.kernels.quantise import Int8Keys, quantise_keys, to_int8
from vidaccel.kernels.schedule import Schedule, schedule_of


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    selection: Selection,
    *,
    scale: float,
    q_order: Tensor | None = None,
    k_means: Tensor | None = None,
    v_means: Tensor | None = None,
    compensated_rows: int | None = None,
    int8_qk: bool = False,
    shift_clusters: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """See `reference.block_sparse_attention`, which this equals up to rounding."""
    if resolve(impl, q, k, v) == "reference":
        return reference.block_sparse_attention(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            selection,
            scale=scale,
            q_order=q_order,
            k_means=k_means,
            v_means=v_means,
            compensated_rows=compensated_rows,
            int8_qk=int8_qk,
            shift_clusters=shift_clusters,
        )
    reference.check_attention(
        q, k, v, q_offsets, k_offsets, selection, k_means, v_means, reference=False
    )
    if q_order is not None:
        check_integers("q_order", q_order, 3)
        check_like("q_order", q_order, "q", q, 0, 1, 2)
    q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    schedule = new_schedule(
        q, k.shape[2], selection.num_queries, selection.num_keys,
        None if k_means is None else k_means.shape[2], int8_qk,
    )  # fmt: skip
    k = k.contiguous()
    keys: Tensor | Int8Keys = k
    if int8_qk:
        sampled = selection.num_keys if shift_clusters is None else shift_clusters
        keys = quantise_keys(k, k_offsets, sampled)
    rows = selection.num_queries if compensated_rows is None else compensated_rows
    schedule_of(selection, q_offsets, k_offsets, schedule, rows)
    return attend(
        q,
        keys,
        v.contiguous(),
        q_offsets,
        k_offsets,
        schedule,
        scale=scale,
        q_order=None if q_order is None else q_order.contiguous(),
        k_means=k_means,
        v_means=v_means,
    )


def new_schedule(
    q: Tensor, tokens_k: int, names_q: int, names_k: int, means: int | None, int8_qk: bool = False
) -> Schedule:
    """Room for the schedule of queries q [B, H, S, D]; the arguments are those of Schedule."""
    batch, heads, tokens, width = q.shape
    config = attention_config(width, q.dtype, chip(q.device), int8_qk)
    return Schedule.empty(
        batch,
        heads,
        tokens,
        tokens_k,
        names_q,
        names_k,
        rows=config["ROWS"],
        keys=config["KEYS"],
        means=means,
        device=q.device,
    )


def attend(
    q: Tensor,
    k: Tensor | Int8Keys,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    q_order: Tensor | None,
    k_means: Tensor | None = None,
    v_means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Work off a schedule: one launch, two with means. k and v are contiguous; see the reference.

    With int8 keys each program rounds its queries when it has read them.
    """
    q = rows_contiguous(q)
    batch, heads, tokens, width = q.shape
    names_q, names_k = q_offsets.shape[2] - 1, k_offsets.shape[2] - 1
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    tiles = schedule.table.shape[-1]
    grid = (tiles * batch * heads,)
    factor = scale * 1.4426950408889634
    order = schedule.table if q_order is None else q_order
    int8 = isinstance(k, Int8Keys)
    keys, k_scale, k_shift = (k.values, k.scale, k.shift) if int8 else (k, lse, lse)
    tensors = (q, keys, v, out, lse, *q.stride()[:3], *out.stride()[:3], order, q_offsets)
    shape = {"ORDERED": q_order is not None, "D": width, "DP": padded(width)}
    _attend[grid](
        *tensors,
        schedule.full,
        schedule.pieces,
        schedule.lengths,
        schedule.table,
        k_scale,
        k_shift,
        factor,
        heads,
        tokens,
        v.shape[2],
        names_q,
        schedule.full.shape[-1],
        schedule.pieces.shape[-1],
        tiles,
        INT8=int8,
        PIECE=schedule.piece,
        **shape,
        **attention_config(width, q.dtype, chip(q.device), int8),
    )
    if k_means is not None and v_means is not None:
        k_means, v_means = k_means.to(q.dtype).contiguous(), v_means.to(q.dtype).contiguous()
        _add_means[grid](
            tensors[0],
            k_means,
            v_means,
            *tensors[3:],
            k_offsets,
            schedule.table,
            schedule.unseen,
            factor,
            heads,
            tokens,
            names_q,
            names_k,
            k_means.shape[2],
            tiles,
            **shape,
            **means_config(width, q.dtype, schedule.rows),
        )
    return out, lse


def attention_config(
    width: int, dtype: torch.dtype, chip: int, int8_qk: bool = False
) -> dict[str, Any]:
    """Tile of queries, tile of keys, warps and pipeline stages.

    Chips with wgmma or tcgen05 take a tile of 128 queries: it halves what a smaller one would
    read from the L2 cache. The others run out of registers with it.
    """
    if dtype == torch.float32:
        # Products without tensor cores, in full precision; that of int8 leaves 8 warps of width 64
        # just short of registers.
        return _tiles(32, 16, 4 if int8_qk and width == 64 else 8, 1)
    if chip not in (90, 100):
        return _tiles(64, 32, 4, 2)
    return _tiles(128, 64, 4, 3) if width == 64 else _tiles(128, 128, 8, 2)


def means_config(width: int, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """Tiles for the means of clusters; the tile of queries is the one of the schedule."""
    if dtype == torch.float32:
        return _tiles(rows, 16, 8, 1)
    return _tiles(rows, 32, 4 if rows < 128 else 8, 2)


def _tiles(rows: int, keys: int, warps: int, stages: int) -> dict[str, Any]:
    sizes = {"ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
    return sizes | {"PRECISION": "ieee"}  # of products in float32


def chip(device: torch.device) -> int:
    """Which row of configs a device takes: a compute capability; 90 in the interpreter."""
    return _chip(device.index or 0) if device.type == "cuda" else 90


@lru_cache
def _chip(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return major * 10


@triton.jit(
    do_not_specialize=[
        *("scale", "heads", "tokens", "tokens_k", "names_q"),
        *("full_room", "piece_room", "tiles"),
    ]
)
def _attend(
    q,
    k,
    v,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    order,
    q_offsets,
    full,
    pieces,
    lengths,
    table,
    k_scale,
    k_shift,
    scale,
    heads,
    tokens,
    tokens_k,
    names_q,
    full_room,
    piece_room,
    tiles,
    ORDERED: tl.constexpr,
    INT8: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries. Scores are in powers of two: `scale` holds log2(e).

    With INT8 the queries are rounded here, and a score is a product of whole numbers times the
    scales of its query and its key.
    """
    # Tiles of one head run together, so that its keys and values stay in the L2 cache.
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    cluster = tl.load(table + group * 2 * tiles + tile)
    if cluster >= 0:
        batch = group // heads
        head = group % heads
        place = tl.load(table + group * 2 * tiles + tiles + tile) + tl.arange(0, ROWS)
        mine = place < tl.load(q_offsets + group * (names_q + 1) + cluster + 1)
        if ORDERED:
            row = tl.load(order + group * tokens + place, mask=mine, other=0).to(tl.int64)
        else:
            row = place.to(tl.int64)
        column = tl.arange(0, DP)
        inside = mine[:, None] & (column < D)[None, :]
        rows = tl.load(
            q
            + batch * q_batch_stride
            + head * q_head_stride
            + row[:, None] * q_row_stride
            + column[None, :],
            mask=inside,
            other=0.0,
        )
        common = 0.0  # what the shift of the keys took from every score
        each = scale  # of a row: from a score to powers of two
        slope = scale
        if INT8:
            wide = rows.to(tl.float32)
            shift = tl.load(k_shift + group * D + column, mask=column < D, other=0.0)
            common = tl.sum(wide * shift[None, :], 1) * scale
            rows, step = to_int8(wide)
            each = step * scale
            slope = each[:, None]
            k_scale += group * tokens_k
        k += group * tokens_k * D
        v += group * tokens_k * D
        lane = tl.arange(0, KEYS)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DP], tl.float32)
        line = group * names_q + cluster
        full += line * full_room
        pieces += line * piece_room

        start = tl.load(full)
        for at in range(0, tl.load(lengths + line * 2)):
            key = (start + lane).to(tl.int64)
            start = tl.load(full + at + 1)  # for the next turn: its latency is hidden by this one
            if DP == D:
                kt = tl.load(k + key[None, :] * D + column[:, None])
            else:
                kt = tl.load(
                    k + key[None, :] * D + column[:, None], mask=(column < D)[:, None], other=0.0
                )
            score = tl.dot(rows, kt, input_precision=PRECISION)
            if INT8:
                score = score.to(tl.float32) * tl.load(k_scale + key)[None, :]
            higher = tl.maximum(top, tl.max(score, 1) * each)
            weight = tl.exp2(score * slope - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weight, 1)
            mixed = mixed * fade[:, None]
            if DP == D:
                vt = tl.load(v + key[:, None] * D + column[None, :])
            else:
                vt = tl.load(
                    v + key[:, None] * D + column[None, :], mask=(column < D)[None, :], other=0.0
                )
            mixed = tl.dot(weight.to(vt.dtype), vt, mixed, input_precision=PRECISION)
            top = higher

        for at in range(0, tl.load(lengths + line * 2 + 1)):
            piece = tl.load(pieces + at * (KEYS // PIECE) + lane // PIECE)
            seen = lane % PIECE < piece % 32
            key = (piece // 32 + lane % PIECE).to(tl.int64)
            kt = tl.load(
                k + key[None, :] * D + column[:, None],
                mask=seen[None, :] & (column < D)[:, None],
                other=0.0,
            )
            score = tl.dot(rows, kt, input_precision=PRECISION)
            if INT8:
                score = score.to(tl.float32) * tl.load(k_scale + key, mask=seen, other=0.0)[None, :]
            score = tl.where(seen[None, :], score * slope, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weight, 1)
            mixed = mixed * fade[:, None]
            vt = tl.load(
                v + key[:, None] * D + column[None, :],
                mask=seen[:, None] & (column < D)[None, :],
                other=0.0,
            )
            mixed = tl.dot(weight.to(vt.dtype), vt, mixed, input_precision=PRECISION)
            top = higher

        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out
            + batch * out_batch_stride
            + head * out_head_stride
            + row[:, None] * out_row_stride
            + column[None, :],
            mixed.to(out.dtype.element_ty),
            mask=inside,
        )
        top += tl.log2(total) + common
        tl.store(lse + group * tokens + row, top * 0.6931471805599453, mask=mine)


@triton.jit(do_not_specialize=["scale", "heads", "tokens", "names_q", "names_k", "means", "tiles"])
def _add_means(
    q,
    k_means,
    v_means,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    order,
    q_offsets,
    k_offsets,
    table,
    unseen,
    scale,
    heads,
    tokens,
    names_q,
    names_k,
    means,
    tiles,
    ORDERED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to the means of the clusters that were left out, and merge by log-sum-exp."""
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    cluster = tl.load(table + group * 2 * tiles + tile)
    if cluster >= 0:
        batch = group // heads
        head = group % heads
        place = tl.load(table + group * 2 * tiles + tiles + tile) + tl.arange(0, ROWS)
        mine = place < tl.load(q_offsets + group * (names_q + 1) + cluster + 1)
        if ORDERED:
            row = tl.load(order + group * tokens + place, mask=mine, other=0).to(tl.int64)
        else:
            row = place.to(tl.int64)
        column = tl.arange(0, DP)
        inside = mine[:, None] & (column < D)[None, :]
        rows = tl.load(
            q
            + batch * q_batch_stride
            + head * q_head_stride
            + row[:, None] * q_row_stride
            + column[None, :],
            mask=inside,
            other=0.0,
        )
        k_means += group * means * D
        v_means += group * means * D
        k_offsets += group * (names_k + 1)
        unseen += (group * names_q + cluster) * means
        lane = tl.arange(0, KEYS)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, DP], tl.float32)
        for at in range(0, means, KEYS):
            mean = at + lane
            known = mean < means
            begin = tl.load(k_offsets + mean, mask=known, other=0)
            end = tl.load(k_offsets + mean + 1, mask=known, other=0)
            seen = (end > begin) & (tl.load(unseen + mean, mask=known, other=0) != 0)
            kt = tl.load(
                k_means + mean[None, :] * D + column[:, None],
                mask=seen[None, :] & (column < D)[:, None],
                other=0.0,
            )
            size = tl.log2(tl.maximum(end - begin, 1).to(tl.float32))
            score = tl.dot(rows, kt, input_precision=PRECISION) * scale + size[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(score - base[:, None])
            fade = tl.exp2(top - base)
            total = total * fade + tl.sum(weight, 1)
            vt = tl.load(
                v_means + mean[:, None] * D + column[None, :],
                mask=seen[:, None] & (column < D)[None, :],
                other=0.0,
            )
            mixed = mixed * fade[:, None]
            mixed = tl.dot(weight.to(vt.dtype), vt, mixed, input_precision=PRECISION)
            top = higher

        here = (
            out
            + batch * out_batch_stride
            + head * out_head_stride
            + row[:, None] * out_row_stride
            + column[None, :]
        )
        before = tl.load(lse + group * tokens + row, mask=mine, other=0.0) * 1.4426950408889634
        higher = tl.maximum(top, before)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(top - base)
        share = tl.exp2(before - base)
        total = total * fade + share
        exact = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        mixed = mixed * fade[:, None] + exact * share[:, None]
        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(here, mixed.to(out.dtype.element_ty), mask=inside)
        tl.store(
            lse + group * tokens + row, (base + tl.log2(total)) * 0.6931471805599453, mask=mine
        )
