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
    rows_contiguous,
)
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.quantise import Int8Keys, sampled_mean, to_int8
from vidaccel.kernels.sort import CHUNK, SortedLabels
from vidaccel.kernels.tiles import block_d, load_tile


def kmeans(
    x: Tensor, centroids: Tensor, iters: int, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.kmeans`, which this equals up to the order of sums."""
    if resolve(impl, x, centroids) == "reference":
        return reference.kmeans(x, centroids, iters)
    check_layout("x", x, reference=False)
    check_layout("centroids", centroids, reference=True)
    check_like("centroids", centroids, "x", x, 0, 1, 3)
    if iters < 0:
        raise KernelError(f"the number of k-means rounds must be 0 or more, found {iters}")
    check_clusters(centroids.shape[2], x.shape[2], "k-means")
    lloyd = Lloyd.start([x], [centroids])
    for _ in range(iters):
        lloyd.assign()
        lloyd.update()
    if iters == 0:
        lloyd.assign()
    found = lloyd.sorted_labels
    return lloyd.side_centroids(0), found.side_labels(0), found.side_offsets(0).diff()


@dataclass
class SortedKeys:
    """Keys and values in sorted order, which the last update writes on its way; and their means.

    Attributes:
        v: [B, H, S, D], the values in the order of the tokens.
        k_sorted: [B, H, S, D] of the dtype of the keys, or in 8 bits; to be written.
        v_sorted: [B, H, S, D], to be written.
        k_means, v_means: [B, H, K, D] in the dtype of keys and values, the mean key and value of
            each cluster, 0 of an empty one; to be written.
        log2_sizes: [B, H, K] fp32, the logarithm to base 2 of the number of its keys, -inf of
            none; to be written.
    """

    v: Tensor
    k_sorted: Tensor | Int8Keys
    v_sorted: Tensor
    k_means: Tensor
    v_means: Tensor
    log2_sizes: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, num_clusters: int, *, int8: bool) -> SortedKeys:
        """Allocate for keys and values [B, H, S, D], in 8 bits or as they are."""
        flat = torch.contiguous_format
        batch, heads, _, head_dim = k.shape
        shape = (batch, heads, num_clusters, head_dim)
        means = [torch.empty(shape, dtype=x.dtype, device=x.device) for x in (k, v)]
        return cls(
            v,
            Int8Keys.empty(k) if int8 else torch.empty_like(k, memory_format=flat),
            torch.empty_like(v, memory_format=flat),
            *means,
            torch.empty(batch, heads, num_clusters, dtype=torch.float32, device=k.device),
        )


@dataclass
class Lloyd:
    """Lloyd's algorithm on one or two sides, with its buffers.

    Attributes:
        xs: [B, H, S, D] of each side.
        num_clusters: clusters of each side.
        video: first and last + 1 of the tokens to cluster; the others are text.
        text_mask: [B, S - video] uint8, 0 for padding.
        centroids: flat fp32, what the latest update wrote: [B, H, K, D] of each side.
        rounded: the same in the dtype of x.
        half_norms: half of the squared norm of `rounded`, [B, H, K] of each side.
        sorted_labels: labels, sorted order and offsets of the latest assignment.
    """

    xs: list[Tensor]
    num_clusters: list[int]
    video: tuple[int, int]
    text_mask: Tensor | None
    centroids: Tensor
    rounded: Tensor
    half_norms: Tensor
    sorted_labels: SortedLabels

    @classmethod
    def start(
        cls,
        xs: list[Tensor],
        centroids: list[Tensor],
        video: tuple[int, int] | None = None,
        text_mask: Tensor | None = None,
    ) -> Lloyd:
        """Allocate everything, round the first centroids and clear the histograms."""
        xs = [rows_contiguous(x) for x in xs]
        x = xs[0]
        batch, heads, tokens, head_dim = x.shape
        num_clusters = [c.shape[2] for c in centroids]
        video = video or (0, tokens)
        extra = 0 if video == (0, tokens) else 2  # labels of text and of padding
        total = sum(num_clusters) * batch * heads
        sorted_labels = SortedLabels.empty(
            batch, heads, tokens, [count + extra for count in num_clusters], x.device
        )
        lloyd = cls(
            xs,
            num_clusters,
            video,
            text_mask,
            torch.empty(total * head_dim, dtype=torch.float32, device=x.device),
            torch.empty(total * head_dim, dtype=x.dtype, device=x.device),
            torch.empty(total, dtype=torch.float32, device=x.device),
            sorted_labels,
        )
        first = [c.float().contiguous() for c in centroids]
        programs = triton.cdiv(total, PREPARE["BLOCK_M"])
        counts = sorted_labels.histogram.numel()
        launch(_prepare, x.device, programs)(
            first[0],
            first[1] if len(first) == 2 else None,
            lloyd.centroids,
            lloyd.rounded,
            lloyd.half_norms,
            sorted_labels.histogram,
            total,
            first[0].numel() // head_dim,
            counts,
            triton.cdiv(counts, programs),
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            **PREPARE,
        )
        return lloyd

    def side_centroids(self, side: int) -> Tensor:
        """Return what the latest update wrote for a side: [B, H, K, D] fp32."""
        batch, heads, _, head_dim = self.xs[0].shape
        size = batch * heads * head_dim
        begin = sum(self.num_clusters[:side]) * size
        part = self.centroids[begin : begin + self.num_clusters[side] * size]
        return part.view(batch, heads, self.num_clusters[side], head_dim)

    def assign(self) -> None:
        """Label every token, count labels per chunk, and sort: three launches."""
        x = self.xs[0]
        batch, heads, tokens, head_dim = x.shape
        config = assign_config(x.dtype, chip(x.device))
        num_tiles = triton.cdiv(tokens, config["BLOCK_M"])
        launch(_assign, x.device, num_tiles, batch * heads * len(self.xs))(
            *_both(self.xs),
            self.rounded,
            self.half_norms,
            self.text_mask,
            self.sorted_labels.labels,
            self.sorted_labels.histogram,
            batch * heads,
            heads,
            tokens,
            *self.video,
            self.num_clusters[0],
            self.num_clusters[-1],
            self.sorted_labels.num_labels[0] - self.num_clusters[0],
            HEAD_DIM=head_dim,
            BLOCK_D=block_d(head_dim),
            CHUNK=CHUNK,
            **config,
        )
        self.sorted_labels.sort()

    def update(self) -> None:
        """Move every centroid to the mean of its tokens, and prepare the next assignment."""
        found = self.sorted_labels
        _launch_update(
            self.xs,
            found.sorted_idx,
            found.offsets,
            self.num_clusters,
            found.num_labels,
            self.centroids,
            rounded=self.rounded,
            half_norms=self.half_norms,
            histogram=found.histogram,
        )

    def update_and_sort(self, target: SortedKeys) -> None:
        """Move every centroid for the last time, and write keys and values in sorted order."""
        found = self.sorted_labels
        _launch_update_and_sort(
            self.xs,
            found.sorted_idx,
            found.offsets,
            self.num_clusters,
            found.num_labels,
            self.centroids,
            target,
        )


def cluster_means(
    x: Tensor, sorted_idx: Tensor, offsets: Tensor, means: Tensor, target: SortedKeys | None = None
) -> None:
    """Fill the means of clusters that are known, and sort keys and values on the way: one launch.

    Args:
        x: [B, H, S, D]; the keys where there is a target.
        sorted_idx: [B, H, S] int32, sorted by cluster.
        offsets: [B, H, K + 1] int32, or K + 3 with text and padding.
        means: [B, H, K, D] fp32; a cluster without tokens keeps what it holds.
        target: takes keys and values in sorted order.
    """
    sides = ([x], sorted_idx, offsets, [means.shape[2]], [offsets.shape[2] - 1], means)
    if target is None:
        _launch_update(*sides)
    else:
        _launch_update_and_sort(*sides, target)


def _launch_update(
    xs: list[Tensor],
    sorted_idx: Tensor,
    offsets: Tensor,
    num_clusters: list[int],
    num_labels: list[int],
    means: Tensor,
    *,
    rounded: Tensor | None = None,
    half_norms: Tensor | None = None,
    histogram: Tensor | None = None,
) -> None:
    batch, heads, tokens, head_dim = xs[0].shape
    programs = sum(num_labels) * batch * heads
    counts = 0 if histogram is None else histogram.numel()
    launch(_update, means.device, sum(num_labels), batch * heads)(
        *_both(xs),
        sorted_idx,
        offsets,
        means,
        rounded,
        half_norms,
        histogram,
        counts,
        triton.cdiv(counts, programs),
        batch * heads,
        heads,
        tokens,
        num_clusters[0],
        num_clusters[-1],
        num_labels[0] - num_clusters[0],
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **update_config(head_dim),
    )


def _launch_update_and_sort(
    xs: list[Tensor],
    sorted_idx: Tensor,
    offsets: Tensor,
    num_clusters: list[int],
    num_labels: list[int],
    means: Tensor,
    target: SortedKeys,
) -> None:
    batch, heads, tokens, head_dim = xs[0].shape
    k = target.k_sorted
    int8 = isinstance(k, Int8Keys)
    k_sorted, k_scale, k_shift = (k.codes, k.scale, k.shift) if int8 else (k, None, None)
    launch(_update_and_sort, means.device, sum(num_labels), batch * heads)(
        *_both(xs),
        target.v,
        *target.v.stride()[:3],
        sorted_idx,
        offsets,
        means,
        k_sorted,
        k_scale,
        k_shift,
        target.v_sorted,
        target.k_means,
        target.v_means,
        target.log2_sizes,
        batch * heads,
        heads,
        tokens,
        num_clusters[0],
        num_clusters[-1],
        num_labels[0] - num_clusters[0],
        INT8=int8,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **update_and_sort_config(head_dim, int8),
    )


def _both(xs: list[Tensor]) -> tuple[Any, ...]:
    """Return the tokens of the two sides and their strides; None where there is one side."""
    x0 = xs[0]
    if len(xs) == 1:
        return (x0, None, *x0.stride()[:3], None, None, None)
    return (x0, xs[1], *x0.stride()[:3], *xs[1].stride()[:3])


PREPARE = {"BLOCK_M": 16, "BLOCK_ZEROS": 1024, "num_warps": 4}


def assign_config(dtype: torch.dtype, chip: int) -> dict[str, int]:
    """Return the tiles of the assignment: tokens, centroids, warps, stages."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if chip == 90:  # measured (see vidaccel/bench/gpu_tune.py)
        return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def update_config(head_dim: int) -> dict[str, int]:
    """Return the tiles of the means: tokens, counts cleared at a time, warps."""
    return {"BLOCK_M": 32, "BLOCK_ZEROS": 256, "num_warps": 8 if head_dim == 64 else 4}


def update_and_sort_config(head_dim: int, int8: bool = False) -> dict[str, int]:
    """Return the tiles of the means that are sorted on the way: tokens, warps.

    The compiler holds a kernel that nearly fits 64 registers down to 64 and spills, as it does
    with 4 warps at head size 64; with 8 every thread reads 16 bytes of a bfloat16 tile. Rounding
    keys takes more registers: half the tile leaves room for as many warps as without.
    """
    if int8:
        return {"BLOCK_M": 16, "num_warps": 4}
    return {"BLOCK_M": 32, "num_warps": 8 if head_dim == 64 else 4}


SIZES = ["batch_heads", "heads", "tokens", "num_clusters0", "num_clusters1", "num_text_labels"]


@triton.jit(do_not_specialize=["rows", "rows0", "num_counts", "counts_per_program"])
def _prepare(
    first0,
    first1,
    centroids,
    rounded,
    half_norms,
    histogram,
    rows,
    rows0,
    num_counts,
    counts_per_program,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ZEROS: tl.constexpr,
):
    """Copy, round and measure the first centroids; every program clears its share of the counts."""
    program = tl.program_id(0).to(tl.int64)
    offs_m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
    ptrs = offs_m[:, None] * HEAD_DIM + offs_d[None, :]
    # [BLOCK_M, BLOCK_D]
    if first1 is None:
        value = tl.load(first0 + ptrs, mask=mask, other=0.0)
    else:
        zeroth = (offs_m < rows0)[:, None]
        value = tl.load(first0 + ptrs, mask=mask & zeroth, other=0.0)
        mask1 = mask & ~zeroth
        ptrs1 = ptrs - rows0.to(tl.int64) * HEAD_DIM
        value += tl.load(first1 + ptrs1, mask=mask1, other=0.0)
    tl.store(centroids + ptrs, value, mask=mask)
    short = value.to(rounded.dtype.element_ty)
    tl.store(rounded + ptrs, short, mask=mask)
    exact = short.to(tl.float32)
    tl.store(half_norms + offs_m, tl.sum(exact * exact, 1) * 0.5, mask=offs_m < rows)
    _clear(histogram, program, num_counts, counts_per_program, BLOCK_ZEROS)


@triton.jit(do_not_specialize=[*SIZES, "video_begin", "video_end"])
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
    half_norms,
    text_mask,
    labels,
    histogram,
    batch_heads,
    heads,
    tokens,
    video_begin,
    video_end,
    num_clusters0,
    num_clusters1,
    num_text_labels,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Label a tile of tokens by the nearest centroid: the least |c|^2 / 2 - x.c."""
    side_head = tl.program_id(1)
    second = side_head >= batch_heads
    batch_head = side_head - batch_heads * second.to(tl.int32)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    x = x0 + batch * batch_stride0 + head * head_stride0
    row_stride = tl.cast(row_stride0, tl.int64)
    num_clusters = num_clusters0
    centroid_base = batch_head.to(tl.int64) * num_clusters0
    if x1 is not None:  # noqa: SIM102 (known when compiling)
        if second:
            x = x1 + batch * batch_stride1 + head * head_stride1
            row_stride = tl.cast(row_stride1, tl.int64)
            num_clusters = num_clusters1
            centroid_base = batch_heads.to(tl.int64) * num_clusters0
            centroid_base += batch_head.to(tl.int64) * num_clusters1

    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < tokens
    # [BLOCK_M, BLOCK_D]
    tile = load_tile(x, offs_m, row_stride, offs_d, mask_m, HEAD_DIM)
    nearest = _nearest(
        tile,
        rounded + centroid_base * HEAD_DIM,
        half_norms + centroid_base,
        num_clusters,
        offs_d,
        HEAD_DIM,
        BLOCK_M,
        BLOCK_N,
    )
    is_video = (offs_m >= video_begin) & (offs_m < video_end)
    text_label = tl.zeros([BLOCK_M], tl.int32)
    if text_mask is not None:
        num_video = video_end - video_begin
        text = tl.where(offs_m < video_begin, offs_m, offs_m - num_video)
        # [BLOCK_M]
        valid = tl.load(
            text_mask + batch * (tokens - num_video) + text, mask=mask_m & ~is_video, other=1
        )
        text_label = tl.where(valid != 0, 0, 1)
    label = tl.where(is_video, nearest, num_clusters + text_label)
    tl.store(labels + side_head.to(tl.int64) * tokens + offs_m, label, mask=mask_m)

    num_labels = num_clusters + num_text_labels
    chunks = tl.cdiv(tokens, CHUNK)
    base = batch_head.to(tl.int64) * chunks * num_labels
    if second:
        base += batch_heads.to(tl.int64) * chunks * (num_clusters0 + num_text_labels)
    tl.atomic_add(
        histogram + base + (offs_m // CHUNK).to(tl.int64) * num_labels + label,
        tl.full([BLOCK_M], 1, tl.int32),
        mask=mask_m,
        sem="relaxed",
    )


@triton.jit
def _nearest(
    tile,
    rounded,
    half_norms,
    num_clusters,
    offs_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the nearest centroid of each row of a tile [BLOCK_M, BLOCK_D]; the lowest of equals.

    A row that holds NaN gets 0.
    """
    offs_n = tl.arange(0, BLOCK_N)
    # The best of each column of tiles; one reduction at the end finds the best of all.
    best = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    best_start = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, num_clusters, BLOCK_N):
        cluster = start + offs_n
        mask_n = cluster < num_clusters
        # [BLOCK_D, BLOCK_N]
        c = load_tile(rounded, cluster, HEAD_DIM, offs_d, mask_n, HEAD_DIM, TRANSPOSED=True)
        # [BLOCK_N]
        norm = tl.load(half_norms + cluster, mask=mask_n, other=float("inf"))
        distance = norm[None, :] - tl.dot(tile, c, input_precision="ieee")
        better = distance < best
        best = tl.where(better, distance, best)
        best_start = tl.where(better, start, best_start)
    least = tl.min(best, 1)
    cluster = best_start + offs_n[None, :]
    nearest = tl.min(tl.where(best == least[:, None], cluster, 2147483647), 1)
    return tl.where(least < float("inf"), nearest, 0)


@triton.jit(do_not_specialize=[*SIZES, "num_counts", "counts_per_program"])
def _update(
    x0,
    x1,
    batch_stride0,
    head_stride0,
    row_stride0,
    batch_stride1,
    head_stride1,
    row_stride1,
    sorted_idx,
    offsets,
    means,
    rounded,
    half_norms,
    histogram,
    num_counts,
    counts_per_program,
    batch_heads,
    heads,
    tokens,
    num_clusters0,
    num_clusters1,
    num_text_labels,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ZEROS: tl.constexpr,
):
    """Write the mean of one cluster; with `rounded`, also what the next assignment reads."""
    label = tl.program_id(0)
    batch_head = tl.program_id(1)
    if histogram is not None:
        program = label.to(tl.int64) * batch_heads + batch_head
        _clear(histogram, program, num_counts, counts_per_program, BLOCK_ZEROS)
    _, cluster, num_clusters, mean_row, x, row_stride, offsets, sorted_idx = _side(
        label,
        batch_head,
        x0,
        x1,
        batch_stride0,
        head_stride0,
        row_stride0,
        batch_stride1,
        head_stride1,
        row_stride1,
        sorted_idx,
        offsets,
        batch_heads,
        heads,
        tokens,
        num_clusters0,
        num_clusters1,
        num_text_labels,
    )
    if cluster < num_clusters:
        offs_d = tl.arange(0, BLOCK_D)
        begin = tl.load(offsets + cluster)
        end = tl.load(offsets + cluster + 1)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Rows of the next turns are copied ahead: a large cluster keeps one program busy for long.
        for start in tl.range(begin, end, BLOCK_M, num_stages=3):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end
            token = tl.load(sorted_idx + offs_m, mask=mask_m, other=0).to(tl.int64)
            # [BLOCK_M, BLOCK_D]
            tile = load_tile(x, token, row_stride, offs_d, mask_m, HEAD_DIM)
            total += tile.to(tl.float32)
        mean = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
        filled = (offs_d < HEAD_DIM) & (end > begin)
        tl.store(means + mean_row * HEAD_DIM + offs_d, mean, mask=filled)
        if rounded is not None:
            short = mean.to(rounded.dtype.element_ty)
            tl.store(rounded + mean_row * HEAD_DIM + offs_d, short, mask=filled)
            exact = tl.where(offs_d < HEAD_DIM, short.to(tl.float32), 0.0)
            tl.store(half_norms + mean_row, tl.sum(exact * exact, 0) * 0.5, mask=end > begin)


@triton.jit(do_not_specialize=SIZES)
def _update_and_sort(
    x0,
    x1,
    batch_stride0,
    head_stride0,
    row_stride0,
    batch_stride1,
    head_stride1,
    row_stride1,
    v,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    sorted_idx,
    offsets,
    means,
    k_sorted,
    k_scale,
    k_shift,
    v_sorted,
    k_means,
    v_means,
    log2_sizes,
    batch_heads,
    heads,
    tokens,
    num_clusters0,
    num_clusters1,
    num_text_labels,
    INT8: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write the mean of one cluster; of the last side, the keys, also its rows in sorted order.

    With INT8 the keys are written in 8 bits, as `quantise_keys` does.
    """
    label = tl.program_id(0)
    batch_head = tl.program_id(1)
    is_key, cluster, num_clusters, mean_row, x, row_stride, offsets, sorted_idx = _side(
        label,
        batch_head,
        x0,
        x1,
        batch_stride0,
        head_stride0,
        row_stride0,
        batch_stride1,
        head_stride1,
        row_stride1,
        sorted_idx,
        offsets,
        batch_heads,
        heads,
        tokens,
        num_clusters0,
        num_clusters1,
        num_text_labels,
    )
    wide_head = batch_head.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    if INT8:
        shift = tl.zeros([BLOCK_D], tl.float32)
        if is_key:
            num_sampled = tl.load(offsets + num_clusters)  # the first tokens, those of the video
            shift = sampled_mean(x, row_stride, sorted_idx, num_sampled, HEAD_DIM, BLOCK_D, BLOCK_M)
            if cluster == 0:
                tl.store(k_shift + wide_head * HEAD_DIM + offs_d, shift, mask=mask_d)
    v += (batch_head // heads).to(tl.int64) * v_batch_stride
    v += (batch_head % heads).to(tl.int64) * v_head_stride
    begin = tl.load(offsets + cluster)
    end = tl.load(offsets + cluster + 1)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        token = tl.load(sorted_idx + offs_m, mask=mask_m, other=0).to(tl.int64)
        # [BLOCK_M, BLOCK_D]
        tile = load_tile(x, token, row_stride, offs_d, mask_m, HEAD_DIM)
        total += tile.to(tl.float32)
        if is_key:
            mask = mask_m[:, None] & mask_d[None, :]
            sorted_row = wide_head * tokens + offs_m.to(tl.int64)
            target = sorted_row[:, None] * HEAD_DIM + offs_d[None, :]
            if INT8:
                codes, scale = to_int8(tile.to(tl.float32) - shift[None, :])
                tl.store(k_sorted + target, codes, mask=mask)
                tl.store(k_scale + sorted_row, scale, mask=mask_m)
            else:
                tl.store(k_sorted + target, tile, mask=mask)
            # [BLOCK_M, BLOCK_D]
            v_tile = load_tile(v, token, tl.cast(v_row_stride, tl.int64), offs_d, mask_m, HEAD_DIM)
            v_total += v_tile.to(tl.float32)
            tl.store(v_sorted + target, v_tile, mask=mask)
    if cluster < num_clusters:
        count = tl.maximum(end - begin, 1).to(tl.float32)
        mean = tl.sum(total, 0) / count
        tl.store(means + mean_row * HEAD_DIM + offs_d, mean, mask=mask_d & (end > begin))
        if is_key:
            v_mean = tl.sum(v_total, 0) / count
            row = wide_head * num_clusters + cluster
            tl.store(k_means + row * HEAD_DIM + offs_d, mean, mask=mask_d)
            tl.store(v_means + row * HEAD_DIM + offs_d, v_mean, mask=mask_d)
            size = tl.where(end > begin, tl.log2(count), float("-inf"))
            tl.store(log2_sizes + row, size)


@triton.jit
def _side(
    label,
    batch_head,
    x0,
    x1,
    batch_stride0,
    head_stride0,
    row_stride0,
    batch_stride1,
    head_stride1,
    row_stride1,
    sorted_idx,
    offsets,
    batch_heads,
    heads,
    tokens,
    num_clusters0,
    num_clusters1,
    num_text_labels,
):
    """Return the side that a label of both sides belongs to, and where its parts lie.

    Returns:
        whether it is the last side, the label within its side, the clusters of the side, the row
        of the label's mean, and of the batch item and head: tokens and their stride, offsets and
        sorted order.
    """
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    wide_head = batch_head.to(tl.int64)
    num_labels0 = num_clusters0 + num_text_labels
    second = label >= num_labels0
    last = second if x1 is not None else True
    cluster = label
    num_clusters = num_clusters0
    mean_row = wide_head * num_clusters0 + label
    x = x0 + batch * batch_stride0 + head * head_stride0
    row_stride = tl.cast(row_stride0, tl.int64)
    side_offsets = offsets + wide_head * (num_labels0 + 1)
    side_sorted_idx = sorted_idx + wide_head * tokens
    if x1 is not None:  # noqa: SIM102 (known when compiling)
        if second:
            wide_heads = batch_heads.to(tl.int64)
            cluster = label - num_labels0
            num_clusters = num_clusters1
            mean_row = wide_heads * num_clusters0 + wide_head * num_clusters1 + cluster
            x = x1 + batch * batch_stride1 + head * head_stride1
            row_stride = tl.cast(row_stride1, tl.int64)
            side_offsets = offsets + wide_heads * (num_labels0 + 1)
            side_offsets += wide_head * (num_clusters1 + num_text_labels + 1)
            side_sorted_idx = sorted_idx + (wide_heads + wide_head) * tokens
    return last, cluster, num_clusters, mean_row, x, row_stride, side_offsets, side_sorted_idx


@triton.jit
def _clear(histogram, program, num_counts, counts_per_program, BLOCK_ZEROS: tl.constexpr):
    """Write zeros to the share of a program."""
    for start in range(0, counts_per_program, BLOCK_ZEROS):
        within = start + tl.arange(0, BLOCK_ZEROS)
        place = program * counts_per_program + within
        tl.store(
            histogram + place,
            tl.zeros([BLOCK_ZEROS], tl.int32),
            mask=(within < counts_per_program) & (place < num_counts),
        )
