"""The work lists of the attention kernel: tiles of queries in their order, and blocks of keys.

Adjacent selected clusters form a run, a contiguous range of the sorted keys. A run is cut into
full blocks of BLOCK_N keys, and its rest into partial blocks of at most 16 keys. The kernel first
takes the full blocks, which need no mask, then fills tiles with partial blocks of several runs: at
most 15 rows of a run are wasted, however short the clusters are. All of it lies in lists on the
device whose room depends on shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import KernelError, Selection
from vidaccel.kernels.launch import launch


def fill_block_lists(
    lists: BlockLists,
    selection: Selection,
    q_offsets: Tensor,
    k_offsets: Tensor,
    num_compensated: int,
) -> None:
    """Fill the lists from a selection that already exists: one launch.

    Args:
        lists: to fill.
        selection: N query and M key clusters, those of text and padding among them.
        q_offsets, k_offsets: [B, H, N + 1] and [B, H, M + 1] int32.
        num_compensated: only the first so many query clusters use means.
    """
    batch, heads, num_q_clusters = selection.tokens.shape
    launch(_from_selection, q_offsets.device, num_q_clusters, batch * heads)(
        selection.indptr,
        selection.indices,
        selection.tokens,
        k_offsets,
        q_offsets,
        *lists.tensors(),
        *lists.room(),
        num_compensated,
        lists.num_means,
        num_q_clusters,
        selection.num_keys,
        BLOCK_M=lists.block_m,
        BLOCK_N=lists.block_n,
        BLOCK_PARTIAL=BLOCK_PARTIAL,
        **LISTS,
    )


@dataclass
class BlockLists:
    """Lists for the attention kernel, of N query and M key clusters.

    Attributes:
        full_blocks: [B, H, N, room] int32, first key of each full block of a query cluster.
        partial_blocks: [B, H, N, room] int32, first key * 32 + number of keys of each partial one.
        num_blocks: [B, H, N, 2] int32, number of full blocks and of tiles made of partial ones.
        q_tiles: [B, H, 2, room] int32, query cluster and first row of each tile of queries,
            longest work first; -1 marks the end.
        mean_bias: [B, H, N, Kc] fp32, where a mean stands for the keys of a cluster the logarithm
            to base 2 of their number, and -inf elsewhere; None where no mean ever does.
        block_m, block_n: queries and keys of a tile.
    """

    full_blocks: Tensor
    partial_blocks: Tensor
    num_blocks: Tensor
    q_tiles: Tensor
    mean_bias: Tensor | None
    block_m: int
    block_n: int

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        num_queries: int,
        num_keys: int,
        num_q_clusters: int,
        num_k_clusters: int,
        *,
        block_m: int,
        block_n: int,
        num_means: int | None,
        device: torch.device,
    ) -> BlockLists:
        """Allocate for any selection of these shapes.

        Args:
            batch, heads: B and H.
            num_queries, num_keys: number of tokens.
            num_q_clusters, num_k_clusters: those of text and padding among them.
            block_m, block_n: queries and keys of a tile.
            num_means: number of key clusters whose mean can stand for them; None if none can.
            device: where the lists lie.

        Raises:
            KernelError: the sequence is too long.
        """
        if max(num_queries, num_keys) >= MAX_TOKENS:
            raise KernelError(f"a sequence of {max(num_queries, num_keys)} tokens is too long")

        def ints(*shape: int) -> Tensor:
            return torch.empty(batch, heads, *shape, dtype=torch.int32, device=device)

        per_tile = block_n // BLOCK_PARTIAL
        runs = (num_k_clusters + 1) // 2
        partial = min(runs * per_tile, triton.cdiv(num_keys, BLOCK_PARTIAL) + runs)
        mean_bias = None
        if num_means is not None:
            shape = (batch, heads, num_q_clusters, num_means)
            mean_bias = torch.empty(shape, dtype=torch.float32, device=device)
        return cls(
            ints(num_q_clusters, num_keys // block_n + 2),
            ints(num_q_clusters, (triton.cdiv(partial, per_tile) + 1) * per_tile),
            ints(num_q_clusters, 2),
            ints(2, num_q_clusters + triton.cdiv(num_queries, block_m)),
            mean_bias,
            block_m,
            block_n,
        )

    @property
    def num_means(self) -> int:
        """Number of key clusters whose mean can stand for them."""
        return 0 if self.mean_bias is None else self.mean_bias.shape[-1]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the lists in the order in which the kernels that write them take them."""
        lists = (self.full_blocks, self.partial_blocks, self.num_blocks, self.q_tiles)
        return (*lists, self.mean_bias)

    def room(self) -> tuple[int, int, int]:
        """Return the most full blocks, partial blocks and tiles of queries that fit."""
        lists = (self.full_blocks, self.partial_blocks, self.q_tiles)
        full, partial, tiles = (x.shape[-1] for x in lists)
        return full, partial, tiles


BLOCK_PARTIAL = 16
LISTS = {"BLOCK": 256, "num_warps": 4}
MAX_TOKENS = 1 << 26  # the start of a partial block and its length share 31 bits
ROOM = ["max_full_blocks", "max_partial_blocks", "max_q_tiles"]


@triton.jit(
    do_not_specialize=[*ROOM, "num_compensated", "num_means", "num_q_clusters", "num_k_clusters"]
)
def _from_selection(
    indptr,
    indices,
    tokens,
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
    num_compensated,
    num_means,
    num_q_clusters,
    num_k_clusters,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the lists of one query cluster."""
    q_cluster = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    begin = tl.load(indptr + batch_head * (num_q_clusters + 1) + q_cluster)
    count = tl.load(indptr + batch_head * (num_q_clusters + 1) + q_cluster + 1) - begin
    selected = indices + batch_head * num_q_clusters * num_k_clusters + begin
    if mean_bias is not None:
        row = mean_bias + (batch_head * num_q_clusters + q_cluster) * num_means
        offs = tl.arange(0, BLOCK)
        for start in range(0, num_means, BLOCK):
            mean = start + offs
            # [BLOCK]
            bias = size_bias(k_offsets + batch_head * (num_k_clusters + 1), mean, mean < num_means)
            bias = tl.where(q_cluster < num_compensated, bias, float("-inf"))
            tl.store(row + mean, bias, mask=mean < num_means)
        tl.debug_barrier()
        for start in range(0, count, BLOCK):
            # [BLOCK]
            k_cluster = tl.load(selected + start + offs, mask=start + offs < count, other=num_means)
            hidden = tl.full([BLOCK], float("-inf"), tl.float32)
            tl.store(row + k_cluster, hidden, mask=k_cluster < num_means)
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
def size_bias(k_offsets, cluster, mask):
    """Return the logarithm to base 2 of the sizes of clusters [BLOCK]; -inf of an empty one."""
    begin = tl.load(k_offsets + cluster, mask=mask, other=0)
    size = tl.load(k_offsets + cluster + 1, mask=mask, other=0) - begin
    return tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), float("-inf"))


@triton.jit
def write_block_lists(
    selected,
    count,
    k_offsets,
    tokens,
    q_offsets,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the blocks of keys and the tiles of one query cluster.

    `selected` are its `count` ascending key clusters; k_offsets, tokens (selected keys of every
    query cluster) and q_offsets are those of the batch item and head, the lists those of all.
    """
    row = batch_head * num_q_clusters + q_cluster
    _write_key_blocks(
        selected,
        count,
        k_offsets,
        full_blocks + row * max_full_blocks,
        partial_blocks + row * max_partial_blocks,
        num_blocks + row * 2,
        BLOCK_N,
        BLOCK_PARTIAL,
        BLOCK,
    )
    _write_q_tiles(
        tokens,
        q_offsets,
        q_tiles + batch_head * 2 * max_q_tiles,
        q_cluster,
        num_q_clusters,
        max_q_tiles,
        BLOCK_M,
        BLOCK,
    )


@triton.jit
def _write_key_blocks(
    selected,
    count,
    k_offsets,
    full_blocks,
    partial_blocks,
    num_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut the runs of `count` ascending cluster ids into full and partial blocks."""
    offs = tl.arange(0, BLOCK)
    num_full = 0
    num_partial = 0
    last_run = -1
    for start in range(0, count, BLOCK):
        entry = start + offs
        mask = entry < count
        has_before = mask & (entry > 0)
        has_after = mask & (entry + 1 < count)
        # [BLOCK]
        cluster = tl.load(selected + entry, mask=mask, other=0)
        before = tl.load(selected + entry - 1, mask=has_before, other=0)
        after = tl.load(selected + entry + 1, mask=has_after, other=0)
        begin = tl.load(k_offsets + cluster, mask=mask, other=0)
        end = tl.load(k_offsets + cluster + 1, mask=mask, other=0)
        end_before = tl.load(k_offsets + before + 1, mask=has_before, other=-1)
        begin_after = tl.load(k_offsets + after, mask=has_after, other=-1)
        # Keys of adjacent clusters follow each other, also across an empty cluster.
        starts_run = mask & (begin != end_before)
        ends_run = mask & (begin_after != end)
        run = tl.associative_scan(tl.where(starts_run, begin, -1), 0, _larger)
        run = tl.maximum(run, last_run)
        length = tl.where(ends_run, end - run, 0)
        full = length // BLOCK_N
        rest = length - full * BLOCK_N
        partial = (rest + BLOCK_PARTIAL - 1) // BLOCK_PARTIAL
        place = num_full + tl.cumsum(full, 0) - full
        for block in range(0, tl.max(full, 0)):
            tl.store(full_blocks + place + block, run + block * BLOCK_N, mask=block < full)
        place = num_partial + tl.cumsum(partial, 0) - partial
        for block in tl.static_range(0, BLOCK_N // BLOCK_PARTIAL):
            size = tl.minimum(rest - block * BLOCK_PARTIAL, BLOCK_PARTIAL)
            first = run + full * BLOCK_N + block * BLOCK_PARTIAL
            tl.store(partial_blocks + place + block, first * 32 + size, mask=block < partial)
        num_full += tl.sum(full, 0)
        num_partial += tl.sum(partial, 0)
        last_run = tl.max(run, 0)
    # The last tile of partial blocks is filled up with blocks of no length.
    per_tile = BLOCK_N // BLOCK_PARTIAL
    num_tiles = (num_partial + per_tile - 1) // per_tile
    tl.store(
        partial_blocks + num_partial + offs,
        tl.zeros([BLOCK], tl.int32),
        mask=num_partial + offs < num_tiles * per_tile,
    )
    tl.store(full_blocks + num_full, 0)  # read ahead of use, never used
    tl.store(num_blocks, num_full)
    tl.store(num_blocks + 1, num_tiles)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _write_q_tiles(
    tokens,
    q_offsets,
    q_tiles,
    q_cluster,
    num_q_clusters,
    max_q_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Enter the tiles of a query cluster behind those of clusters with more selected keys."""
    offs = tl.arange(0, BLOCK)
    work = tl.load(tokens + q_cluster)
    ahead = 0
    total = 0
    for start in range(0, num_q_clusters, BLOCK):
        other = start + offs
        mask = other < num_q_clusters
        # [BLOCK]
        begin = tl.load(q_offsets + other, mask=mask, other=0)
        size = tl.load(q_offsets + other + 1, mask=mask, other=0) - begin
        tiles = (size + BLOCK_M - 1) // BLOCK_M
        other_work = tl.load(tokens + other, mask=mask, other=-1)
        earlier = (other_work > work) | ((other_work == work) & (other < q_cluster))
        ahead += tl.sum(tl.where(earlier, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    first = tl.load(q_offsets + q_cluster)
    tiles = (tl.load(q_offsets + q_cluster + 1) - first + BLOCK_M - 1) // BLOCK_M
    for start in range(0, tiles, BLOCK):
        tile = start + offs
        mask = tile < tiles
        tl.store(q_tiles + ahead + tile, tl.zeros([BLOCK], tl.int32) + q_cluster, mask=mask)
        tl.store(q_tiles + max_q_tiles + ahead + tile, first + tile * BLOCK_M, mask=mask)
    if q_cluster == 0:
        for start in range(total, max_q_tiles, BLOCK):
            tile = start + offs
            tl.store(q_tiles + tile, tl.full([BLOCK], -1, tl.int32), mask=tile < max_q_tiles)
