"""Ways to make attention sparse that `vidaccel bench attention` measures.

SVG2 is compared with two ways to be as sparse without it: blocks of neighbouring tokens instead of
clusters, and clusters that are picked at random instead of by their attention mass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vidaccel.kernels import reference
from vidaccel.kernels.semantic_attention import semantic_attention
from vidaccel.kernels.state import Clustering, SemanticConfig, SemanticState
from vidaccel.svg2.settings import SVG2


def fixed_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int],
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stand in for `semantic_attention` with runs of neighbouring tokens as the clusters.

    Takes and returns [B, H, S, D], as `semantic_attention` does.
    """
    scale = config.scale or q.shape[3] ** -0.5
    sides = []
    for x, count in ((q, config.query_clusters), (k, config.key_clusters)):
        position = torch.arange(x.shape[2], device=x.device, dtype=torch.int32)
        labels = (position * count // x.shape[2]).expand(*x.shape[:3]).contiguous()
        means = reference.cluster_means(x, labels, count)
        sides.append(Clustering(means, labels, *reference.sort_by_label(labels, count)))
    state.query, state.key = sides
    state.selection = reference.select_top_p(
        state.query.centroids,
        state.key.centroids,
        state.key.counts,
        scale=scale,
        top_p=config.top_p,
        min_ratio=config.min_ratio,
    )
    return _attend(q, k, v, state, scale)


def random_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int],
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Stand in for `semantic_attention` with as many of its clusters, drawn at random.

    Takes and returns [B, H, S, D], as `semantic_attention` does.
    """
    semantic_attention(q, k, v, state, config, video=video)
    mask = state.selection.mask()
    draw = torch.rand(mask.shape, generator=torch.Generator().manual_seed(state.calls))
    rank = draw.to(mask.device).argsort(-1).argsort(-1)
    mask = rank < mask.sum(-1, keepdim=True)
    state.selection = reference.selection_from_mask(mask, state.key.counts)
    return _attend(q, k, v, state, config.scale or q.shape[3] ** -0.5)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: SemanticState, scale: float
) -> torch.Tensor:
    """Attend to the selected clusters; [B, H, S, D] in and out."""
    out: torch.Tensor = reference.block_sparse_attention(
        q,
        reference.permute(k, state.key.sorted_idx),
        reference.permute(v, state.key.sorted_idx),
        state.query.offsets,
        state.key.offsets,
        state.selection,
        scale=scale,
        q_order=state.query.sorted_idx,
    )[0]
    return out


@dataclass(frozen=True)
class SparseMethod:
    """One way to make attention sparse.

    Attributes:
        svg2: settings, but for top_p.
        attend: function that computes the attention.
        planned: steps are skipped too, and clips compared with dense ones of the same steps.
    """

    svg2: SVG2
    attend: Callable[..., torch.Tensor] = semantic_attention
    planned: bool = False


# As many clusters as leave a few tokens in each at the size of the embedded model.
BASE = SVG2(
    min_tokens=0,
    dense_layers=0,
    query_clusters=24,
    key_clusters=64,
    min_ratio=0.05,
    mass_averaging=False,
    compensation=False,
    query_metric=False,
)
BETTER = replace(BASE, mass_averaging=True, compensation=True)

# Measured over every density.
SPARSE_METHODS = {
    "svg2": SparseMethod(BASE),
    "mass averaging": SparseMethod(replace(BASE, mass_averaging=True)),
    "compensation": SparseMethod(replace(BASE, compensation=True)),
    "query metric": SparseMethod(replace(BASE, query_metric=True)),
    "averaging, compensation": SparseMethod(BETTER),
    "all three": SparseMethod(replace(BETTER, query_metric=True)),
    "int8 QK": SparseMethod(replace(BASE, int8_qk=True)),
    "averaging, compensation, int8 QK": SparseMethod(replace(BETTER, int8_qk=True)),
    "with a plan": SparseMethod(BETTER, planned=True),
    "with a plan, refresh at 0.95": SparseMethod(replace(BETTER, refresh_top_p=0.95), planned=True),
    "fixed blocks": SparseMethod(BASE, fixed_blocks),
    "random": SparseMethod(BASE, random_clusters),
}

# Measured at one top_p: one change of the settings each.
CHANGES: dict[str, dict[str, Any]] = {
    "as they are": {},
    "no k-means after the first": {"kmeans_iters": 0},
    "1 k-means iteration": {"kmeans_iters": 1},
    "5 k-means iterations": {"kmeans_iters": 5},
    "50 first iterations": {"init_iters": 50},
    "cluster while dense": {"cluster_while_dense": True},
    "cluster every 2nd": {"recluster_every": 2},
    "cluster every 4th": {"recluster_every": 4},
    "cluster and select every 2nd": {"recluster_every": 2, "reselect_every": 2},
    "cluster and select every 4th": {"recluster_every": 4, "reselect_every": 4},
    "12 query clusters": {"query_clusters": 12},
    "48 query clusters": {"query_clusters": 48},
    "32 key clusters": {"key_clusters": 32},
    "128 key clusters": {"key_clusters": 128},
    "no dense steps": {"dense_steps": 0},
    "dense first layer": {"dense_layers": 1},
}
