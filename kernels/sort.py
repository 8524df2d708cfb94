"""A stable counting sort of labels: counts per chunk of tokens, a scan, and a rank in the chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import Impl, KernelError, check_integers, resolve

CHUNK = 256
SCAN = {"CHUNKS": 16, "LABELS": 256, "num_warps": 8}
RANK = {"CHUNK": CHUNK, "PART": 32, "num_warps": 4}
HISTOGRAM = {"CHUNK": CHUNK, "num_warps": 4}


def sort_by_label(labels: Tensor, num_labels: int, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """See `reference.sort_by_label`, which this equals exactly."""
    if resolve(impl, labels) == "reference":
        return reference.sort_by_label(labels, num_labels)
    check_integers("labels", labels, 3)
    if num_labels < 1 or labels.shape[2] < 1:
        raise KernelError(f"{num_labels} labels of {labels.shape[2]} tokens cannot be sorted")
    batch, heads, tokens = labels.shape
    order = Order.empty(batch * heads, tokens, [num_labels], labels.device)
    order.shape = (batch, heads)
    order.label = labels.contiguous().view(-1)
    order.histogram.zero_()
    _histogram[(triton.cdiv(tokens, CHUNK), batch * heads)](
        order.label, order.histogram, tokens, num_labels, **HISTOGRAM
    )
    rank_and_scan(order)
    return order.orders(0), order.offsets(0)


@dataclass
class Order:
    """Labels of one or two sides with their sorted order, in flat buffers; see kmeans.py.

    Attributes:
        batch_heads: B * H.
        tokens: S.
        counts: number of labels of each side, N.
        label: int32, [B, H, S] of each side.
        order: int32, [B, H, S] of each side: place -> token.
        offset: int32, [B, H, N + 1] of each side.
        histogram: int32, [B, H, chunks, N] of each side; after the scan, what comes before.
        shape: (B, H).
    """

    batch_heads: int
    tokens: int
    counts: list[int]
    label: Tensor
    order: Tensor
    offset: Tensor
    histogram: Tensor
    shape: tuple[int, int] = (0, 0)

    @classmethod
    def empty(cls, batch_heads: int, tokens: int, counts: list[int], device: torch.device) -> Order:
        """Buffers with nothing in them."""

        def flat(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        rows = len(counts) * batch_heads * tokens
        chunks = triton.cdiv(tokens, CHUNK)
        return cls(
            batch_heads,
            tokens,
            counts,
            flat(rows),
            flat(rows),
            flat(batch_heads * sum(count + 1 for count in counts)),
            flat(batch_heads * chunks * sum(counts)),
        )

    @classmethod
    def of(cls, orders: list[Tensor], offsets: list[Tensor]) -> Order:
        """What sorted sides already have: order [B, H, S] and offsets [B, H, N + 1] of each."""
        first = orders[0]
        nothing = first.new_empty(1)
        return cls(
            first.shape[0] * first.shape[1],
            first.shape[2],
            [offset.shape[2] - 1 for offset in offsets],
            nothing,
            torch.cat([order.reshape(-1) for order in orders]) if orders[1:] else first.view(-1),
            torch.cat([o.reshape(-1) for o in offsets]) if offsets[1:] else offsets[0].view(-1),
            nothing,
            (first.shape[0], first.shape[1]),
        )

    def labels(self, side: int) -> Tensor:
        """[B, H, S] of a side."""
        return self.label.view(-1, *self.shape, self.tokens)[side]

    def orders(self, side: int) -> Tensor:
        """[B, H, S] of a side."""
        return self.order.view(-1, *self.shape, self.tokens)[side]

    def offsets(self, side: int) -> Tensor:
        """[B, H, N + 1] of a side."""
        begin = sum(count + 1 for count in self.counts[:side]) * self.batch_heads
        size = (self.counts[side] + 1) * self.batch_heads
        return self.offset[begin : begin + size].view(*self.shape, self.counts[side] + 1)


def rank_and_scan(order: Order) -> None:
    """Fill offsets and order from labels and their histograms: two launches."""
    groups = order.batch_heads * len(order.counts)
    chunks = triton.cdiv(order.tokens, CHUNK)
    sizes = (order.batch_heads, chunks, order.counts[0], order.counts[-1])
    _scan[(groups,)](order.histogram, order.offset, *sizes, **SCAN)
    _rank[(chunks, groups)](
        order.label,
        order.histogram,
        order.offset,
        order.order,
        order.tokens,
        *sizes,
        **RANK,
    )


@triton.jit(do_not_specialize=["tokens", "names"])
def _histogram(label, histogram, tokens, names, CHUNK: tl.constexpr):
    """Counts of the labels of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = row < tokens
    found = tl.load(label + group * tokens + row, mask=mine, other=0)
    chunks = tl.cdiv(tokens, CHUNK)
    tl.atomic_add(
        histogram + (group * chunks + chunk) * names + found,
        tl.full([CHUNK], 1, tl.int32),
        mask=mine & (found >= 0) & (found < names),
        sem="relaxed",
    )


@triton.jit
def _base(group, batch_heads, names0, names1, per_name, per_group):
    """Where a group's part of a flat buffer of [names * per_name + per_group] begins."""
    size0 = names0.to(tl.int64) * per_name + per_group
    size1 = names1.to(tl.int64) * per_name + per_group
    before = tl.minimum(group, batch_heads).to(tl.int64)
    after = tl.maximum(group - batch_heads, 0).to(tl.int64)
    return before * size0 + after * size1


@triton.jit(do_not_specialize=["batch_heads", "chunks", "names0", "names1"])
def _scan(
    histogram,
    offset,
    batch_heads,
    chunks,
    names0,
    names1,
    CHUNKS: tl.constexpr,
    LABELS: tl.constexpr,
):
    """Turn counts into what comes before, along the chunks of a label, then along labels."""
    group = tl.program_id(0)
    names = tl.where(group >= batch_heads, names1, names0)
    counts = histogram + _base(group, batch_heads, names0, names1, chunks, 0)
    offsets = offset + _base(group, batch_heads, names0, names1, 1, 1)
    label = tl.arange(0, LABELS)
    step = tl.arange(0, CHUNKS)
    before = 0
    for name in range(0, names, LABELS):
        known = name + label < names
        total = tl.zeros([LABELS], tl.int32)
        for at in range(0, chunks, CHUNKS):
            mask = (at + step < chunks)[:, None] & known[None, :]
            place = counts + (at + step)[:, None].to(tl.int64) * names + (name + label)[None, :]
            count = tl.load(place, mask=mask, other=0)
            tl.store(place, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
            total += tl.sum(count, 0)
        tl.store(offsets + name + label, before + tl.cumsum(total, 0) - total, mask=known)
        before += tl.sum(total, 0)
    tl.store(offsets + names, before)


@triton.jit(do_not_specialize=["tokens", "batch_heads", "chunks", "names0", "names1"])
def _rank(
    label,
    histogram,
    offset,
    order,
    tokens,
    batch_heads,
    chunks,
    names0,
    names1,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """Place of every token of a chunk: label, earlier chunks, then earlier tokens of the chunk."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    names = tl.where(group >= batch_heads, names1, names0)
    counts = histogram + _base(group, batch_heads, names0, names1, chunks, 0)
    offsets = offset + _base(group, batch_heads, names0, names1, 1, 1)
    labels = label + group.to(tl.int64) * tokens
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = row < tokens
    found = tl.load(labels + row, mask=mine, other=-1)
    mine = mine & (found >= 0) & (found < names)
    place = tl.load(offsets + found, mask=mine, other=0)
    place += tl.load(counts + chunk.to(tl.int64) * names + found, mask=mine, other=0)
    for part in range(0, CHUNK, PART):
        other = chunk * CHUNK + part + tl.arange(0, PART)
        other_label = tl.load(labels + other, mask=other < tokens, other=-2)
        same = (found[:, None] == other_label[None, :]) & (other[None, :] < row[:, None])
        place += tl.sum(same.to(tl.int32), 1)
    tl.store(order + group.to(tl.int64) * tokens + place, row, mask=mine)
