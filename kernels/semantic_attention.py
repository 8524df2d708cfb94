"""The whole of semantic attention: cluster, sort, select, attend, put back.

Queries and keys are clustered, each on their own. Every query cluster then attends to the few key
clusters that hold most of its attention mass. Sorting by cluster makes those contiguous, and
sorting changes nothing else: attention does not know the order of its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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
    check_top_p,
    resolve,
)


@dataclass(frozen=True)
class SemanticConfig:
    """How to cluster and what to select.

    Attributes:
        query_clusters, key_clusters: number of clusters of the video tokens.
        top_p: attention mass that the selected key clusters of a query cluster exceed, in (0, 1].
        min_ratio: share of the key clusters that is selected at least, in [0, 1].
        iters: k-means rounds when there are centroids from an earlier call.
        init_iters: k-means rounds when there are none.
        recluster_every: calls between two clusterings; in between, labels are kept.
        reselect_every: calls between two selections. A new clustering always selects anew.
        per_query_mass: select by the mean over each query's own mass, not by query centroids.
        compensate: let each cluster that is not selected count as one key, its mean.
        query_metric: cluster keys by how far apart queries see them.
        int8_qk: scores from queries and keys in 8 bits.
        scale: factor on the scores, 1/sqrt(D) if left out.

    Raises:
        KernelError: a value is outside its range.
    """

    query_clusters: int
    key_clusters: int
    top_p: float = 0.9
    min_ratio: float = 0.10
    iters: int = 2
    init_iters: int = 10
    recluster_every: int = 1
    reselect_every: int = 1
    per_query_mass: bool = False
    compensate: bool = False
    query_metric: bool = False
    int8_qk: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        check_top_p(self.top_p, self.min_ratio)
        for name in ("query_clusters", "key_clusters", "recluster_every", "reselect_every"):
            if getattr(self, name) < 1:
                raise KernelError(f"{name} must be 1 or more, found {getattr(self, name)}")
        for name in ("iters", "init_iters"):
            if getattr(self, name) < 0:
                raise KernelError(f"{name} must be 0 or more, found {getattr(self, name)}")


@dataclass
class Clustering:
    """One side, queries or keys, sorted by cluster.

    Attributes:
        centroids: [B, H, K, D] fp32, in the metric that the tokens were clustered in.
        labels: [B, H, S] int32; K marks text, K + 1 padding.
        order: [B, H, S] int32, place -> token.
        offsets: [B, H, K + 1 or K + 3] int32.
    """

    centroids: Tensor
    labels: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def counts(self) -> Tensor:
        """[B, H, K or K + 2] int32, tokens per label."""
        return self.offsets.diff()


@dataclass
class SemanticState:
    """What one attention layer (and guidance branch) keeps from call to call.

    Attributes:
        calls: how often it was used since it was made or reset.
        query, key: the latest clustering.
        selection: the latest selection.
        lap: is told the name of each phase of a call as it ends; None: nobody asks.
    """

    calls: int = 0
    query: Clustering | None = None
    key: Clustering | None = None
    selection: Selection | None = None
    lap: Callable[[str], None] | None = None

    def ended(self, phase: str) -> None:
        """Tell whoever asks that a phase has ended."""
        if self.lap is not None:
            self.lap(phase)

    def reset(self) -> None:
        """Forget everything: the next call starts from tokens."""
        self.calls, self.query, self.key, self.selection = 0, None, None, None

    def cluster(
        self,
        q: Tensor,
        k: Tensor,
        config: SemanticConfig,
        *,
        video: tuple[int, int] | None = None,
        text_mask: Tensor | None = None,
        impl: Impl = "auto",
    ) -> None:
        """Cluster only, without attention: prepares centroids during dense steps.

        Takes what `semantic_attention` takes; nothing is selected and `calls` stays.
        """
        chosen = resolve(impl, q, k)
        video, text_mask = _text(q, video=video, text_mask=text_mask)
        if not fits(self, q, config):
            self.reset()
        if chosen == "triton":
            from vidaccel.kernels.fused import cluster

            cluster(q, k, self, config, video, text_mask)
        else:
            _cluster(q, k, self, config, video, text_mask)
        self.selection = None
        self.ended("clustering")

    def density(self) -> Tensor:
        """Computed share of all query-key pairs in the latest call: [B, H] fp32."""
        if self.selection is None or self.query is None or self.key is None:
            raise KernelError("nothing was selected yet")
        pairs = (self.selection.tokens.double() * self.query.offsets.diff().double()).sum(-1)
        return (pairs / (self.query.labels.shape[2] * self.key.labels.shape[2])).float()

    def empty_clusters(self) -> tuple[Tensor, Tensor]:
        """Query and key clusters without tokens in the latest clustering: [B, H] int64 each."""
        if self.query is None or self.key is None:
            raise KernelError("nothing was clustered yet")
        found = []
        for side in (self.query, self.key):
            found.append((side.counts[..., : side.centroids.shape[2]] == 0).sum(-1))
        return found[0], found[1]


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
        state: of this layer and branch; changed in place. A change of shape resets it.
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
    video, text_mask = _text(q, video=video, text_mask=text_mask)
    tokens = video[1] - video[0]
    check_clusters(config.query_clusters, tokens, "query")
    check_clusters(config.key_clusters, tokens, "key")
    if not fits(state, q, config):
        state.reset()
    if chosen == "triton":
        from vidaccel.kernels.fused import attend as fused_attend

        out = fused_attend(q, k, v, state, config, video, text_mask)
    else:
        out = _attend(q, k, v, state, config, video, text_mask)
    state.calls += 1
    return out


def _text(
    q: Tensor, video: tuple[int, int] | None = None, text_mask: Tensor | None = None
) -> tuple[tuple[int, int], Tensor | None]:
    """The checked range of the video tokens, and the text mask."""
    size = q.shape[2]
    first, last = video or (0, size)
    if not 0 <= first < last <= size:
        raise KernelError(f"the video tokens {first} to {last} do not lie within {size} tokens")
    rest = size - (last - first)
    if text_mask is not None and (
        text_mask.dtype != torch.bool or text_mask.shape != (q.shape[0], rest)
    ):
        raise KernelError(
            f"text_mask must be bool [{q.shape[0]}, {rest}], "
            f"found {text_mask.dtype} {list(text_mask.shape)}"
        )
    return (first, last), text_mask if rest else None


def fits(state: SemanticState, q: Tensor, config: SemanticConfig) -> bool:
    """Whether what the state holds belongs to tensors and cluster counts like these."""
    if state.query is None or state.key is None:
        return True
    batch, heads, size, width = q.shape
    return (
        state.query.centroids.shape == (batch, heads, config.query_clusters, width)
        and state.key.centroids.shape == (batch, heads, config.key_clusters, width)
        and state.query.labels.shape[2] == size
        and state.query.labels.device == q.device
    )


def _cluster(
    q: Tensor,
    k: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> None:
    """Cluster and sort both sides."""
    metric = None
    if config.query_metric:
        metric = reference.query_metric(q[:, :, slice(*video)])
    for side, x, count, factor in (
        ("query", q, config.query_clusters, None),
        ("key", k, config.key_clusters, metric),
    ):
        before: Clustering | None = getattr(state, side)
        x = x[:, :, slice(*video)]
        if factor is not None:
            x = (x.to(factor.dtype) @ factor).to(x.dtype)
        if before is None:
            start, iters = reference.initial_centroids(x, count), config.init_iters
        else:
            start, iters = before.centroids, config.iters
        centroids, labels, _ = reference.kmeans(x, start, iters)
        names = count
        if video != (0, q.shape[2]):
            names = count + 2
            labels = _with_text(labels, count, video, q.shape[2], text_mask)
        order, offsets = reference.sort_by_label(labels, names)
        setattr(state, side, Clustering(centroids, labels, order, offsets))


def _with_text(
    labels: Tensor, count: int, video: tuple[int, int], size: int, text_mask: Tensor | None
) -> Tensor:
    """Labels of all tokens: `count` for text and `count + 1` for padding around the video."""
    batch, heads, _ = labels.shape
    rest = torch.full((batch, size - (video[1] - video[0])), count, device=labels.device)
    if text_mask is not None:
        rest = torch.where(text_mask, count, count + 1)
    around = rest.int()[:, None, :].expand(batch, heads, -1)
    return torch.cat([around[..., : video[0]], labels, around[..., video[0] :]], -1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SemanticState,
    config: SemanticConfig,
    video: tuple[int, int],
    text_mask: Tensor | None,
) -> Tensor:
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[3])
    if state.key is None or state.calls % config.recluster_every == 0:
        _cluster(q, k, state, config, video, text_mask)
        state.selection = None
    query, key = state.query, state.key
    assert query is not None and key is not None
    columns = config.key_clusters
    k_means = v_means = None
    if state.selection is None or state.calls % config.reselect_every == 0 or config.compensate:
        k_means = reference.cluster_means(k, key.labels, columns)
    if config.compensate:
        v_means = reference.cluster_means(v, key.labels, columns)
    k, v = reference.permute(k, key.order), reference.permute(v, key.order)
    state.ended("clustering")
    if state.selection is None or state.calls % config.reselect_every == 0:
        state.selection = _select(q, query, key, k_means, config, scale, video)
    state.ended("selection")
    out, _ = reference.block_sparse_attention(
        q,
        k,
        v,
        query.offsets,
        key.offsets,
        state.selection,
        scale=scale,
        q_order=query.order,
        k_means=k_means if config.compensate else None,
        v_means=v_means,
        compensated_rows=config.query_clusters,
        int8_qk=config.int8_qk,
        shift_clusters=columns,
    )
    state.ended("attention")
    return out


def _select(
    q: Tensor,
    query: Clustering,
    key: Clustering,
    k_means: Tensor | None,
    config: SemanticConfig,
    scale: float,
    video: tuple[int, int],
) -> Selection:
    assert k_means is not None
    rows, columns = config.query_clusters, config.key_clusters
    counts = key.counts[..., :columns]
    mass = None
    q_means = reference.cluster_means(q, query.labels, rows)
    if config.per_query_mass:
        mass = reference.query_mass(q, query.labels, rows, k_means, counts, scale)
    selection = reference.select_top_p(
        q_means,
        k_means,
        counts,
        scale=scale,
        top_p=config.top_p,
        min_ratio=config.min_ratio,
        mass=mass,
    )
    if query.counts.shape[2] == rows:
        return selection
    return reference.selection_from_mask(with_text(selection.mask()), key.counts)


def with_text(mask: Tensor) -> Tensor:
    """A mask of video clusters, with a row and column more for text and for padding.

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


def with_top_p(config: SemanticConfig, top_p: float) -> SemanticConfig:
    """The same config at another share of mass."""
    return replace(config, top_p=top_p)
