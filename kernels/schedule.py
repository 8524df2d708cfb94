"""What the attention kernel works off: which tiles of queries, in which order, and which keys.

Adjacent selected clusters form a run, a contiguous range of the sorted keys. A run is cut into
full tiles, and its rest into pieces of at most 16 keys. The kernel first takes the full tiles,
which need no mask, then fills tiles with pieces of several runs: at most 15 rows of a run are
wasted, however short the clusters are. All of it lies in lists on the device whose room depends
on shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import KernelError, Selection

PIECE = 16
LISTS = {"BLOCK": 256, "num_warps": 4}
MAX_TOKENS = 1 << 26  # the start of a piece and its length share 31 bits


@dataclass
class Schedule:
    """Lists for the attention kernel, N query and M key labels.

    Attributes:
        full: [B, H, N, room] int32, first keys of the full tiles of a query cluster.
        pieces: [B, H, N, room] int32, first key * 32 + length of its pieces.
        lengths: [B, H, N, 2] int32, number of full tiles and of tiles made of pieces.
        table: [B, H, 2, room] int32, query cluster and first row of each tile of queries, longest
            work first; -1 marks the end.
        unseen: [B, H, N, Kc] int8, 1 where a mean stands for the keys; empty if not wanted.
        rows, keys, piece: tile of queries, tile of keys, piece.
    """

    full: Tensor
    pieces: Tensor
    lengths: Tensor
    table: Tensor
    unseen: Tensor
    rows: int
    keys: int
    piece: int = PIECE

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        tokens_q: int,
        tokens_k: int,
        names_q: int,
        names_k: int,
        *,
        rows: int,
        keys: int,
        means: int | None,
        device: torch.device,
    ) -> Schedule:
        """Room for the schedule of any selection of these shapes.

        Args:
            batch, heads: B and H.
            tokens_q, tokens_k: number of queries and keys.
            names_q, names_k: number of query and key labels.
            rows, keys: tile of queries and of keys.
            means: number of key clusters whose mean can stand for them; None if none can.
            device: of the lists.
        """
        if max(tokens_q, tokens_k) >= MAX_TOKENS:
            raise KernelError(f"a sequence of {max(tokens_q, tokens_k)} tokens is too long")

        def ints(*shape: int) -> Tensor:
            return torch.empty(batch, heads, *shape, dtype=torch.int32, device=device)

        per_tile = keys // PIECE
        runs = (names_k + 1) // 2
        pieces = min(runs * per_tile, triton.cdiv(tokens_k, PIECE) + runs)
        return cls(
            ints(names_q, tokens_k // keys + 2),
            ints(names_q, (triton.cdiv(pieces, per_tile) + 1) * per_tile),
            ints(names_q, 2),
            ints(2, names_q + triton.cdiv(tokens_q, rows)),
            torch.empty(
                (batch, heads, names_q, means) if means else (0,), dtype=torch.int8, device=device
            ),
            rows,
            keys,
        )

    @classmethod
    def none(cls, device: torch.device) -> Schedule:
        """Stands for no schedule in a launch that writes none."""
        nothing = torch.empty(1, dtype=torch.int32, device=device)
        return cls(nothing, nothing, nothing, nothing, nothing, 64, 64)

    def scratch_bytes(self) -> int:
        """Memory that the lists take."""
        lists = (self.full, self.pieces, self.lengths, self.table, self.unseen)
        return sum(x.numel() * x.element_size() for x in lists)


def schedule_of(
    selection: Selection, q_offsets: Tensor, k_offsets: Tensor, schedule: Schedule, rows: int
) -> None:
    """Fill a schedule from a selection that already exists.

    Args:
        selection: of N query and M key labels.
        q_offsets, k_offsets: [B, H, N + 1] and [B, H, M + 1] int32.
        schedule: to fill.
        rows: only the first so many query clusters use means.
    """
    batch, heads, names_q = selection.tokens.shape
    columns = schedule.unseen.shape[-1] if schedule.unseen.numel() else 0
    _from_selection[(names_q, batch * heads)](
        selection.indptr,
        selection.indices,
        selection.tokens,
        k_offsets,
        q_offsets,
        schedule.full,
        schedule.pieces,
        schedule.lengths,
        schedule.table,
        schedule.unseen if columns else schedule.lengths,
        schedule.full.shape[-1],
        schedule.pieces.shape[-1],
        schedule.table.shape[-1],
        rows,
        columns,
        names_q,
        selection.num_keys,
        UNSEEN=columns > 0,
        ROWS=schedule.rows,
        KEYS=schedule.keys,
        PIECE=schedule.piece,
        **LISTS,
    )


@triton.jit(
    do_not_specialize=[
        *("full_room", "piece_room", "table_room"),
        *("rows", "columns", "names_q", "names_k"),
    ]
)
def _from_selection(
    indptr,
    indices,
    tokens,
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
    UNSEEN: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The schedule of one query cluster."""
    row = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    begin = tl.load(indptr + group * (names_q + 1) + row)
    count = tl.load(indptr + group * (names_q + 1) + row + 1) - begin
    mine = indices + group * names_q * names_k + begin
    if UNSEEN:
        here = unseen + (group * names_q + row) * columns
        lane = tl.arange(0, BLOCK)
        for at in range(0, columns, BLOCK):
            value = tl.where(lane * 0 + row < rows, 1, 0)
            tl.store(here + at + lane, value.to(tl.int8), mask=at + lane < columns)
        tl.debug_barrier()
        for at in range(0, count, BLOCK):
            column = tl.load(mine + at + lane, mask=at + lane < count, other=columns)
            tl.store(here + column, tl.zeros([BLOCK], tl.int8), mask=column < columns)
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


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def list_tiles(
    indices,
    count,
    offsets,
    full,
    pieces,
    lengths,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut the runs of `count` ascending cluster ids into full tiles and pieces."""
    lane = tl.arange(0, BLOCK)
    number = 0  # of full tiles
    rest = 0  # of pieces
    run_before = -1
    for at in range(0, count, BLOCK):
        entry = at + lane
        known = entry < count
        inner = known & (entry > 0)
        outer = known & (entry + 1 < count)
        cluster = tl.load(indices + entry, mask=known, other=0)
        before = tl.load(indices + entry - 1, mask=inner, other=0)
        after = tl.load(indices + entry + 1, mask=outer, other=0)
        start = tl.load(offsets + cluster, mask=known, other=0)
        end = tl.load(offsets + cluster + 1, mask=known, other=0)
        end_before = tl.load(offsets + before + 1, mask=inner, other=-1)
        start_after = tl.load(offsets + after, mask=outer, other=-1)
        # Keys of adjacent clusters follow each other, also across an empty cluster.
        begins = known & (start != end_before)
        ends = known & (start_after != end)
        run = tl.associative_scan(tl.where(begins, start, -1), 0, _larger)
        run = tl.maximum(run, run_before)
        length = tl.where(ends, end - run, 0)
        tiles = length // KEYS
        left = length - tiles * KEYS
        parts = (left + PIECE - 1) // PIECE
        place = number + tl.cumsum(tiles, 0) - tiles
        for tile in range(0, tl.max(tiles, 0)):
            tl.store(full + place + tile, run + tile * KEYS, mask=tile < tiles)
        place = rest + tl.cumsum(parts, 0) - parts
        for part in tl.static_range(0, KEYS // PIECE):
            size = tl.minimum(left - part * PIECE, PIECE)
            first = run + tiles * KEYS + part * PIECE
            tl.store(pieces + place + part, first * 32 + size, mask=part < parts)
        number += tl.sum(tiles, 0)
        rest += tl.sum(parts, 0)
        run_before = tl.max(run, 0)
    # The last tile of pieces is filled up with pieces of no length.
    per_tile = KEYS // PIECE
    packed = (rest + per_tile - 1) // per_tile
    tl.store(
        pieces + rest + lane, tl.zeros([BLOCK], tl.int32), mask=rest + lane < packed * per_tile
    )
    tl.store(full + number, 0)  # read ahead of use, never used
    tl.store(lengths, number)
    tl.store(lengths + 1, packed)


@triton.jit
def write_table(tokens, offsets, table, row, names, room, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Enter the tiles of a query cluster behind those of clusters with more selected keys."""
    lane = tl.arange(0, BLOCK)
    work = tl.load(tokens + row)
    ahead = 0
    total = 0
    for at in range(0, names, BLOCK):
        other = at + lane
        known = other < names
        begin = tl.load(offsets + other, mask=known, other=0)
        size = tl.load(offsets + other + 1, mask=known, other=0) - begin
        tiles = (size + ROWS - 1) // ROWS
        other_work = tl.load(tokens + other, mask=known, other=-1)
        earlier = (other_work > work) | ((other_work == work) & (other < row))
        ahead += tl.sum(tl.where(earlier, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    first = tl.load(offsets + row)
    tiles = (tl.load(offsets + row + 1) - first + ROWS - 1) // ROWS
    for at in range(0, tiles, BLOCK):
        tile = at + lane
        mine = tile < tiles
        tl.store(table + ahead + tile, tl.zeros([BLOCK], tl.int32) + row, mask=mine)
        tl.store(table + room + ahead + tile, first + tile * ROWS, mask=mine)
    if row == 0:
        for at in range(total, room, BLOCK):
            place = at + lane
            tl.store(table + place, tl.full([BLOCK], -1, tl.int32), mask=place < room)
