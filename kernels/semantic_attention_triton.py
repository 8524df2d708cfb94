"""Semantic attention in Triton: at most 12 launches for two rounds of k-means and all the rest.

One launch prepares the centroids; each round takes four (assign, scan, rank, update), for queries
and keys together; the last update also writes keys and values in sorted order and their means;
two select and list what is selected; one attends. With `query_metric` keys are clustered in another
metric than they are attended to, so that one launch more gathers them. With `int8_qk` the last
update writes the keys in 8 bits: no launch more, and D - 4 bytes a key less memory than in 16 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.block_lists import fill_block_lists
from vidaccel.kernels.block_sparse_attention import ClusterMeans, attend, empty_block_lists
from vidaccel.kernels.common import rows_contiguous
from vidaccel.kernels.kmeans import Lloyd, SortedKeys, cluster_means
from vidaccel.kernels.query_mass import query_mass_logits
from vidaccel.kernels.select import select
from vidaccel.kernels.state import Clustering, SemanticConfig, SemanticState


def semantic_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> Tensor:
    """Run `semantic_attention`, whose arguments these are, checked."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, tokens, head_dim = q.shape
    num_means = config.key_clusters
    scale = config.scale if config.scale is not None else 1 / math.sqrt(head_dim)
    target = SortedKeys.empty(k, v, num_means, int8=config.int8_qk)
    lloyd = None
    if state.key is None or state.calls % config.recluster_every == 0:
        lloyd = cluster_triton(q, k, state, config, video, text_mask, target)
        state.selection = None
    query, key = state.query, state.key
    assert query is not None and key is not None
    if lloyd is None or config.query_metric:
        shape = (batch, heads, num_means, head_dim)
        k_means = torch.empty(shape, dtype=torch.float32, device=q.device)
        cluster_means(k, key.sorted_idx, key.offsets, k_means, target)
    else:
        k_means = lloyd.side_centroids(1)
    state.end_phase("clustering")

    lists = empty_block_lists(
        q,
        tokens,
        query.offsets.shape[2] - 1,
        key.offsets.shape[2] - 1,
        num_means=num_means if config.compensation else None,
        int8_qk=config.int8_qk,
    )
    if state.selection is None or state.calls % config.reselect_every == 0:
        if lloyd is None:
            q_means = query.centroids.float().contiguous().clone()
            cluster_means(q, query.sorted_idx, query.offsets, q_means)
        else:
            q_means = lloyd.side_centroids(0)
        logits = None
        if config.mass_averaging:
            logits = query_mass_logits(
                q,
                query.sorted_idx,
                query.offsets,
                target.k_means,
                target.log2_sizes,
                config.query_clusters,
                scale,
            )
        state.selection = select(
            q_means,
            k_means,
            key.offsets,
            query.offsets.shape[2] - 1,
            scale=scale,
            top_p=config.top_p,
            min_ratio=config.min_ratio,
            logits=logits,
            lists=lists,
            q_offsets=query.offsets,
        )
    else:
        fill_block_lists(lists, state.selection, query.offsets, key.offsets, config.query_clusters)
    state.end_phase("selection")
    out, _ = attend(
        q,
        target.k_sorted,
        target.v_sorted,
        query.offsets,
        key.offsets,
        lists,
        scale=scale,
        sorted_idx=query.sorted_idx,
        means=ClusterMeans(target.k_means, target.v_means, config.query_clusters)
        if config.compensation
        else None,
    )
    state.end_phase("attention")
    return out


def cluster_triton(
    q: Tensor,
    k: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
    target: SortedKeys | None = None,
) -> Lloyd:
    """Cluster both sides into the state; the last round writes keys and values to a target."""
    xs = [q, k]
    tokens = slice(*video)
    if config.query_metric:
        factor = reference.query_metric(q[:, :, tokens])
        xs[1] = (k.to(factor.dtype) @ factor).to(k.dtype)
        target = None
    counts = (config.query_clusters, config.key_clusters)
    if state.query is None or state.key is None:
        sides = zip(xs, counts, strict=True)
        start = [reference.initial_centroids(x[:, :, tokens], count) for x, count in sides]
        iters = config.init_iters
    else:
        start, iters = [state.query.centroids, state.key.centroids], config.kmeans_iters
    mask = None if text_mask is None else text_mask.to(torch.uint8).contiguous()
    lloyd = Lloyd.start(xs, start, video, mask)
    rounds = max(iters, 1)
    for turn in range(rounds):
        lloyd.assign()
        if turn == rounds - 1 and target is not None:
            lloyd.update_and_sort(target)
        else:
            lloyd.update()
    found = lloyd.sorted_labels
    state.query, state.key = (
        Clustering(
            # Without a round the centroids stay; the means are those of the tokens all the same.
            lloyd.side_centroids(side) if iters else start[side],
            found.side_labels(side),
            found.side_sorted_idx(side),
            found.side_offsets(side),
        )
        for side in (0, 1)
    )
    return lloyd
