"""Top-p selection of key clusters, with all lists built on the device.

Two launches. The first scores a block of query clusters and finds, for each row, the score above
which clusters are taken: 32 rounds of bisection over the bits of a float, instead of a sort. The
second writes the lists, and from them the schedule of the attention kernel (schedule.py).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import (
    Impl,
    KernelError,
    Selection,
    check_integers,
    check_like,
    check_top_p,
    resolve,
)
from vidaccel.kernels.schedule import LISTS, Schedule, list_tiles, write_table

COUNTS = ["rows", "columns", "names_q", "names_k"]
THRESHOLD = {"ROWS": 16, "SCORES": 32, "COLUMNS": 256, "num_warps": 8}


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
    if resolve(impl, q_centroids, k_centroids, k_counts) == "reference":
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
    )[0]


def select(
    q_means: Tensor,
    k_means: Tensor,
    k_offsets: Tensor,
    names_q: int,
    *,
    scale: float,
    top_p: float,
    min_ratio: float,
    logits: Tensor | None = None,
    schedule: Schedule | None = None,
    q_offsets: Tensor | None = None,
) -> tuple[Selection, Schedule | None]:
    """Select, and fill a schedule in the same launch.

    Args:
        q_means, k_means: [B, H, Qc, D] and [B, H, Kc, D] fp32.
        k_offsets: [B, H, Kc + 1] int32, or Kc + 3 with text and padding.
        names_q: Qc, or Qc + 2 with text and padding.
        scale, top_p, min_ratio: as in `select_top_p`.
        logits: [B, H, Qc, Kc] fp32 to take instead of the scores; empty clusters are left out.
        schedule: to fill, with `q_offsets` [B, H, names_q + 1] int32.

    Returns:
        the selection and the schedule.
    """
    check_top_p(top_p, min_ratio)
    batch, heads, rows, width = q_means.shape
    columns = k_means.shape[2]
    names_k = k_offsets.shape[2] - 1
    if names_k not in (columns, columns + 2):
        raise KernelError(f"{names_k} key labels for {columns} key clusters")
    device = q_means.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=torch.int32, device=device)

    scores = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=device)
    least, taken, tokens = empty(names_q), empty(names_q), empty(names_q)
    given = logits is not None
    _threshold[(triton.cdiv(names_q, THRESHOLD["ROWS"]), batch * heads)](
        q_means,
        k_means,
        k_offsets,
        logits if given else scores,
        scores,
        least,
        taken,
        tokens,
        scale,
        top_p,
        max(1, math.floor(min_ratio * columns)),
        rows,
        columns,
        names_q,
        names_k,
        GIVEN=given,
        D=width,
        DP=triton.next_power_of_2(width),
        **THRESHOLD,
    )
    selection = Selection(empty(names_q + 1), empty(names_q * names_k), tokens)
    plan = schedule or Schedule.none(device)
    _lists[(names_q, batch * heads)](
        scores,
        least,
        taken,
        selection.tokens,
        selection.indptr,
        selection.indices,
        k_offsets,
        k_offsets if q_offsets is None else q_offsets,
        plan.full,
        plan.pieces,
        plan.lengths,
        plan.table,
        plan.unseen,
        plan.full.shape[-1],
        plan.pieces.shape[-1],
        plan.table.shape[-1],
        rows,
        columns,
        names_q,
        names_k,
        SCHEDULE=schedule is not None,
        UNSEEN=schedule is not None and schedule.unseen.numel() > 0,
        ROWS=plan.rows,
        KEYS=plan.keys,
        PIECE=plan.piece,
        **LISTS,
    )
    return selection, schedule


@triton.jit
def _key(score):
    """An unsigned integer with the order of the floats; NaN lands at one of the ends."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit(do_not_specialize=["scale", "top_p", "floor", *COUNTS])
def _threshold(
    q_means,
    k_means,
    k_offsets,
    logits,
    scores,
    least,
    taken,
    tokens,
    scale,
    top_p,
    floor,
    rows,
    columns,
    names_q,
    names_k,
    GIVEN: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SCORES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For 16 query clusters: scores, the least score that is taken, how many clusters and keys."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    width = tl.arange(0, DP)
    offsets = k_offsets + group * (names_k + 1)
    here = scores + (group * rows + row[:, None]) * columns
    top = tl.full([ROWS], float("-inf"), tl.float32)
    broken = tl.zeros([ROWS], tl.int32)
    if not GIVEN:
        q = tl.load(
            q_means + (group * rows + row[:, None]) * D + width[None, :],
            mask=real[:, None] & (width < D)[None, :],
            other=0.0,
        )
    for at in range(0, columns, SCORES):
        column = at + tl.arange(0, SCORES)
        known = column < columns
        begin = tl.load(offsets + column, mask=known, other=0)
        size = tl.load(offsets + column + 1, mask=known, other=0) - begin
        both = real[:, None] & known[None, :]
        if GIVEN:
            score = tl.load(
                logits + (group * rows + row[:, None]) * columns + column[None, :],
                mask=both,
                other=0.0,
            )
        else:
            k = tl.load(
                k_means + (group * columns + column[None, :]) * D + width[:, None],
                mask=known[None, :] & (width < D)[:, None],
                other=0.0,
            )
            score = tl.dot(q, k, input_precision="ieee") * scale
            score += tl.log(tl.maximum(size, 1).to(tl.float32))[None, :]
        score = tl.where((size > 0)[None, :], score, float("-inf"))
        tl.store(here + column[None, :], score, mask=both)
        broken = tl.maximum(broken, tl.max((both & (score != score)).to(tl.int32), 1))
        top = tl.maximum(top, tl.max(tl.where(both, score, float("-inf")), 1))
    tl.debug_barrier()  # the scores are read below by other threads than wrote them
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        both = real[:, None] & (column < columns)[None, :]
        score = tl.load(here + column[None, :], mask=both, other=float("-inf"))
        total += tl.sum(tl.exp(score - top[:, None]), 1)

    # The largest bound such that the scores from it upwards exceed p and are enough, bit by bit.
    bound = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 0x80000000, tl.uint32)
    for _ in range(0, 32):
        trial = bound | bit
        bit = bit >> 1
        mass = tl.zeros([ROWS], tl.float32)
        count = tl.zeros([ROWS], tl.int32)
        for at in range(0, columns, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            both = real[:, None] & (column < columns)[None, :]
            score = tl.load(here + column[None, :], mask=both, other=float("-inf"))
            over = both & (_key(score) >= trial[:, None])
            mass += tl.sum(tl.where(over, tl.exp(score - top[:, None]), 0.0), 1)
            count += tl.sum(over.to(tl.int32), 1)
        bound = tl.where((mass > top_p * total) & (count >= floor), trial, bound)
    # An empty cluster, at -inf, is taken only where everything is.
    bound = tl.maximum(bound, tl.full([ROWS], 0x00800000, tl.uint32))
    everything = (top_p >= 1.0) | (broken != 0) | (row == rows)
    bound = tl.where(everything, tl.zeros([ROWS], tl.uint32), bound)

    count = tl.zeros([ROWS], tl.int32)
    keys = tl.zeros([ROWS], tl.int32)
    for at in range(0, columns, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        known = column < columns
        begin = tl.load(offsets + column, mask=known, other=0)
        size = tl.load(offsets + column + 1, mask=known, other=0) - begin
        both = real[:, None] & known[None, :]
        score = tl.load(here + column[None, :], mask=both, other=float("-inf"))
        over = known[None, :] & (row <= rows)[:, None] & (_key(score) >= bound[:, None])
        count += tl.sum(over.to(tl.int32), 1)
        keys += tl.sum(tl.where(over, size[None, :], 0), 1)
    if names_k > columns:
        first = tl.load(offsets + columns)
        second = tl.load(offsets + columns + 1)
        end = tl.load(offsets + columns + 2)
        keys += tl.where(row <= rows, second - first, end - second)
        count += 1
    mine = row < names_q
    out = group * names_q + row
    tl.store(least + out, bound.to(tl.int32, bitcast=True), mask=mine)
    tl.store(taken + out, count, mask=mine)
    tl.store(tokens + out, keys, mask=mine)


@triton.jit(do_not_specialize=["full_room", "piece_room", "table_room", *COUNTS])
def _lists(
    scores,
    least,
    taken,
    tokens,
    indptr,
    indices,
    k_offsets,
    q_offsets,
    full,
    pieces,
    lengths,
    table,
    unseen,
    full_room,
    piece_room,
    table_room,
    rows,
    columns,
    names_q,
    names_k,
    SCHEDULE: tl.constexpr,
    UNSEEN: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The list of one query cluster, and its part of the schedule."""
    row = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    begin = 0
    for at in range(0, row, BLOCK):
        other = at + lane
        begin += tl.sum(tl.load(taken + group * names_q + other, mask=other < row, other=0), 0)
    count = tl.load(taken + group * names_q + row)
    tl.store(indptr + group * (names_q + 1) + row, begin)
    if row == names_q - 1:
        tl.store(indptr + group * (names_q + 1) + names_q, begin + count)
    mine = indices + group * names_q * names_k + begin
    bound = tl.load(least + group * names_q + row).to(tl.uint32, bitcast=True)
    place = 0
    for at in range(0, names_k, BLOCK):
        column = at + lane
        known = column < columns
        score = tl.load(
            scores + (group * rows + row) * columns + column,
            mask=known & (row < rows),
            other=float("-inf"),
        )
        take = known & (row <= rows) & (_key(score) >= bound)
        take = take | ((column == columns) & (names_k > columns) & (row <= rows))
        take = take | ((column == columns + 1) & (names_k > columns) & (row == rows + 1))
        step = take.to(tl.int32)
        tl.store(mine + place + tl.cumsum(step, 0) - step, column, mask=take)
        if UNSEEN:
            tl.store(
                unseen + (group * names_q + row) * columns + column,
                tl.where(take | (row >= rows), 0, 1).to(tl.int8),
                mask=known,
            )
        place += tl.sum(step, 0)
    if SCHEDULE:
        tl.debug_barrier()  # the list is read below by other threads than wrote it
        list_tiles(
            mine,
            count,
            k_offsets + group * (names_k + 1),
            full + (group * names_q + row) * full_room,
            pieces + (group * names_q + row) * piece_room,
            lengths + (group * names_q + row) * 2,
            KEYS,
            PIECE,
            BLOCK,
        )
        write_table(
            tokens + group * names_q,
            q_offsets + group * (names_q + 1),
            table + group * 2 * table_room,
            row,
            names_q,
            table_room,
            ROWS,
            BLOCK,
        )
