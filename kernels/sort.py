"""A stable counting sort of labels: counts per chunk of tokens, a scan, and a rank in the chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import Impl, KernelError, check_integers, resolve
from vidaccel.kernels.launch import launch


def sort_by_label(labels: Tensor, num_labels: int, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """See `reference.sort_by_label`, which this equals exactly."""
    if resolve(impl, labels) == "reference":
        return reference.sort_by_label(labels, num_labels)
    check_integers("labels", labels, 3)
    if not 1 <= num_labels <= _NO_LABEL.value or labels.shape[2] < 1:
        raise KernelError(f"{num_labels} labels of {labels.shape[2]} tokens cannot be sorted")
    batch, heads, tokens = labels.shape
    found = SortedLabels.empty(batch, heads, tokens, [num_labels], labels.device)
    found.labels = labels.contiguous().view(-1)
    found.histogram.zero_()
    launch(_histogram, labels.device, triton.cdiv(tokens, CHUNK), batch * heads)(
        found.labels, found.histogram, tokens, num_labels, **HISTOGRAM
    )
    found.sort()
    return found.side_sorted_idx(0), found.side_offsets(0)


@dataclass
class SortedLabels:
    """Labels of one or two sides with their sorted order, in flat buffers; see kmeans.py.

    Attributes:
        batch, heads, tokens: B, H and S, the same on each side.
        num_labels: number of labels of each side, N.
        labels: int32, [B, H, S] of each side.
        sorted_idx: int32, [B, H, S] of each side: place in sorted order -> token.
        offsets: int32, [B, H, N + 1] of each side: where each label begins.
        histogram: int32, [B, H, chunks, N] of each side: counts of the labels in each chunk of
            tokens; after `sort`, the counts of the chunks before.
    """

    batch: int
    heads: int
    tokens: int
    num_labels: list[int]
    labels: Tensor
    sorted_idx: Tensor
    offsets: Tensor
    histogram: Tensor

    @classmethod
    def empty(
        cls, batch: int, heads: int, tokens: int, num_labels: list[int], device: torch.device
    ) -> SortedLabels:
        """Allocate buffers, with nothing in them."""

        def flat(size: int) -> Tensor:
            return torch.empty(batch * heads * size, dtype=torch.int32, device=device)

        return cls(
            batch,
            heads,
            tokens,
            num_labels,
            labels=flat(len(num_labels) * tokens),
            sorted_idx=flat(len(num_labels) * tokens),
            offsets=flat(sum(count + 1 for count in num_labels)),
            histogram=flat(triton.cdiv(tokens, CHUNK) * sum(num_labels)),
        )

    def side_labels(self, side: int) -> Tensor:
        """Return the labels of a side: [B, H, S]."""
        return self.labels.view(-1, self.batch, self.heads, self.tokens)[side]

    def side_sorted_idx(self, side: int) -> Tensor:
        """Return the sorted order of a side: [B, H, S]."""
        return self.sorted_idx.view(-1, self.batch, self.heads, self.tokens)[side]

    def side_offsets(self, side: int) -> Tensor:
        """Return where the labels of a side begin: [B, H, N + 1]."""
        size = self.num_labels[side] + 1
        begin = sum(count + 1 for count in self.num_labels[:side]) * self.batch * self.heads
        part = self.offsets[begin : begin + size * self.batch * self.heads]
        return part.view(self.batch, self.heads, size)

    def sort(self) -> None:
        """Fill offsets and sorted_idx from labels and their histograms: two launches."""
        side_heads = self.batch * self.heads * len(self.num_labels)
        chunks = triton.cdiv(self.tokens, CHUNK)
        sizes = (self.batch * self.heads, chunks, self.num_labels[0], self.num_labels[-1])
        device = self.labels.device
        launch(_scan, device, side_heads)(self.histogram, self.offsets, *sizes, **SCAN)
        launch(_rank, device, chunks, side_heads)(
            self.labels,
            self.histogram,
            self.offsets,
            self.sorted_idx,
            self.tokens,
            *sizes,
            **RANK,
        )


CHUNK = 256  # tokens whose labels are counted together
_NO_LABEL = tl.constexpr(2**23 - 1)  # the largest of which, times CHUNK, is an int32
HISTOGRAM = {"CHUNK": CHUNK, "num_warps": 4}
SCAN = {"BLOCK_CHUNKS": 16, "BLOCK_LABELS": 256, "num_warps": 8}
RANK = {"CHUNK": CHUNK, "num_warps": 1}


@triton.jit(do_not_specialize=["tokens", "num_labels"])
def _histogram(labels, histogram, tokens, num_labels, CHUNK: tl.constexpr):
    """Count the labels of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    batch_head = tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask_m = token < tokens
    # [CHUNK]
    label = tl.load(labels + batch_head * tokens + token, mask=mask_m, other=0)
    chunks = tl.cdiv(tokens, CHUNK)
    tl.atomic_add(
        histogram + (batch_head * chunks + chunk) * num_labels + label,
        tl.full([CHUNK], 1, tl.int32),
        mask=mask_m & (label >= 0) & (label < num_labels),
        sem="relaxed",
    )


@triton.jit(do_not_specialize=["batch_heads", "chunks", "num_labels0", "num_labels1"])
def _scan(
    histogram,
    offsets,
    batch_heads,
    chunks,
    num_labels0,
    num_labels1,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
):
    """Turn counts into what comes before, along the chunks of a label, then along labels."""
    side_head = tl.program_id(0)
    num_labels = tl.where(side_head >= batch_heads, num_labels1, num_labels0)
    histogram += _side_base(side_head, batch_heads, num_labels0, num_labels1, chunks, 0)
    offsets += _side_base(side_head, batch_heads, num_labels0, num_labels1, 1, 1)
    offs_l = tl.arange(0, BLOCK_LABELS)
    offs_c = tl.arange(0, BLOCK_CHUNKS)
    before = 0
    for start in range(0, num_labels, BLOCK_LABELS):
        label = start + offs_l
        mask_l = label < num_labels
        total = tl.zeros([BLOCK_LABELS], tl.int32)
        for chunk in range(0, chunks, BLOCK_CHUNKS):
            mask = (chunk + offs_c < chunks)[:, None] & mask_l[None, :]
            ptrs = histogram + (chunk + offs_c)[:, None].to(tl.int64) * num_labels + label[None, :]
            # [BLOCK_CHUNKS, BLOCK_LABELS]
            count = tl.load(ptrs, mask=mask, other=0)
            tl.store(ptrs, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
            total += tl.sum(count, 0)
        tl.store(offsets + start + offs_l, before + tl.cumsum(total, 0) - total, mask=mask_l)
        before += tl.sum(total, 0)
    tl.store(offsets + num_labels, before)


@triton.jit(do_not_specialize=["tokens", "batch_heads", "chunks", "num_labels0", "num_labels1"])
def _rank(
    labels,
    histogram,
    offsets,
    sorted_idx,
    tokens,
    batch_heads,
    chunks,
    num_labels0,
    num_labels1,
    CHUNK: tl.constexpr,
):
    """Place every token of a chunk: by label, earlier chunks, then earlier tokens of the chunk."""
    chunk = tl.program_id(0)
    side_head = tl.program_id(1)
    num_labels = tl.where(side_head >= batch_heads, num_labels1, num_labels0)
    histogram += _side_base(side_head, batch_heads, num_labels0, num_labels1, chunks, 0)
    offsets += _side_base(side_head, batch_heads, num_labels0, num_labels1, 1, 1)
    labels += side_head.to(tl.int64) * tokens
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask_m = token < tokens
    # [CHUNK]
    label = tl.load(labels + token, mask=mask_m, other=-1)
    mask_m = mask_m & (label >= 0) & (label < num_labels)
    # One number for label and token, sorted; tokens without a label come last.
    offs = tl.arange(0, CHUNK)
    number = tl.sort(tl.where(mask_m, label, _NO_LABEL) * CHUNK + offs)
    label = number // CHUNK
    mask = label != _NO_LABEL
    _, first = tl.associative_scan((label, offs), 0, _first_of_label)
    place = tl.load(offsets + label, mask=mask, other=0) + offs - first
    place += tl.load(histogram + chunk.to(tl.int64) * num_labels + label, mask=mask, other=0)
    token = chunk * CHUNK + number % CHUNK
    tl.store(sorted_idx + side_head.to(tl.int64) * tokens + place, token, mask=mask)


@triton.jit
def _first_of_label(label0, first0, label1, first1):
    """Carry the first place of a label on along a sorted row."""
    return label1, tl.where(label0 == label1, first0, first1)


@triton.jit
def _side_base(side_head, batch_heads, num_labels0, num_labels1, per_label, per_head):
    """Return where one head of a side begins in a buffer of [per_label * labels + per_head]."""
    size0 = num_labels0.to(tl.int64) * per_label + per_head
    size1 = num_labels1.to(tl.int64) * per_label + per_head
    before0 = tl.minimum(side_head, batch_heads).to(tl.int64)
    before1 = tl.maximum(side_head - batch_heads, 0).to(tl.int64)
    return before0 * size0 + before1 * size1
