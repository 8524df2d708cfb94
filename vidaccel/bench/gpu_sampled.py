"""Semantic attention at real sizes, held against float64 on sampled rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.kernel_checks import CheckError
from vidaccel.kernels import reference
from vidaccel.kernels.state import Clustering, SemanticConfig, SemanticState

_CLUSTERS = 4  # whose mean is added up again, of a head


def check_sampled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SemanticConfig,
    *,
    rows: int = 16,
    heads: int = 8,
) -> dict[str, dict[str, float]]:
    """Run semantic attention, and hold what it gives against float64.

    Args:
        q, k, v: [B, H, S, D], all of it video.
        config: its settings.
        rows: sampled queries of a head.
        heads: sampled heads.

    Returns:
        The name of each check -> its "error" and "limit".

    Raises:
        CheckError: an error is over its limit.
    """
    from vidaccel.kernels.semantic_attention import semantic_attention

    state = SemanticState()
    out = semantic_attention(q, k, v, state, config, impl="triton")
    query, key = state.query, state.key
    assert query is not None and key is not None and state.selection is not None
    found: dict[str, dict[str, float]] = {}
    for name, side, x in (("queries", query, q), ("keys", key, k)):
        _note(found, f"order of the {name}", _misplaced(side), 0.0)
        if not config.query_metric or name == "queries":
            _note(found, f"means of the {name}", _wrong_means(side, x), 1e-3)
    mask = state.selection.mask()
    batch, num_heads, tokens, _ = q.shape
    picked = spread(tokens, rows).to(q.device)
    flat = spread(batch * num_heads, heads)
    errors = []
    for batch_head in flat.tolist():
        place = divmod(batch_head, num_heads)
        wide = _exact(q, k, v, query, key, mask, place, picked, config)
        errors.append(float((out[place][picked].double() - wide).norm() / wide.norm()))
    limit = 3e-2 if config.int8_qk or config.compensation else 1e-2
    _note(found, "output of sampled queries", max(errors), limit)
    _note(found, "numbers that are not finite", float((~out.isfinite()).sum()), 0.0)
    return found


def spread(count: int, most: int) -> Tensor:
    """Return at most so many places of [0, count), spread evenly: int64, ascending."""
    taken = min(count, most)
    return torch.arange(taken) * (count - 1) // max(taken - 1, 1)


def _note(found: dict[str, dict[str, float]], name: str, error: float, limit: float) -> None:
    """Keep an error; raises CheckError where it is over its limit."""
    found[name] = {"error": error, "limit": limit}
    if not error <= limit:
        raise CheckError(f"{name}: error {error:.2e}, at most {limit:.2e} allowed")


def _misplaced(side: Clustering) -> float:
    """Count what of the sorted order is not as it must be."""
    tokens = side.labels.shape[2]
    every = torch.arange(tokens, device=side.labels.device, dtype=torch.int32)
    lost = (side.sorted_idx.sort(-1).values != every).sum()
    labels = side.labels.gather(2, side.sorted_idx.long())
    falling = (labels.diff(dim=-1) < 0).sum()
    bounds = torch.arange(side.offsets.shape[2], device=labels.device, dtype=torch.int32)
    bounds = bounds.expand(*labels.shape[:2], -1).contiguous()
    begins = torch.searchsorted(labels.contiguous(), bounds)
    return float(lost + falling + (begins != side.offsets).sum())


def _wrong_means(side: Clustering, x: Tensor) -> float:
    """Return the largest error of the means of some clusters, of the first and last head."""
    largest = 0.0
    heads, count = x.shape[1], side.centroids.shape[2]
    for head in {0, heads - 1}:
        for cluster in spread(count, _CLUSTERS).tolist():
            own = x[-1, head][side.labels[-1, head] == cluster].double()
            if len(own):
                mean = side.centroids[-1, head, cluster].double()
                largest = max(largest, float((own.mean(0) - mean).abs().max()))
    return largest


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Clustering,
    key: Clustering,
    mask: Tensor,
    place: tuple[int, ...],
    rows: Tensor,
    config: SemanticConfig,
) -> Tensor:
    """Return the output of some queries of one batch item and head, in float64: [R, D]."""
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[3])
    selected = mask[place][query.labels[place][rows].long()]  # [R, Kc]
    scores = q[place][rows].double() @ k[place].double().T * scale
    scores = scores.masked_fill(~selected[:, key.labels[place].long()], -math.inf)
    values = v[place].double()
    if config.compensation:
        part: Any = (slice(place[0], place[0] + 1), slice(place[1], place[1] + 1))
        means = [
            reference.cluster_means(x[part], key.labels[part], config.key_clusters)[0, 0]
            for x in (k, v)
        ]
        k_means, v_means = (x.to(q.dtype).double() for x in means)
        sizes = key.counts[place]
        extra = q[place][rows].double() @ k_means.T * scale + sizes.double().clamp(min=1).log()
        extra = extra.masked_fill(selected | (sizes == 0), -math.inf)
        scores, values = torch.cat([scores, extra], -1), torch.cat([values, v_means])
    return scores.softmax(-1) @ values
