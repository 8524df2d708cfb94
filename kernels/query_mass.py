"""The attention mass of query clusters on key clusters, averaged over queries: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.tiles import LOG2_E, block_d, load_tile


def query_mass_logits(
    q: Tensor,
    sorted_idx: Tensor,
    q_offsets: Tensor,
    k_means: Tensor,
    log2_sizes: Tensor,
    num_q_means: int,
    scale: float,
) -> Tensor:
    """Return the logarithm of `reference.query_mass`: [B, H, Qc, Kc] fp32.

    Args:
        q: [B, H, S, D] in its own order.
        sorted_idx, q_offsets: its clustering, [B, H, S] and [B, H, Qc + 1] int32, or Qc + 3.
        k_means: [B, H, Kc, D] in the dtype of q; finite where a cluster has no keys.
        log2_sizes: [B, H, Kc] fp32, see `kmeans.SortedKeys`.
        num_q_means: number of query clusters without text and padding, Qc.
        scale: factor on the scores.
    """
    batch, heads, tokens, head_dim = q.shape
    num_k_means = k_means.shape[2]
    out = torch.empty(batch, heads, num_q_means, num_k_means, dtype=torch.float32, device=q.device)
    launch(_mass, q.device, num_q_means, batch * heads)(
        q,
        *q.stride()[:3],
        sorted_idx,
        q_offsets,
        k_means,
        log2_sizes,
        out,
        scale * LOG2_E.value,
        heads,
        tokens,
        num_q_means,
        num_k_means,
        q_offsets.shape[2] - 1,
        MOST=reference.MASS_QUERIES,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim),
        **mass_config(head_dim, q.dtype, chip(q.device)),
    )
    return out


def mass_config(head_dim: int, dtype: torch.dtype, chip: int) -> dict[str, int]:
    """Return the tiles of the kernel: queries, key clusters, warps.

    At head size 64 the larger tiles and 8 warps nearly fit a step of the register count, to which
    the compiler then holds the kernel, and spills; on sm_100 it does at every head size.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4 if head_dim == 64 else 8}
    if chip == 90 and head_dim == 128:  # measured
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if head_dim == 64 or chip == 100 else 64, "num_warps": 4}


SIZES = ["heads", "tokens", "num_q_means", "num_k_means", "num_q_clusters"]


@triton.jit(do_not_specialize=["qk_scale_log2", *SIZES])
def _mass(
    q,
    batch_stride,
    head_stride,
    row_stride,
    sorted_idx,
    q_offsets,
    k_means,
    log2_sizes,
    out,
    qk_scale_log2,
    heads,
    tokens,
    num_q_means,
    num_k_means,
    num_q_clusters,
    MOST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Average, over MOST queries of one cluster, the softmax of each over key clusters."""
    q_cluster = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    begin = tl.load(q_offsets + batch_head * (num_q_clusters + 1) + q_cluster)
    end = tl.load(q_offsets + batch_head * (num_q_clusters + 1) + q_cluster + 1)
    out += (batch_head * num_q_means + q_cluster) * num_k_means
    k_means += batch_head * num_k_means * HEAD_DIM
    log2_sizes += batch_head * num_k_means
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    for start in range(0, num_k_means, BLOCK_N):
        mask_n = start + offs_n < num_k_means
        tl.store(out + start + offs_n, tl.zeros([BLOCK_N], tl.float32), mask=mask_n)
    size = end - begin
    count = tl.minimum(size, MOST)
    for start_m in range(0, count, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < count
        row = begin + offs_m.to(tl.int64) * size // count  # spread evenly
        q_idx = tl.load(sorted_idx + batch_head * tokens + row, mask=mask_m, other=0)
        q_idx = q_idx.to(tl.int64)
        # [BLOCK_M, BLOCK_D]
        q_base = q + batch * batch_stride + head * head_stride
        q_tile = load_tile(q_base, q_idx, tl.cast(row_stride, tl.int64), offs_d, mask_m, HEAD_DIM)
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, num_k_means, BLOCK_N):
            # [BLOCK_M, BLOCK_N]
            scores = _mean_scores(
                q_tile,
                k_means,
                log2_sizes,
                start,
                num_k_means,
                qk_scale_log2,
                offs_d,
                HEAD_DIM,
                BLOCK_N,
            )
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            l_i = l_i * tl.exp2(m_i - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
            m_i = m_new
        shift = tl.where(m_i == float("-inf"), 0.0, m_i)
        share = tl.where(mask_m, 1.0 / l_i, 0.0)
        for start in range(0, num_k_means, BLOCK_N):
            # [BLOCK_M, BLOCK_N]
            scores = _mean_scores(
                q_tile,
                k_means,
                log2_sizes,
                start,
                num_k_means,
                qk_scale_log2,
                offs_d,
                HEAD_DIM,
                BLOCK_N,
            )
            p = tl.exp2(scores - shift[:, None]) * share[:, None]
            mask_n = start + offs_n < num_k_means
            before = tl.load(out + start + offs_n, mask=mask_n, other=0.0)
            tl.store(out + start + offs_n, before + tl.sum(p, 0), mask=mask_n)
    tl.debug_barrier()
    count = tl.maximum(count, 1).to(tl.float32)
    for start in range(0, num_k_means, BLOCK_N):
        mask_n = start + offs_n < num_k_means
        mass = tl.load(out + start + offs_n, mask=mask_n, other=0.0)
        tl.store(out + start + offs_n, tl.log(mass / count), mask=mask_n)


@triton.jit
def _mean_scores(
    q_tile,
    k_means,
    log2_sizes,
    start,
    num_k_means,
    qk_scale_log2,
    offs_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return scores of a tile of queries and some key clusters, weighted by size, to base 2."""
    offs_n = start + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_k_means
    # [BLOCK_N]
    log2_size = tl.load(log2_sizes + offs_n, mask=mask_n, other=float("-inf"))
    # [BLOCK_D, BLOCK_N]
    k_tile = load_tile(k_means, offs_n, HEAD_DIM, offs_d, mask_n, HEAD_DIM, TRANSPOSED=True)
    return tl.dot(q_tile, k_tile, input_precision="ieee") * qk_scale_log2 + log2_size[None, :]
