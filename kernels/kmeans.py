"""k-means on the GPU: queries and keys in the same launches, nothing read back by the host.

A round is four launches: assignment with a histogram per chunk of tokens, a scan over the
histograms, a stable counting sort, and one program per cluster that adds up its rows in sorted
order. Sums have a fixed order, and the only atomics add integers, so two runs are bit-equal.

Several problems of one shape ("sides", queries and keys) lie one after the other in flat buffers:
side 0 for all batch items and heads, then side 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import (
    Impl,
    KernelError,
    check_clusters,
    check_layout,
    check_like,
    resolve,
)
from vidaccel.kernels.quantise import Int8Keys, sampled_mean, to_int8
from vidaccel.kernels.sort import CHUNK, Order, rank_and_scan

PREPARE = {"ROWS": 16, "ZEROS": 1024, "num_warps": 4}
COUNTS = ["tokens", "heads", "first", "last", "clusters0", "clusters1", "extra", "sides"]


def kmeans(
    x: Tensor, centroids: Tensor, iters: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.kmeans`, which this equals up to the order of sums."""
    if resolve(impl, x) == "reference":
        return reference.kmeans(x, centroids, iters)
    check_layout("x", x, reference=False)
    check_layout("centroids", centroids, reference=True)
    check_like("centroids", centroids, "x", x, 0, 1, 3)
    if iters < 0:
        raise KernelError(f"the number of k-means rounds must be 0 or more, found {iters}")
    check_clusters(centroids.shape[2], x.shape[2], "k-means")
    rounds = Rounds.start([x], [centroids])
    for _ in range(iters):
        rounds.assign()
        rounds.update()
    if iters == 0:
        rounds.assign()
    return rounds.centroids(0), rounds.order.labels(0), rounds.order.offsets(0).diff()


@dataclass
class Gathered:
    """What the last update writes on its way: keys and values in sorted order.

    Attributes:
        values: v [B, H, S, D], to be sorted.
        k: [B, H, S, D], the rows of side 1, or these in 8 bits.
        v: [B, H, S, D], the values.
        v_means: [B, H, K, D] fp32, their mean in each cluster.
    """

    values: Tensor
    k: Tensor | Int8Keys
    v: Tensor
    v_means: Tensor


@dataclass
class Rounds:
    """The buffers of some rounds of k-means on one or two sides.

    Attributes:
        xs: [B, H, S, D] of each side.
        counts: clusters of each side.
        video: first and last + 1 of the tokens to cluster; the others are text.
        text_mask: [B, S - video] uint8, 0 for padding.
        means: flat fp32, what the latest update wrote: [B, H, K, D] of each side.
        rounded: the same in the dtype of x.
        half: half of the squared norm of `rounded`.
        order: labels, sorted order and offsets.
    """

    xs: list[Tensor]
    counts: list[int]
    video: tuple[int, int]
    text_mask: Tensor | None
    means: Tensor
    rounded: Tensor
    half: Tensor
    order: Order

    @classmethod
    def start(
        cls,
        xs: list[Tensor],
        centroids: list[Tensor],
        video: tuple[int, int] | None = None,
        text_mask: Tensor | None = None,
    ) -> Rounds:
        """Allocate everything, round the first centroids and clear the histograms."""
        x = xs[0] = rows_contiguous(xs[0])
        xs[1:] = [rows_contiguous(other) for other in xs[1:]]
        batch, heads, tokens, width = x.shape
        counts = [c.shape[2] for c in centroids]
        video = video or (0, tokens)
        extra = 0 if video == (0, tokens) else 2
        total = sum(counts) * batch * heads
        order = Order.empty(batch * heads, tokens, [count + extra for count in counts], x.device)
        order.shape = (batch, heads)
        rounds = cls(
            xs,
            counts,
            video,
            text_mask,
            torch.empty(total * width, dtype=torch.float32, device=x.device),
            torch.empty(total * width, dtype=x.dtype, device=x.device),
            torch.empty(total, dtype=torch.float32, device=x.device),
            order,
        )
        first = [c.float().contiguous() for c in centroids]
        programs = triton.cdiv(total, PREPARE["ROWS"])
        _prepare[(programs,)](
            first[0],
            first[-1],
            rounds.means,
            rounds.rounded,
            rounds.half,
            order.histogram,
            total,
            first[0].numel() // width,
            order.histogram.numel(),
            triton.cdiv(order.histogram.numel(), programs),
            D=width,
            DP=padded(width),
            **PREPARE,
        )
        return rounds

    def centroids(self, side: int) -> Tensor:
        """What the latest update wrote for a side: [B, H, K, D] fp32."""
        batch, heads, _, width = self.xs[0].shape
        size = batch * heads * width
        begin = sum(self.counts[:side]) * size
        part = self.means[begin : begin + self.counts[side] * size]
        return part.view(batch, heads, self.counts[side], width)

    def _shape(self) -> dict[str, Any]:
        batch, heads, tokens, _ = self.xs[0].shape
        return {
            "batch_heads": batch * heads,
            "heads": heads,
            "tokens": tokens,
            "first": self.video[0],
            "last": self.video[1],
            "clusters0": self.counts[0],
            "clusters1": self.counts[-1],
            "extra": self.order.counts[0] - self.counts[0],
        }

    def assign(self) -> None:
        """Label every token, count labels per chunk, and sort."""
        x, y = self.xs[0], self.xs[-1]
        batch, heads, tokens, width = x.shape
        config = assign_config(x.dtype)
        _assign[(triton.cdiv(tokens, config["ROWS"]), batch * heads * len(self.xs))](
            x,
            y,
            *x.stride()[:3],
            *y.stride()[:3],
            self.rounded,
            self.half,
            x if self.text_mask is None else self.text_mask,
            self.order.label,
            self.order.histogram,
            **self._shape(),
            MASKED=self.text_mask is not None,
            D=width,
            DP=padded(width),
            CHUNK=CHUNK,
            **config,
        )
        rank_and_scan(self.order)

    def update(self, gathered: Gathered | None = None, again: bool = True) -> None:
        """Move every centroid to the mean of its tokens.

        Args:
            gathered: where to write keys and values in sorted order, in the same pass.
            again: whether another round follows: clears the histograms for it.
        """
        gather_means(
            self.xs,
            self.order,
            self.counts,
            self.means,
            self.rounded,
            self.half,
            gathered=gathered,
            clear=again,
        )


def gather_means(
    xs: list[Tensor],
    order: Order,
    counts: list[int],
    means: Tensor,
    rounded: Tensor | None = None,
    half: Tensor | None = None,
    *,
    gathered: Gathered | None = None,
    clear: bool = False,
) -> None:
    """Means of every cluster of every side, one program each; see `Rounds.update`.

    A cluster without tokens keeps what `means` holds.
    """
    x, y = xs[0], xs[-1]
    batch, heads, tokens, width = x.shape
    extra = order.counts[0] - counts[0]
    to = gathered or Gathered(y, y, y, means)
    v, k = to.values, to.k
    int8 = isinstance(k, Int8Keys)
    y_out, y_scale, y_shift = (k.values, k.scale, k.shift) if int8 else (k, means, means)
    programs = sum(order.counts)
    size = order.histogram.numel()
    _update[(programs, batch * heads)](
        x,
        y,
        v,
        *x.stride()[:3],
        *y.stride()[:3],
        *v.stride()[:3],
        order.order,
        order.offset,
        means,
        means if rounded is None else rounded,
        means if half is None else half,
        y_out,
        y_scale,
        y_shift,
        to.v,
        to.v_means,
        order.histogram,
        size if clear else 0,
        triton.cdiv(size, programs * batch * heads),
        batch_heads=batch * heads,
        heads=heads,
        tokens=tokens,
        clusters0=counts[0],
        clusters1=counts[-1],
        extra=extra,
        sides=len(xs),
        PERMUTE=gathered is not None,
        INT8=int8,
        ROUND=rounded is not None,
        D=width,
        DP=padded(width),
        **update_config(width, int8),
    )


def padded(width: int) -> int:
    """The width of the tiles that hold a head dimension."""
    return triton.next_power_of_2(width)


def rows_contiguous(x: Tensor) -> Tensor:
    """The same values with the elements of a row side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def update_config(width: int, int8: bool = False) -> dict[str, int]:
    """Tile sizes of the means: tokens, counts cleared at a time, warps.

    The compiler holds a kernel that nearly fits 64 registers down to 64 and spills, as it does
    with 4 warps at width 64; with 8 every thread reads 16 bytes of a bfloat16 tile. Rounding keys
    takes more registers: half the tile leaves room for as many warps as without.
    """
    if int8:
        return {"ROWS": 16, "ZEROS": 256, "num_warps": 4}
    return {"ROWS": 32, "ZEROS": 256, "num_warps": 8 if width == 64 else 4}


def assign_config(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of the assignment: tokens, centroids, warps, stages."""
    if dtype == torch.float32:
        return {"ROWS": 64, "CLUSTERS": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "CLUSTERS": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["rows", "rows0", "size", "share"])
def _prepare(
    first0,
    first1,
    means,
    rounded,
    half,
    histogram,
    rows,
    rows0,
    size,
    share,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """Copy, round and measure the first centroids; every program clears its share of the counts."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    mine = (row < rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    zeroth = (row < rows0)[:, None]
    value = tl.load(first0 + place, mask=mine & zeroth, other=0.0)
    value += tl.load(first1 + (place - rows0.to(tl.int64) * D), mask=mine & ~zeroth, other=0.0)
    tl.store(means + place, value, mask=mine)
    short = value.to(rounded.dtype.element_ty)
    tl.store(rounded + place, short, mask=mine)
    exact = short.to(tl.float32)
    tl.store(half + row, tl.sum(exact * exact, 1) * 0.5, mask=row < rows)
    _clear(histogram, program, size, share, ZEROS)


@triton.jit
def _clear(histogram, program, size, share, ZEROS: tl.constexpr):
    """Write zeros to the share of a program."""
    for at in range(0, share, ZEROS):
        within = at + tl.arange(0, ZEROS)
        place = program * share + within
        tl.store(
            histogram + place,
            tl.zeros([ZEROS], tl.int32),
            mask=(within < share) & (place < size),
        )


@triton.jit(do_not_specialize=[*COUNTS, "batch_heads"])
def _assign(
    x0,
    x1,
    batch_stride0,
    head_stride0,
    row_stride0,
    batch_stride1,
    head_stride1,
    row_stride1,
    rounded,
    half,
    text_mask,
    label,
    histogram,
    batch_heads,
    heads,
    tokens,
    first,
    last,
    clusters0,
    clusters1,
    extra,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """Nearest centroid of a tile of tokens: the least |c|^2 / 2 - x.c."""
    group = tl.program_id(1)
    second = group >= batch_heads
    which = group - batch_heads * second.to(tl.int32)
    batch = (which // heads).to(tl.int64)
    head = (which % heads).to(tl.int64)
    if second:
        x = x1 + batch * batch_stride1 + head * head_stride1
        row_stride = tl.cast(row_stride1, tl.int64)
        clusters = clusters1
        cluster_base = batch_heads.to(tl.int64) * clusters0 + which.to(tl.int64) * clusters1
    else:
        x = x0 + batch * batch_stride0 + head * head_stride0
        row_stride = tl.cast(row_stride0, tl.int64)
        clusters = clusters0
        cluster_base = which.to(tl.int64) * clusters0

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    mine = row < tokens
    tile = tl.load(
        x + row[:, None] * row_stride + column[None, :],
        mask=mine[:, None] & (column < D)[None, :],
        other=0.0,
    )
    # The best of each column of tiles; one reduction at the end finds the best of all.
    best = tl.full([ROWS, CLUSTERS], float("inf"), tl.float32)
    lane = tl.arange(0, CLUSTERS)
    where = tl.zeros([ROWS, CLUSTERS], tl.int32)
    centroids = rounded + cluster_base * D
    for at in range(0, clusters, CLUSTERS):
        cluster = at + lane
        known = cluster < clusters
        inside = known[None, :] & (column < D)[:, None]
        c = tl.load(centroids + cluster[None, :] * D + column[:, None], mask=inside, other=0.0)
        norm = tl.load(half + cluster_base + cluster, mask=known, other=float("inf"))
        distance = norm[None, :] - tl.dot(tile, c, input_precision="ieee")
        better = distance < best
        best = tl.where(better, distance, best)
        where = tl.where(better, at, where)
    least = tl.min(best, 1)
    index = where + lane[None, :]
    found = tl.min(tl.where(best == least[:, None], index, 2147483647), 1)
    # A token that holds NaN is nearest to nothing.
    found = tl.where(least < float("inf"), found, 0)

    video = (row >= first) & (row < last)
    kind = tl.zeros([ROWS], tl.int32)
    if MASKED:
        place = tl.where(row < first, row, row - (last - first))
        real = tl.load(
            text_mask + batch * (tokens - (last - first)) + place, mask=mine & ~video, other=1
        )
        kind = tl.where(real != 0, 0, 1)
    found = tl.where(video, found, clusters + kind)
    tl.store(label + group.to(tl.int64) * tokens + row, found, mask=mine)
    names = clusters + extra
    chunks = tl.cdiv(tokens, CHUNK)
    base = which.to(tl.int64) * chunks * names
    if second:
        base += batch_heads.to(tl.int64) * chunks * (clusters0 + extra)
    tl.atomic_add(
        histogram + base + (row // CHUNK).to(tl.int64) * names + found,
        tl.full([ROWS], 1, tl.int32),
        mask=mine,
        sem="relaxed",
    )


@triton.jit(do_not_specialize=[*COUNTS, "batch_heads", "size", "share"])
def _update(
    x0,
    x1,
    v,
    batch_stride0,
    head_stride0,
    row_stride0,
    batch_stride1,
    head_stride1,
    row_stride1,
    batch_stride2,
    head_stride2,
    row_stride2,
    order,
    offset,
    means,
    rounded,
    half,
    x1_out,
    x1_scale,
    x1_shift,
    v_out,
    v_means,
    histogram,
    size,
    share,
    batch_heads,
    heads,
    tokens,
    clusters0,
    clusters1,
    extra,
    sides,
    PERMUTE: tl.constexpr,
    INT8: tl.constexpr,
    ROUND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """The mean of one cluster; with PERMUTE, side 1 and v are written in sorted order as well.

    With INT8 side 1 is written in 8 bits, as `quantise_keys` does.
    """
    name = tl.program_id(0)
    which = tl.program_id(1)
    _clear(
        histogram,
        name.to(tl.int64) * batch_heads + which,
        size,
        share,
        ZEROS,
    )
    batch = (which // heads).to(tl.int64)
    head = (which % heads).to(tl.int64)
    wide = which.to(tl.int64)
    names0 = clusters0 + extra
    second = (name >= names0) & (sides > 1)
    if second:
        cluster = name - names0
        x = x1 + batch * batch_stride1 + head * head_stride1
        row_stride = tl.cast(row_stride1, tl.int64)
        names = clusters1 + extra
        clusters = clusters1
        offsets = offset + batch_heads.to(tl.int64) * (names0 + 1) + wide * (names + 1)
        orders = order + (batch_heads.to(tl.int64) + wide) * tokens
        place = batch_heads.to(tl.int64) * clusters0 + wide * clusters1 + cluster
    else:
        cluster = name
        x = x0 + batch * batch_stride0 + head * head_stride0
        row_stride = tl.cast(row_stride0, tl.int64)
        names = names0
        clusters = clusters0
        offsets = offset + wide * (names + 1)
        orders = order + wide * tokens
        place = wide * clusters0 + cluster
    begin = tl.load(offsets + cluster)
    end = tl.load(offsets + cluster + 1)
    column = tl.arange(0, DP)
    inside = column < D
    total = tl.zeros([ROWS, DP], tl.float32)
    total_v = tl.zeros([ROWS, DP], tl.float32)
    copy = PERMUTE and (second or sides == 1)
    if INT8:
        shift = tl.zeros([DP], tl.float32)
        if copy:
            sampled = tl.load(offsets + clusters)  # of these tokens
            shift = sampled_mean(x, row_stride, orders, sampled, True, D, DP, ROWS)
            if cluster == 0:
                tl.store(x1_shift + wide * D + column, shift, mask=inside)
    for at in range(begin, end, ROWS):
        sorted_row = at + tl.arange(0, ROWS)
        mine = sorted_row < end
        row = tl.load(orders + sorted_row, mask=mine, other=0).to(tl.int64)
        both = mine[:, None] & inside[None, :]
        tile = tl.load(x + row[:, None] * row_stride + column[None, :], mask=both, other=0.0)
        total += tile.to(tl.float32)
        if PERMUTE:  # noqa: SIM102 (known when compiling)
            if copy:
                out = (wide * tokens + sorted_row.to(tl.int64))[:, None] * D + column[None, :]
                if INT8:
                    whole, step = to_int8(tile.to(tl.float32) - shift[None, :])
                    tl.store(x1_out + out, whole, mask=both)
                    tl.store(x1_scale + wide * tokens + sorted_row, step, mask=mine)
                else:
                    tl.store(x1_out + out, tile, mask=both)
                values = tl.load(
                    v
                    + batch * batch_stride2
                    + head * head_stride2
                    + row[:, None] * tl.cast(row_stride2, tl.int64)
                    + column[None, :],
                    mask=both,
                    other=0.0,
                )
                total_v += values.to(tl.float32)
                tl.store(v_out + out, values, mask=both)
    count = end - begin
    if cluster < clusters:
        filled = inside & (count > 0)
        mean = tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float32)
        tl.store(means + place * D + column, mean, mask=filled)
        if ROUND:
            short = mean.to(rounded.dtype.element_ty)
            exact = tl.where(inside, short.to(tl.float32), 0.0)
            tl.store(rounded + place * D + column, short, mask=filled)
            norm = tl.sum(exact * exact, 0) * 0.5
            tl.store(half + place, norm, mask=count > 0)
        if PERMUTE:  # noqa: SIM102 (known when compiling)
            if copy:
                mean_v = tl.sum(total_v, 0) / tl.maximum(count, 1).to(tl.float32)
                tl.store(v_means + (wide * clusters + cluster) * D + column, mean_v, mask=inside)
