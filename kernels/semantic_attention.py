"""The whole of semantic attention: cluster, sort, select, attend, put back.

Queries and keys are clustered, each on their own. Every query cluster then attends to the few key
clusters that hold most of its attention mass. Sorting by cluster makes those contiguous, and
sorting changes nothing else: attention does not know the order of its keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidaccel.kernels import reference
from vidaccel.kernels.common import (
    Impl,
    KernelError,
    Selection,
    check_clusters,
    check_layout,
    check_like,
    resolve,
)
from vidaccel.kernels.state import Clustering, SemanticConfig, SemanticState


def semantic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int] | None = None,
    text_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Self-attention in which each cluster of queries sees the key clusters that matter to it.

    Text beside the video is never clustered: every query sees all text, and text sees everything.
    Padding sees padding alone, and nothing else sees it.

    Args:
        q, k, v: [B, H, S, D], after norms and rotary embedding.
        state: what this layer and branch keeps; changed in place. A change of shape resets it.
        config: how to cluster and what to select.
        video: first and last + 1 of the video tokens; all tokens if left out.
        text_mask: [B, S - video] bool, true for text and false for padding, in the order of the
            tokens that are not video; all are text if left out.
        impl: "triton" on a GPU, "reference" elsewhere, or "auto".

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        KernelError: bad input, such as more clusters than tokens.
    """
    chosen = resolve(impl, q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_layout(name, x, reference=chosen == "reference")
        check_like(name, x, "q", q, 0, 1, 2, 3)
        if x.dtype != q.dtype:
            raise KernelError(f"{name} has dtype {x.dtype}, but q {q.dtype}")
    video, text_mask = _checked_text(q, video, text_mask)
    tokens = video[1] - video[0]
    check_clusters(config.query_clusters, tokens, "query")
    check_clusters(config.key_clusters, tokens, "key")
    if not state.fits(q, config):
        state.reset()
    if chosen == "triton":
        # Triton need not be there for the reference.
        from vidaccel.kernels.semantic_attention_triton import semantic_attention_triton

        out = semantic_attention_triton(q, k, v, state, config, video, text_mask)
    else:
        out = _semantic_attention_reference(q, k, v, state, config, video, text_mask)
    state.calls += 1
    return out


def cluster_tokens(
    q: Tensor,
    k: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int] | None = None,
    text_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Cluster only, without attention: prepares centroids during dense steps.

    Takes what `semantic_attention` takes; nothing is selected and `state.calls` stays.
    """
    chosen = resolve(impl, q, k)
    video, text_mask = _checked_text(q, video, text_mask)
    if not state.fits(q, config):
        state.reset()
    if chosen == "triton":
        from vidaccel.kernels.semantic_attention_triton import cluster_triton

        cluster_triton(q, k, state, config, video, text_mask)
    else:
        _cluster_reference(q, k, state, config, video, text_mask)
    state.selection = None
    state.end_phase("clustering")


def _checked_text(
    q: Tensor, video: tuple[int, int] | None, text_mask: Tensor | None
) -> tuple[tuple[int, int], Tensor | None]:
    """Return the checked range of the video tokens, and the text mask."""
    tokens = q.shape[2]
    first, last = video or (0, tokens)
    if not 0 <= first < last <= tokens:
        raise KernelError(f"the video tokens {first} to {last} do not lie within {tokens} tokens")
    num_text = tokens - (last - first)
    if text_mask is not None and (
        text_mask.dtype != torch.bool or text_mask.shape != (q.shape[0], num_text)
    ):
        raise KernelError(
            f"text_mask must be bool [{q.shape[0]}, {num_text}], "
            f"found {text_mask.dtype} {list(text_mask.shape)}"
        )
    return (first, last), text_mask if num_text else None


def _semantic_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> Tensor:
    """Run `semantic_attention` in torch: the twin of semantic_attention_triton.py."""
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[3])
    if state.key is None or state.calls % config.recluster_every == 0:
        _cluster_reference(q, k, state, config, video, text_mask)
        state.selection = None
    query, key = state.query, state.key
    assert query is not None and key is not None
    selects = state.selection is None or state.calls % config.reselect_every == 0
    k_means = v_means = None
    if selects or config.compensation:
        k_means = reference.cluster_means(k, key.labels, config.key_clusters)
    if config.compensation:
        v_means = reference.cluster_means(v, key.labels, config.key_clusters)
    k, v = reference.permute(k, key.sorted_idx), reference.permute(v, key.sorted_idx)
    state.end_phase("clustering")
    if selects:
        assert k_means is not None
        state.selection = _select_reference(q, query, key, k_means, config, scale)
    assert state.selection is not None
    state.end_phase("selection")
    out, _ = reference.block_sparse_attention(
        q,
        k,
        v,
        query.offsets,
        key.offsets,
        state.selection,
        scale=scale,
        q_order=query.sorted_idx,
        k_means=k_means if config.compensation else None,
        v_means=v_means,
        compensated_rows=config.query_clusters,
        int8_qk=config.int8_qk,
        shift_clusters=config.key_clusters,
    )
    state.end_phase("attention")
    return out


@torch.no_grad()
def _cluster_reference(
    q: Tensor,
    k: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> None:
    """Cluster and sort both sides."""
    q_video, k_video = q[:, :, slice(*video)], k[:, :, slice(*video)]
    if config.query_metric:
        factor = reference.query_metric(q_video)
        k_video = (k_video.to(factor.dtype) @ factor).to(k_video.dtype)
    found = []
    for before, x, count in (
        (state.query, q_video, config.query_clusters),
        (state.key, k_video, config.key_clusters),
    ):
        if before is None:
            start, iters = reference.initial_centroids(x, count), config.init_iters
        else:
            start, iters = before.centroids, config.kmeans_iters
        centroids, labels, _ = reference.kmeans(x, start, iters)
        num_labels = count
        if video != (0, q.shape[2]):
            num_labels = count + 2
            labels = _label_text(labels, count, video, q.shape[2], text_mask)
        sorted_idx, offsets = reference.sort_by_label(labels, num_labels)
        found.append(Clustering(centroids, labels, sorted_idx, offsets))
    state.query, state.key = found


def _label_text(
    labels: Tensor, count: int, video: tuple[int, int], tokens: int, text_mask: Tensor | None
) -> Tensor:
    """Return the labels of all tokens: `count` for text and `count + 1` for padding."""
    batch, heads, _ = labels.shape
    rest = torch.full((batch, tokens - (video[1] - video[0])), count, device=labels.device)
    if text_mask is not None:
        rest = torch.where(text_mask, count, count + 1)
    around = rest.int()[:, None, :].expand(batch, heads, -1)
    return torch.cat([around[..., : video[0]], labels, around[..., video[0] :]], -1)


@torch.no_grad()
def _select_reference(
    q: Tensor,
    query: Clustering,
    key: Clustering,
    k_means: Tensor,
    config: SemanticConfig,
    scale: float,
) -> Selection:
    """Select key clusters of the video, and add text and padding."""
    num_q_means = config.query_clusters
    counts = key.counts[..., : config.key_clusters]
    mass = None
    q_means = reference.cluster_means(q, query.labels, num_q_means, query.centroids)
    if config.mass_averaging:
        mass = reference.query_mass(q, query.labels, num_q_means, k_means, counts, scale)
    selection = reference.select_top_p(
        q_means,
        k_means,
        counts,
        scale=scale,
        top_p=config.top_p,
        min_ratio=config.min_ratio,
        mass=mass,
    )
    if query.counts.shape[2] == num_q_means:
        return selection
    return reference.selection_from_mask(_mask_with_text(selection.mask()), key.counts)


def _mask_with_text(mask: Tensor) -> Tensor:
    """Return a mask of video clusters with a row and column more for text and for padding.

    Args:
        mask: [B, H, Qc, Kc].

    Returns:
        [B, H, Qc + 2, Kc + 2]: all rows but the last see text, text sees all but padding, and
        padding sees padding alone.
    """
    wide = torch.nn.functional.pad(mask, (0, 2, 0, 2))
    wide[:, :, :-1, -2] = True
    wide[:, :, -2, :-1] = True
    wide[:, :, -1, -1] = True
    return wide
