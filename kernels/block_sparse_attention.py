"""Attention of query clusters to the key clusters that are selected for them.

One program per tile of queries. It reads its queries through the sorted order and writes its
output back through it, walks the full blocks of keys without a mask, then the tiles made of
partial blocks, and for compensation the means of the clusters that were not selected. With keys in
int8 (see `quantise`) scores are products of whole numbers; all else stays as it is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.block_lists import BLOCK_PARTIAL, BlockLists, fill_block_lists
from vidaccel.kernels.common import (
    Impl,
    Selection,
    check_integers,
    check_like,
    resolve,
    rows_contiguous,
)
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.quantise import Int8Keys, quantise_keys, to_int8
from vidaccel.kernels.tiles import (
    LN_2,
    LOG2_E,
    LOWEST,
    block_d,
    interpreting,
    load_tile,
    online_softmax_update,
)


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
    if resolve(impl, q, k, v, k_means, v_means) == "reference":
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
    means = None
    num_compensated = selection.num_queries if compensated_rows is None else compensated_rows
    if k_means is not None and v_means is not None:
        empty = (k_offsets.diff()[..., : k_means.shape[2], None]) == 0
        filled = (x.masked_fill(empty, 0.0).to(q.dtype) for x in (k_means, v_means))
        means = ClusterMeans(*filled, num_compensated)
    lists = empty_block_lists(
        q,
        k.shape[2],
        selection.num_queries,
        selection.num_keys,
        num_means=None if k_means is None else k_means.shape[2],
        int8_qk=int8_qk,
    )
    keys: Tensor | Int8Keys = k.contiguous()
    if int8_qk:
        sampled = selection.num_keys if shift_clusters is None else shift_clusters
        keys = quantise_keys(k.contiguous(), k_offsets, sampled)
    fill_block_lists(lists, selection, q_offsets, k_offsets, num_compensated)
    return attend(
        q,
        keys,
        v.contiguous(),
        q_offsets,
        k_offsets,
        lists,
        scale=scale,
        sorted_idx=None if q_order is None else q_order.contiguous(),
        means=means,
    )


def empty_block_lists(
    q: Tensor,
    num_keys: int,
    num_q_clusters: int,
    num_k_clusters: int,
    *,
    num_means: int | None,
    int8_qk: bool = False,
) -> BlockLists:
    """Allocate the lists of queries q [B, H, S, D]; see `BlockLists.empty`."""
    batch, heads, num_queries, head_dim = q.shape
    config = _hopper_config(q, int8_qk) or attention_config(
        head_dim, q.dtype, chip(q.device), int8_qk
    )
    return BlockLists.empty(
        batch,
        heads,
        num_queries,
        num_keys,
        num_q_clusters,
        num_k_clusters,
        block_m=config["BLOCK_M"],
        block_n=config["BLOCK_N"],
        num_means=num_means,
        device=q.device,
    )


@dataclass(frozen=True)
class ClusterMeans:
    """The means of key clusters, which stand for those that are not selected.

    Attributes:
        k_means, v_means: [B, H, Kc, D] in the dtype of q, finite where a cluster has no keys.
        num_compensated: only the first so many query clusters use them.
    """

    k_means: Tensor
    v_means: Tensor
    num_compensated: int


def attend(
    q: Tensor,
    k: Tensor | Int8Keys,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    sorted_idx: Tensor | None,
    means: ClusterMeans | None = None,
) -> tuple[Tensor, Tensor]:
    """Work off block lists: one launch. k and v are contiguous; see the reference.

    With int8 keys each program rounds its queries when it has read them.
    """
    if not isinstance(k, Int8Keys) and (config := _hopper_config(q, False)) is not None:
        from vidaccel.kernels.hopper_attention import attend_on_hopper

        found: tuple[Tensor, Tensor] = attend_on_hopper(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            lists,
            scale=scale,
            sorted_idx=sorted_idx,
            means=means,
            config=config,
        )
        return found
    q = rows_contiguous(q)
    batch, heads, num_queries, head_dim = q.shape
    num_q_clusters = q_offsets.shape[2] - 1
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=q.device)
    max_full_blocks, max_partial_blocks, max_q_tiles = lists.room()
    num_programs = max_q_tiles * batch * heads
    int8 = isinstance(k, Int8Keys)
    keys, k_scale, k_shift = (k.codes, k.scale, k.shift) if int8 else (k, None, None)
    # Without means the kernel has none of their arguments.
    mean_args: tuple[Tensor | int | None, ...] = (None,) * 5
    if means is not None:
        mean_args = (
            means.k_means,
            means.v_means,
            lists.mean_bias,
            lists.num_means,
            means.num_compensated,
        )
    launch(_attend, q.device, num_programs)(
        q,
        out,
        lse,
        *q.stride()[:3],
        *out.stride()[:3],
        sorted_idx,
        q_offsets,
        lists.q_tiles,
        keys,
        v,
        k_scale,
        k_shift,
        lists.full_blocks,
        lists.partial_blocks,
        lists.num_blocks,
        *mean_args,
        scale * LOG2_E.value,
        heads,
        num_queries,
        num_q_clusters,
        max_q_tiles,
        v.shape[2],
        max_full_blocks,
        max_partial_blocks,
        INT8=int8,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        BLOCK_PARTIAL=BLOCK_PARTIAL,
        **attention_config(head_dim, q.dtype, chip(q.device), int8),
    )
    return out, lse


def _hopper_config(q: Tensor, int8_qk: bool) -> dict[str, Any] | None:
    """Return the config of the kernel for sm_90; None where `_attend` does the work."""
    if int8_qk or q.device.type != "cuda" or interpreting() or chip(q.device) != 90:
        return None
    module = _hopper_module()
    found: dict[str, Any] | None = module and module.hopper_config(q.shape[3], q.dtype)
    return found


@lru_cache
def _hopper_module() -> Any:
    """Import the kernel for sm_90; None, with a warning, where Triton's Gluon is another one."""
    try:
        return import_module("vidaccel.kernels.hopper_attention")
    except Exception as error:  # experimental in Triton: another version may fail in any way
        warnings.warn(
            f"this version of Triton has no Gluon as vidaccel knows it ({error}): sparse attention "
            "goes without it, and takes 1.1 to 1.2 times as long",
            stacklevel=2,
        )
        return None


def attention_config(
    head_dim: int, dtype: torch.dtype, chip: int, int8_qk: bool = False
) -> dict[str, int]:
    """Return the tiles of queries, of keys and of means, warps and pipeline stages.

    A tile of 128 queries halves what a smaller one reads from the L2 cache, where there are
    registers for it and that is what a chip waits for.
    """
    if dtype == torch.float32:
        # Products without tensor cores, in full precision; with int8 the numbers of a query take
        # registers twice: 8 warps of head size 64 are just short of them, and of larger ones a
        # tile of 32 queries.
        if int8_qk:
            return _config(32, 16, 4, 1) if head_dim == 64 else _config(16, 16, 8, 1)
        return _config(32, 16, 8, 1)
    if chip not in (90, 100):
        return _config(64, 32, 4, 2)
    if head_dim == 64:
        return _config(128, 64, 4, 3, means=16 if chip == 100 else 64)  # else it spills there
    if chip == 90:
        # Two programs on a multiprocessor, whose products hide the softmax of the other, and tiles
        # that clusters fill better; measured (see vidaccel/bench/gpu_tune.py).
        return _config(64, 64, 4, 3, means=32 if int8_qk else 64)
    return _config(128, 128, 8, 2)


def _config(block_m: int, block_n: int, warps: int, stages: int, means: int = 64) -> dict[str, int]:
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_MEANS": min(block_n, means)}
    return tiles | {"num_warps": warps, "num_stages": stages}


SIZES = ["heads", "num_queries", "num_q_clusters", "max_q_tiles", "num_keys"]
SIZES += ["max_full_blocks", "max_partial_blocks", "num_means", "num_compensated"]


@triton.jit(do_not_specialize=["qk_scale_log2", *SIZES])
def _attend(
    q,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    sorted_idx,
    q_offsets,
    q_tiles,
    k,
    v,
    k_scale,
    k_shift,
    full_blocks,
    partial_blocks,
    num_blocks,
    k_means,
    v_means,
    mean_bias,
    num_means,
    num_compensated,
    qk_scale_log2,
    heads,
    num_queries,
    num_q_clusters,
    max_q_tiles,
    num_keys,
    max_full_blocks,
    max_partial_blocks,
    INT8: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_MEANS: tl.constexpr,
):
    """Attend with one tile of queries. Scores are in powers of two: the scale holds log2(e).

    With INT8 the queries are rounded here, and a score is a product of whole numbers times the
    scales of its query and its key.
    """
    # Tiles of one head run together, so that its keys and values stay in the L2 cache.
    batch_head = (tl.program_id(0) // max_q_tiles).to(tl.int64)
    tile = tl.program_id(0) % max_q_tiles
    q_cluster = tl.load(q_tiles + batch_head * 2 * max_q_tiles + tile)
    if q_cluster >= 0:
        batch, head = batch_head // heads, batch_head % heads
        q += batch * q_batch_stride + head * q_head_stride
        q_idx, mask_m = _query_rows(
            sorted_idx,
            q_offsets,
            q_tiles,
            batch_head,
            tile,
            q_cluster,
            num_queries,
            num_q_clusters,
            max_q_tiles,
            BLOCK_M,
        )
        offs_d = tl.arange(0, BLOCK_D)
        # [BLOCK_M, BLOCK_D]
        q_tile = load_tile(q, q_idx, q_row_stride, offs_d, mask_m, HEAD_DIM)
        row_scale = tl.full([BLOCK_M], qk_scale_log2, tl.float32)
        shift_score = 0.0  # what the shift of the keys took from every score
        if INT8:
            exact = q_tile.to(tl.float32)
            # [BLOCK_D]
            shift = tl.load(
                k_shift + batch_head * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0
            )
            shift_score = tl.sum(exact * shift[None, :], 1) * qk_scale_log2
            q_tile, q_scale = to_int8(exact)
            row_scale = q_scale * qk_scale_log2
            k_scale += batch_head * num_keys
        k += batch_head * num_keys * HEAD_DIM
        v += batch_head * num_keys * HEAD_DIM
        row = batch_head * num_q_clusters + q_cluster
        full_blocks += row * max_full_blocks
        partial_blocks += row * max_partial_blocks
        num_blocks += row * 2

        m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        offs_n = tl.arange(0, BLOCK_N)

        # Full blocks: BLOCK_N keys in a row, no mask.
        start_n = tl.load(full_blocks)
        for block in range(0, tl.load(num_blocks)):
            k_idx = (start_n + offs_n).to(tl.int64)
            # For the next turn: its latency is hidden by this one.
            start_n = tl.load(full_blocks + block + 1)
            # [BLOCK_D, BLOCK_N]
            k_tile = load_tile(k, k_idx, HEAD_DIM, offs_d, None, HEAD_DIM, TRANSPOSED=True)
            # [BLOCK_M, BLOCK_N]
            scores = tl.dot(q_tile, k_tile, input_precision="ieee")
            if INT8:
                scores = scores.to(tl.float32) * tl.load(k_scale + k_idx)[None, :]
            m_i, l_i, acc, p = online_softmax_update(m_i, l_i, acc, scores, row_scale)
            # [BLOCK_N, BLOCK_D]
            v_tile = load_tile(v, k_idx, HEAD_DIM, offs_d, None, HEAD_DIM)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

        # Tiles of partial blocks: BLOCK_PARTIAL keys in a row at most, from several runs.
        for tile_n in range(0, tl.load(num_blocks + 1)):
            # [BLOCK_N]
            packed = tl.load(
                partial_blocks + tile_n * (BLOCK_N // BLOCK_PARTIAL) + offs_n // BLOCK_PARTIAL
            )
            mask_n = offs_n % BLOCK_PARTIAL < packed % 32
            k_idx = (packed // 32 + offs_n % BLOCK_PARTIAL).to(tl.int64)
            # [BLOCK_D, BLOCK_N]
            k_tile = load_tile(k, k_idx, HEAD_DIM, offs_d, mask_n, HEAD_DIM, TRANSPOSED=True)
            # [BLOCK_M, BLOCK_N]
            scores = tl.dot(q_tile, k_tile, input_precision="ieee")
            if INT8:
                scale = tl.load(k_scale + k_idx, mask=mask_n, other=0.0)
                scores = scores.to(tl.float32) * scale[None, :]
            scores = tl.where(mask_n[None, :], scores * row_scale[:, None], float("-inf"))
            m_i, l_i, acc, p = online_softmax_update(m_i, l_i, acc, scores, None)
            # [BLOCK_N, BLOCK_D]
            v_tile = load_tile(v, k_idx, HEAD_DIM, offs_d, mask_n, HEAD_DIM)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

        m_i += shift_score
        if k_means is not None:
            # Means of the clusters that were left out, each as if it were all of its keys.
            if INT8:
                q_tile = load_tile(q, q_idx, q_row_stride, offs_d, mask_m, HEAD_DIM)
            k_means += batch_head * num_means * HEAD_DIM
            v_means += batch_head * num_means * HEAD_DIM
            mean_bias += row * num_means
            offs_mean = tl.arange(0, BLOCK_MEANS)
            num_used = tl.where(q_cluster < num_compensated, num_means, 0)
            for start in range(0, num_used, BLOCK_MEANS):
                mean = start + offs_mean
                known = mean < num_means
                # [BLOCK_MEANS]
                bias = tl.load(mean_bias + mean, mask=known, other=float("-inf"))
                # [BLOCK_D, BLOCK_MEANS]
                k_tile = load_tile(
                    k_means, mean, HEAD_DIM, offs_d, known, HEAD_DIM, TRANSPOSED=True
                )
                # [BLOCK_M, BLOCK_MEANS]
                scores = tl.dot(q_tile, k_tile, input_precision="ieee")
                scores = scores * qk_scale_log2 + bias[None, :]
                m_i, l_i, acc, p = online_softmax_update(m_i, l_i, acc, scores, None)
                # [BLOCK_MEANS, BLOCK_D]
                v_tile = load_tile(v_means, mean, HEAD_DIM, offs_d, known, HEAD_DIM)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

        out += batch * out_batch_stride + head * out_head_stride
        lse += batch_head * num_queries
        acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # 0 for a query without keys
        tl.store(
            out + q_idx[:, None] * out_row_stride + offs_d[None, :],
            acc.to(out.dtype.element_ty),
            mask=mask_m[:, None] & (offs_d < HEAD_DIM)[None, :],
        )
        tl.store(lse + q_idx, (m_i + tl.log2(l_i)) * LN_2, mask=mask_m)


@triton.jit
def _query_rows(
    sorted_idx,
    q_offsets,
    q_tiles,
    batch_head,
    tile,
    q_cluster,
    num_queries,
    num_q_clusters,
    max_q_tiles,
    BLOCK_M: tl.constexpr,
):
    """Return the queries [BLOCK_M] of a tile, int64, and which of them are of its cluster."""
    first = tl.load(q_tiles + batch_head * 2 * max_q_tiles + max_q_tiles + tile)
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(q_offsets + batch_head * (num_q_clusters + 1) + q_cluster + 1)
    if sorted_idx is None:
        q_idx = offs_m.to(tl.int64)
    else:
        q_idx = tl.load(sorted_idx + batch_head * num_queries + offs_m, mask=mask_m, other=0)
        q_idx = q_idx.to(tl.int64)
    return q_idx, mask_m
