"""The torch twin of every kernel: the specification, the CPU path and the oracle of the tests.

Everything is accumulated in float32, or in float64 where float64 comes in. Nothing here is tuned
for a GPU; all of it is vectorised, so that short sequences are quick on a CPU.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from vidaccel.kernels.common import (
    KernelError,
    Selection,
    check_clusters,
    check_integers,
    check_layout,
    check_like,
    check_top_p,
)

_CHUNK = 1 << 24  # scores held at a time
SAMPLES = 64  # keys whose mean stands for the mean of all
MASS_QUERIES = 512  # of a cluster, whose attention mass stands for that of all
LEAST = 1e-30  # a row without a larger element is rounded to zeros
SCALE_FORMATS = ("float32", "ue8m0", "e4m3")
E4M3_LEAST, E4M3_MOST = 2.0**-9, 448.0
_ROOT_HALF = math.sqrt(0.5)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initial_centroids(x: Tensor, count: int) -> Tensor:
    """Different tokens, one from each of `count` equal stretches, as the first centroids.

    The place within its stretch follows the golden ratio, so that the choice is spread evenly,
    is the same in every run, and is not in step with the rows of a frame.

    Args:
        x: [B, H, S, D].
        count: number of centroids, at most S.

    Returns:
        [B, H, count, D] in fp32 (or float64).
    """
    check_clusters(count, x.shape[2], "k-means")
    step = torch.arange(count + 1, device=x.device) * x.shape[2] // count
    jitter = torch.arange(count, device=x.device, dtype=torch.float64) * 0.6180339887498949 % 1
    chosen = step[:-1] + (jitter * (step[1:] - step[:-1])).long()
    return x.index_select(2, chosen).to(_accumulator(x))


def kmeans(x: Tensor, centroids: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm with squared Euclidean distance, for every batch item and head alone.

    A round assigns every token to its nearest centroid (the lowest index among equals), then
    moves every centroid to the mean of its tokens; one without tokens stays where it is. The
    labels and counts returned are those of the last round, before its move. Zero rounds assign
    only. Assignment compares with centroids rounded to the dtype of `x`, as the tensor cores do.
    A distance that is NaN counts as infinite, and a token that is near nothing gets label 0.

    Args:
        x: [B, H, S, D].
        centroids: [B, H, K, D] to start from.
        iters: number of rounds, 0 or more.

    Returns:
        centroids [B, H, K, D] fp32 (or float64), labels [B, H, S] int32, counts [B, H, K] int32.

    Raises:
        KernelError: the shapes do not fit, or there are more centroids than tokens.
    """
    check_layout("x", x, reference=True)
    check_layout("centroids", centroids, reference=True)
    check_like("centroids", centroids, "x", x, 0, 1, 3)
    check_clusters(centroids.shape[2], x.shape[2], "k-means")
    if iters < 0:
        raise KernelError(f"the number of k-means rounds must be 0 or more, found {iters}")
    tokens = x.to(_accumulator(x))
    centroids = centroids.to(tokens.dtype)
    count = centroids.shape[2]
    labels = _nearest(tokens, centroids.to(x.dtype).to(tokens.dtype))
    for turn in range(iters):
        if turn > 0:
            labels = _nearest(tokens, centroids.to(x.dtype).to(tokens.dtype))
        centroids = cluster_means(x, labels, count, centroids)
    return centroids, labels, cluster_counts(labels, count)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    half = centroids.square().sum(-1) / 2
    distance = half[:, :, None, :] - x @ centroids.transpose(-1, -2)
    return torch.where(distance.isnan(), math.inf, distance).argmin(-1).int()


def cluster_counts(labels: Tensor, count: int) -> Tensor:
    """Tokens per label: [B, H, S] int32 -> [B, H, count] int32."""
    counts = torch.zeros(*labels.shape[:2], count, dtype=torch.int32, device=labels.device)
    return counts.scatter_add_(2, labels.long(), torch.ones_like(labels))


def cluster_means(x: Tensor, labels: Tensor, count: int, empty: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each label; of one without tokens the row of `empty`, else zeros.

    Args:
        x: [B, H, S, D].
        labels: [B, H, S] int32; labels of `count` and above are left out.
        count: number of labels.
        empty: [B, H, count, D].

    Returns:
        [B, H, count, D] in fp32 (or float64).
    """
    tokens = x.to(_accumulator(x))
    top = max(count, int(labels.max()) + 1)
    index = labels.long()
    sums = torch.zeros(*x.shape[:2], top, x.shape[3], dtype=tokens.dtype, device=x.device)
    sums.scatter_add_(2, index[..., None].expand_as(tokens), tokens)
    counts = cluster_counts(labels, top)[..., :count, None]
    means = sums[:, :, :count] / counts.clamp(min=1)
    return means if empty is None else torch.where(counts > 0, means, empty.to(means.dtype))


def sort_by_label(labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """The stable order that puts equal labels together, and where each label begins.

    Args:
        labels: [B, H, S] int32, each in [0, num_labels).
        num_labels: number of labels, K.

    Returns:
        order [B, H, S] int32 (place -> token), offsets [B, H, K + 1] int32.
    """
    check_integers("labels", labels, 3)
    order = torch.sort(labels, dim=-1, stable=True).indices.int()
    ends = cluster_counts(labels, num_labels).cumsum(-1).int()
    return order, pad(ends, (1, 0))


def permute(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x [B, H, S, D] in the given order [B, H, S] int32."""
    check_like("order", order, "x", x, 0, 1, 2)
    return x.gather(2, order.long()[..., None].expand(*order.shape, x.shape[3]))


def unpermute(y: Tensor, order: Tensor) -> Tensor:
    """Undo `permute` with the same order: the rows of y [B, H, S, D] back in their places."""
    check_like("order", order, "y", y, 0, 1, 2)
    index = order.long()[..., None].expand_as(y)
    return torch.empty_like(y, memory_format=torch.contiguous_format).scatter_(2, index, y)


def query_mass(
    q: Tensor, q_labels: Tensor, num_queries: int, k_means: Tensor, k_counts: Tensor, scale: float
) -> Tensor:
    """Attention mass on each key cluster, averaged over the queries of a cluster.

    Every query spreads its own softmax over the key clusters (a key is approximated by the mean
    of its cluster), and the mean over a query cluster says more than the softmax of its centroid.
    Of a cluster of more than MASS_QUERIES so many are looked at, spread evenly over its sorted
    order: their mean is as good, and a cluster of half a video takes no longer than others.

    Args:
        q: [B, H, Sq, D].
        q_labels: [B, H, Sq] int32; labels of `num_queries` and above are left out.
        num_queries: number of query clusters, Qc.
        k_means: [B, H, Kc, D].
        k_counts: [B, H, Kc] int32.
        scale: factor on the scores.

    Returns:
        [B, H, Qc, Kc] in fp32 (or float64); a row sums to 1, that of an empty cluster to 0.
    """
    logits = _cluster_logits(q, k_means, k_counts, scale)
    return cluster_means(logits.softmax(-1), _sampled(q_labels, num_queries), num_queries)


def _sampled(labels: Tensor, num_labels: int) -> Tensor:
    """Labels that MASS_QUERIES tokens of each larger cluster keep; the others get `num_labels`."""
    labels = labels.clamp(max=num_labels)
    order, offsets = sort_by_label(labels, num_labels + 1)
    place = torch.empty_like(order).scatter_(
        2, order.long(), torch.arange(order.shape[2], device=order.device).int().expand_as(order)
    )
    rank = (place - offsets.gather(2, labels.long())).long()
    count = offsets.diff().gather(2, labels.long()).long()
    taken = count.clamp(max=MASS_QUERIES)
    nearest = (rank * taken + count - 1) // count  # the only one of those taken that can be it
    is_taken = (nearest < taken) & (nearest * count // taken == rank)
    return torch.where(is_taken, labels, num_labels)


def _cluster_logits(q: Tensor, k_means: Tensor, k_counts: Tensor, scale: float) -> Tensor:
    """Score of each query row and key cluster, weighted by the size of the cluster."""
    kind = torch.promote_types(_accumulator(q), _accumulator(k_means))
    scores = q.to(kind) @ k_means.to(kind).transpose(-1, -2) * scale
    size = k_counts.to(kind)[:, :, None, :]
    return torch.where(size > 0, scores + size.log(), -math.inf)


def select_top_p(
    q_centroids: Tensor,
    k_centroids: Tensor,
    k_counts: Tensor,
    *,
    scale: float,
    top_p: float,
    min_ratio: float,
    mass: Tensor | None = None,
) -> Selection:
    """For each query cluster, the fewest key clusters whose mass exceeds `top_p`.

    The mass of key cluster j is proportional to count_j * exp(scale * q_centroid . k_centroid_j).
    Clusters are taken from the heaviest down, up to and including the one with which their sum
    first exceeds `top_p`, and never fewer than `floor(min_ratio * Kc)`; those as heavy as the last
    one taken come along. An empty cluster is never taken, except that `top_p` 1 takes all.
    A row that scores NaN or infinity with a cluster that has keys takes all, so that its output is
    that of dense attention, with NaN where that has it. In `mass`, which comes from each query's
    own softmax, NaN alone says so: there a key at -inf weighs nothing and one at +inf makes NaN.

    Args:
        q_centroids: [B, H, Qc, D].
        k_centroids: [B, H, Kc, D].
        k_counts: [B, H, Kc] int32.
        scale: factor on the scores, 1/sqrt(D) as a rule.
        top_p: in (0, 1].
        min_ratio: in [0, 1].
        mass: [B, H, Qc, Kc] from `query_mass`, to take instead of the mass above.

    Raises:
        KernelError: the shapes do not fit, or a share is outside its range.
    """
    check_top_p(top_p, min_ratio)
    check_like("k_centroids", k_centroids, "q_centroids", q_centroids, 0, 1, 3)
    check_like("k_counts", k_counts, "k_centroids", k_centroids, 0, 1, 2)
    if mass is None:
        logits = _cluster_logits(q_centroids, k_centroids, k_counts, scale)
        odd = ~logits.isfinite() & (k_counts[:, :, None, :] > 0)
    else:
        logits = torch.where(k_counts[:, :, None, :] > 0, mass.log(), -math.inf)
        odd = logits.isnan()
    columns = logits.shape[-1]
    if top_p >= 1:
        keep = torch.ones_like(logits, dtype=torch.bool)
    else:
        heavy, _ = logits.sort(-1, descending=True)
        summed = heavy.softmax(-1).cumsum(-1)
        taken = ((summed <= top_p).sum(-1) + 1).clamp(max=columns)
        taken = taken.clamp(min=max(1, math.floor(min_ratio * columns)))
        least = heavy.gather(-1, taken[..., None] - 1)
        keep = (logits >= least) & (logits > -math.inf)
        keep |= odd.any(-1, keepdim=True)
    return selection_from_mask(keep, k_counts)


def selection_from_mask(mask: Tensor, k_counts: Tensor) -> Selection:
    """The lists of a dense [B, H, Qc, Kc] boolean mask.

    Args:
        mask: [B, H, Qc, Kc].
        k_counts: [B, H, Kc] int32.
    """
    batch, heads, rows, columns = mask.shape
    flat = mask.reshape(batch, heads, rows * columns)
    indptr = pad(mask.sum(-1).cumsum(-1), (1, 0)).int()
    place = torch.where(flat, flat.cumsum(-1) - 1, rows * columns)
    column = torch.arange(columns, dtype=torch.int32, device=mask.device).repeat(rows)
    indices = torch.full(
        (batch, heads, rows * columns + 1), -1, dtype=torch.int32, device=mask.device
    )
    indices.scatter_(2, place, column.expand(batch, heads, -1))
    tokens = (mask * k_counts[:, :, None, :]).sum(-1).int()
    return Selection(indptr, indices[..., :-1].contiguous(), tokens)


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
) -> tuple[Tensor, Tensor]:
    """Attention of each query cluster to its selected key clusters only.

    With `k_means` and `v_means`, the clusters that are not selected still count, each as one key:
    the mean of its keys, weighted by its size, with the mean of its values.

    With `int8_qk` the scores are those of rounded queries and keys: `to_int8` of each query and of
    each key less `key_shift`. Weights, values and the means of clusters are as exact as without,
    and lse is that of the keys themselves. A query or a key that holds NaN or infinity makes NaN
    of what sees it.

    Args:
        q: [B, H, Sq, D], sorted by cluster; with `q_order`, in its own order.
        k, v: [B, H, Sk, D], sorted by cluster.
        q_offsets: [B, H, Qc + 1] int32, where each query cluster begins; the last is its end.
        k_offsets: [B, H, Kc + 1] int32.
        selection: rows for Qc query clusters, columns for Kc key clusters.
        scale: factor on the scores.
        q_order: [B, H, Sq] int32, place -> token; out and lse then have the order of q.
        k_means, v_means: [B, H, M, D], for the first M of the Kc clusters.
        compensated_rows: only the first so many query clusters use the means; all if left out.
        int8_qk: round queries and keys to 8 bits.
        shift_clusters: only the first so many key clusters are sampled for the shift, so that it
            does not depend on others, such as padding; all if left out.

    Returns:
        out [B, H, Sq, D] in the dtype of q, lse [B, H, Sq] fp32 (or float64). A query that nothing
        is selected for has out 0 and lse -inf.

    Raises:
        KernelError: the shapes do not fit.
    """
    check_attention(q, k, v, q_offsets, k_offsets, selection, k_means, v_means, reference=True)
    if q_order is not None:
        out, lse = block_sparse_attention(
            permute(q, q_order),
            k,
            v,
            q_offsets,
            k_offsets,
            selection,
            scale=scale,
            k_means=k_means,
            v_means=v_means,
            compensated_rows=compensated_rows,
            int8_qk=int8_qk,
            shift_clusters=shift_clusters,
        )
        return unpermute(out, q_order), unpermute(lse[..., None], q_order)[..., 0]
    kind = _accumulator(q)
    mask = selection.mask()
    q_label = _labels_of(q_offsets, q.shape[2])
    k_label = _labels_of(k_offsets, k.shape[2])
    # What is added to a score, by query cluster and key: 0, or -inf where it is hidden.
    bias = torch.where(mask, 0.0, -math.inf).to(kind)
    bias = bias.gather(3, k_label[:, :, None, :].expand(*mask.shape[:3], -1))
    queries, keys, values = q.to(kind), k.to(kind), v.to(kind)
    if int8_qk:
        # Side by side: rounded queries meet rounded keys, queries meet the shift and the means.
        shift = key_shift(k, k_offsets, shift_clusters)[:, :, None]
        queries = torch.cat([_rounded(queries), queries], -1)
        keys = torch.cat([_rounded(keys - shift), shift.expand_as(keys)], -1)
    keys = keys.transpose(-1, -2)
    if k_means is not None and v_means is not None:
        count = k_means.shape[2]
        sizes = k_offsets.diff()[..., None, :count]
        use = ~mask[..., :count] & (sizes > 0)
        use[:, :, compensated_rows:] &= compensated_rows is None
        bias = torch.cat([bias, torch.where(use, sizes.to(kind).log(), -math.inf)], -1)
        means = pad(k_means.to(kind), (queries.shape[3] - k_means.shape[3], 0))
        keys = torch.cat([keys, means.transpose(-1, -2)], -1)
        values = torch.cat([values, v_means.to(kind)], 2)
    hostile = not bool(values.isfinite().all() & keys.isfinite().all())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=kind, device=q.device)
    step = max(1, _CHUNK // (q.shape[0] * q.shape[1] * keys.shape[3]))
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        label = q_label[:, :, rows, None]
        added = bias.gather(2, label.expand(*label.shape[:3], keys.shape[3]))
        scores = (queries[:, :, rows] * scale) @ keys
        if hostile:  # hidden NaN and infinity must not show
            scores.masked_fill_(added == -math.inf, 0.0)
        scores += added
        top = scores.detach().amax(-1, keepdim=True)  # shifts both sides alike: no gradient
        top = torch.where(top == -math.inf, 0.0, top)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[:, :, rows] = (total.log() + top)[..., 0]
        mixed = (weights @ values) / torch.where(total == 0, 1.0, total)
        if hostile:
            hidden = ~values.isfinite()
            mixed = (weights @ values.masked_fill(hidden, 0.0)) / total
            reached = (added > -math.inf).to(kind) @ hidden.to(kind) > 0
            mixed = torch.where(reached, math.nan, torch.where(total == 0, 0.0, mixed))
        out[:, :, rows] = mixed.to(q.dtype)
    return out, lse


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as whole numbers from -127 to 127 and what one of them stands for.

    The scale of a row is its largest size over 127; numbers are rounded to the nearest, halves
    up. A row that holds NaN or infinity has the scale NaN.

    Args:
        x: [..., D] fp32 or float64.

    Returns:
        The numbers [..., D] in the dtype of x, and the scale [..., 1]: their product is near x.
    """
    size = x.abs()
    largest = torch.where(size < math.inf, size, math.inf).amax(-1, keepdim=True)
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    levels = torch.full_like(largest, 127.0) / largest
    x = x * torch.where(largest > LEAST, levels, 0.0)
    whole = x.floor()
    whole = (whole + (x >= whole + 0.5)).clamp(-127, 127).nan_to_num(0.0)
    return whole, torch.where(largest < math.inf, largest * (1 / 127), math.nan)


def _rounded(x: Tensor) -> Tensor:
    """The nearest that int8 can say."""
    whole, scale = to_int8(x)
    return whole * scale


def key_shift(k: Tensor, k_offsets: Tensor, clusters: int | None = None) -> Tensor:
    """The vector that is taken from every key before rounding: the mean of a sample of the keys.

    Any vector would do, since the softmax does not see what one and the same vector adds to all
    keys; it should only be near their mean. So 64 of them are enough, spread evenly over the
    sorted keys and thereby over the clusters, and a program that rounds a few keys can find it
    alone, without waiting for a pass over all. An element that is not finite counts as zero. The
    mean is rounded to bfloat16, so that the order of its sum does not reach the keys.

    Args:
        k: [B, H, S, D], sorted by cluster.
        k_offsets: [B, H, K + 1] int32.
        clusters: only the first so many are sampled; all if left out.

    Returns:
        [B, H, D] in fp32 (or float64).

    Raises:
        KernelError: there are fewer clusters.
    """
    known = k_offsets.shape[2] - 1
    clusters = known if clusters is None else clusters
    if not 1 <= clusters <= known:
        raise KernelError(f"shift_clusters must be from 1 to {known}, found {clusters}")
    count = k_offsets[..., clusters, None].long()
    place = torch.arange(SAMPLES, device=k.device) * count // SAMPLES
    taken = k.gather(2, place[..., None].expand(*place.shape, k.shape[3])).to(_accumulator(k))
    taken = torch.where(taken.isfinite() & (count > 0)[..., None], taken, 0.0)
    return (taken * (1 / SAMPLES)).sum(2).bfloat16().to(taken.dtype)


def _labels_of(offsets: Tensor, tokens: int) -> Tensor:
    """Cluster of each place in sorted order: [B, H, K + 1] -> [B, H, tokens] int64."""
    place = torch.arange(tokens, device=offsets.device, dtype=torch.int32)
    place = place.expand(*offsets.shape[:2], tokens).contiguous()
    return torch.searchsorted(offsets[..., 1:].contiguous(), place, right=True)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    selection: Selection,
    k_means: Tensor | None,
    v_means: Tensor | None,
    *,
    reference: bool,
) -> None:
    """Refuse inputs of `block_sparse_attention` that do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_layout(name, x, reference=reference)
        check_like(name, x, "q", q, 0, 1, 3)
        if x.dtype != q.dtype:
            raise KernelError(f"{name} has dtype {x.dtype}, but q {q.dtype}")
    check_like("v", v, "k", k, 2)
    for name, x in (("q_offsets", q_offsets), ("k_offsets", k_offsets)):
        check_integers(name, x, 3)
        check_like(name, x, "q", q, 0, 1)
    if selection.num_queries != q_offsets.shape[2] - 1:
        raise KernelError(
            f"the selection has {selection.num_queries} rows, "
            f"but there are {q_offsets.shape[2] - 1} query clusters"
        )
    if selection.num_keys != k_offsets.shape[2] - 1:
        raise KernelError(
            f"the selection has {selection.num_keys} columns, "
            f"but there are {k_offsets.shape[2] - 1} key clusters"
        )
    if (k_means is None) != (v_means is None):
        raise KernelError("compensation needs k_means and v_means, found only one of them")
    if k_means is not None and v_means is not None:
        check_like("v_means", v_means, "k_means", k_means, 0, 1, 2, 3)
        check_like("k_means", k_means, "q", q, 0, 1, 3)
        if k_means.shape[2] > selection.num_keys:
            raise KernelError(f"{k_means.shape[2]} means for {selection.num_keys} key clusters")


def query_metric(q: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """A [B, H, D, D] factor R such that |R^T (k - l)|^2 is the mean of (q . (k - l))^2 over q.

    Keys multiplied by it from the right, `k @ R`, are near each other when the queries cannot
    tell them apart, which is what a cluster of keys should mean to attention.

    Args:
        q: [B, H, S, D].
        ridge: added to the diagonal, as a share of its mean, so that the factor always exists.

    Returns:
        In fp32 (or float64), lower triangular.
    """
    rows = q.to(_accumulator(q))
    moment = rows.transpose(-1, -2) @ rows / q.shape[2]
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    floor = ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(rows.dtype).tiny
    moment = moment + torch.diag_embed(floor.expand_as(diagonal))
    return torch.linalg.cholesky_ex(moment).L


def attention_recall(
    q: Tensor,
    k: Tensor,
    q_labels: Tensor,
    k_labels: Tensor,
    selection: Selection,
    *,
    scale: float,
    rows: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The share of the softmax mass of full attention that the selection keeps.

    Args:
        q, k: [B, H, S, D] in their own order.
        q_labels, k_labels: [B, H, S] int32.
        selection: the key clusters that each query cluster keeps.
        scale: factor on the scores.
        rows: [R] int64, the queries to look at.
        valid: [B, S] bool, false for padding, which full attention does not see; all are valid if
            left out.

    Returns:
        [B, H, R] in fp32 (or float64).
    """
    kind = _accumulator(q)
    scores = q.index_select(2, rows).to(kind) @ k.to(kind).transpose(-1, -2) * scale
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -math.inf)
    picked = q_labels.index_select(2, rows).long()
    mask = selection.mask()
    seen = mask.gather(2, picked[..., None].expand(*picked.shape, mask.shape[3]))
    seen = seen.gather(3, k_labels.long()[:, :, None, :].expand_as(scores))
    return (scores.softmax(-1) * seen).sum(-1)


def rotate_quantise(
    x: Tensor,
    *,
    qmax: int = 127,
    block: int | None = None,
    scale_format: str = "float32",
    tensor_scale: Tensor | None = None,
    rotation: Tensor | None = None,
    high: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotated rows as whole numbers from -qmax to qmax, and what one of them stands for.

    The channels of a row are cut into groups of G, and y = rotation @ x in each of them; the
    rotation is rounded to the dtype of x, as the tensor cores take it. The channels are then cut
    into blocks with a scale each, the least for which none of them is clipped (INT v.s. FP, arXiv
    2510.25602, section 2): largest |y| / qmax as it is ("float32"), rounded up to a power of two
    ("ue8m0"), or as a multiple of `tensor_scale` rounded to the nearest E4M3 from 2^-9 to 448
    ("e4m3", which clips what is over). Codes are y times the reciprocal of the scale, rounded to
    the nearest, halves to even.

    A block without an element over 1e-30 has codes 0 and the scale 1, with "e4m3" the least one.
    A block that holds NaN or infinity, and any block where `tensor_scale` is not positive, has
    codes 0 and the scale NaN.

    Args:
        x: [..., K].
        qmax: largest code, from 1 to 127.
        block: channels that share a scale; a divisor of K, or all of them if left out.
        scale_format: "float32", "ue8m0" or "e4m3".
        tensor_scale: one number in fp32, for "e4m3" alone.
        rotation: [G, G] for every group of channels, or [K / G, G, G], one for each.
        high: [rows] bool, the rows that have codes up to 127 instead; a row is an index into all
            but the last dimension of x.

    Returns:
        codes [..., K] int8, scales [..., K / block] fp32 (or float64).

    Raises:
        KernelError: arguments do not fit each other.
    """
    check_rotate_quantise(x, qmax, block, scale_format, tensor_scale, rotation, high)
    kind = _accumulator(x)
    rows = x.reshape(-1, x.shape[-1]).to(kind)
    if rotation is not None:
        exact = rotation.to(x.dtype).to(kind)
        groups = rows.unflatten(1, (-1, rotation.shape[-1]))
        if rotation.dim() == 2:
            rows = (groups @ exact.T).flatten(1)
        else:
            rows = (groups.transpose(0, 1) @ exact.transpose(1, 2)).transpose(0, 1).flatten(1)
    blocks = rows.unflatten(1, (-1, block or x.shape[-1]))
    size = blocks.abs()
    largest = torch.where(size < math.inf, size, math.inf).amax(-1, keepdim=True)
    top = torch.full((len(rows), 1, 1), float(qmax), dtype=kind, device=x.device)
    if high is not None:
        top = torch.where(high.reshape(-1, 1, 1), 127.0, top)
    ratio = largest / top
    if scale_format == "float32":
        scale, least = ratio, torch.ones_like(ratio)
    elif scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(ratio)
        scale = torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())
        least = torch.ones_like(ratio)
    else:
        assert tensor_scale is not None
        unit = torch.where(tensor_scale > 0, tensor_scale, math.nan).to(kind)
        steps = (ratio / unit).clamp(E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn)
        scale, least = steps.to(kind) * unit, (E4M3_LEAST * unit).expand_as(ratio)
    scale = torch.where(largest > LEAST, scale, least)
    scale = torch.where(largest < math.inf, scale, math.nan)
    sound = (largest > LEAST) & (scale > 0)
    codes = (blocks * scale.reciprocal()).clamp(-top, top).round()
    codes = torch.where(sound, codes, 0.0).to(torch.int8)
    sizes = x.shape[:-1]
    return codes.reshape(x.shape), scale.reshape(*sizes, blocks.shape[1])


def quantised_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    block: int | None = None,
    packed: bool = False,
    out_dtype: torch.dtype,
) -> Tensor:
    """The linear layer of rounded activations and rounded weights.

    out[m, n] = bias[n] + the sum over blocks b of scales[m, b] * weight_scales[n, b] * (codes[m] .
    weight[n] over the channels of b), where scales of one column are those of all blocks. A scale
    that is NaN makes NaN of its whole row or column.

    Args:
        codes: [..., K] int8.
        scales: [..., K / block] or [..., 1] fp32 (or float64).
        weight: [N, K] int8, or [N, K / 2] uint8 as `pack_int4` makes it.
        weight_scales: [N, K / block] or [N, 1], in the dtype of `scales`.
        bias: [N] in any floating-point dtype.
        block: channels that share a scale; all of them if left out.
        packed: the weights are of 4 bits, two per byte.
        out_dtype: dtype of the result.

    Returns:
        [..., N] in `out_dtype`.

    Raises:
        KernelError: arguments do not fit each other.
    """
    check_quantised_linear(codes, scales, weight, weight_scales, bias, block, packed, out_dtype)
    kind = scales.dtype
    channels = codes.shape[-1]
    if packed:
        weight = unpack_int4(weight)

    def spread(scale: Tensor) -> Tensor:
        """Repeat the scale of each block for its channels."""
        return scale.repeat_interleave(channels // scale.shape[-1], -1)

    if scales.shape[-1] == weight_scales.shape[-1] == 1:
        out = (codes.to(kind) @ weight.to(kind).T) * scales * weight_scales[:, 0]
    else:
        out = (codes * spread(scales)) @ (weight * spread(weight_scales)).T
    if bias is not None:
        out = out + bias.to(kind)
    return out.to(out_dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two per byte: the low half of a byte is the even channel.

    Args:
        codes: [N, K] int8 from -8 to 7, K even.

    Returns:
        [N, K / 2] uint8.

    Raises:
        KernelError: the codes are not such ones.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % 2:
        raise KernelError(
            "codes of 4 bits are packed from int8 [N, K] with an even K, found "
            f"{codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and not -8 <= int(codes.amin()) <= int(codes.amax()) <= 7:
        raise KernelError(
            f"codes of 4 bits are from -8 to 7, found {int(codes.amin())} to {int(codes.amax())}"
        )
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return ((even & 15) | (odd << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`: [N, K / 2] uint8 -> [N, K] int8."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise KernelError(
            f"packed codes are uint8 [N, K / 2], found {packed.dtype} {list(packed.shape)}"
        )
    pairs = packed.view(torch.int8)
    return torch.stack([(pairs << 4) >> 4, pairs >> 4], -1).flatten(1)


def token_haar(
    x: Tensor, grid: tuple[int, int, int], *, inverse: bool = False, levels: int = 3
) -> Tensor:
    """The orthonormal 3-D Haar wavelet transform along the tokens of a video, or its inverse.

    A level turns a box of tokens into eight: along frames, then height, then width, neighbours a
    and b become (a + b) / sqrt(2) and (a - b) / sqrt(2), and the last of an odd length is carried
    on with the former. The box of sums alone, of sizes rounded up, goes on to the next level.
    Mixing tokens commutes with a linear layer, and after it few tokens hold most of the energy
    (STaMP, arXiv 2510.26771).

    The order is from coarse to fine: the last box of sums, then the seven boxes of differences of
    the last level, ..., then those of the first. The boxes of a level count up in binary, 001 to
    111, where the digits stand for frames, height and width and 1 for differences; within a box
    tokens are row by row.

    Args:
        x: [B, S, K] or [S, K], token (f * H + h) * W + w at its place, or coefficients if inverse.
        grid: frames F, height H, width W, in tokens; F * H * W = S.
        inverse: undo it.
        levels: number of levels, 1 or more.

    Returns:
        Like x; computed in fp32 (or float64).

    Raises:
        KernelError: the grid does not fit the tokens.
    """
    check_token_haar(x, grid, levels)
    run = _haar_synthesis if inverse else _haar_analysis
    return run(x.to(_accumulator(x)), grid, levels).to(x.dtype)


def haar_sums(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The sizes of the box of sums after one level."""
    frames, height, width = ((size + 1) // 2 for size in grid)
    return frames, height, width


def _haar_analysis(x: Tensor, grid: tuple[int, int, int], levels: int) -> Tensor:
    if levels == 0:
        return x
    boxes = [x.unflatten(-2, grid)]
    for dim in (-4, -3, -2):
        boxes = [half for box in boxes for half in _haar_split(box, dim)]
    sums, *differences = (box.flatten(-4, -2) for box in boxes)
    return torch.cat([_haar_analysis(sums, haar_sums(grid), levels - 1), *differences], -2)


def _haar_synthesis(x: Tensor, grid: tuple[int, int, int], levels: int) -> Tensor:
    if levels == 0:
        return x
    halves = [((size + 1) // 2, size // 2) for size in grid]
    sizes = list(itertools.product(*halves))
    sums, *differences = x.split([math.prod(size) for size in sizes], -2)
    inner = _haar_synthesis(sums, haar_sums(grid), levels - 1)
    boxes = [
        box.unflatten(-2, size) for box, size in zip((inner, *differences), sizes, strict=True)
    ]
    for dim in (-2, -3, -4):
        boxes = [_haar_join(*pair, dim) for pair in zip(boxes[0::2], boxes[1::2], strict=True)]
    return boxes[0].flatten(-4, -2)


def _haar_split(box: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums, the last of an odd length among them, and differences of neighbours."""
    box = box.movedim(dim, 0)
    pairs = len(box) // 2
    even, odd = box[: 2 * pairs : 2], box[1::2]
    sums = torch.cat([(even + odd) * _ROOT_HALF, box[2 * pairs :]])
    return sums.movedim(0, dim), ((even - odd) * _ROOT_HALF).movedim(0, dim)


def _haar_join(sums: Tensor, differences: Tensor, dim: int) -> Tensor:
    """Undo `_haar_split`."""
    sums, differences = sums.movedim(dim, 0), differences.movedim(dim, 0)
    pairs = len(differences)
    even = (sums[:pairs] + differences) * _ROOT_HALF
    odd = (sums[:pairs] - differences) * _ROOT_HALF
    box = torch.cat([torch.stack([even, odd], 1).flatten(0, 1), sums[pairs:]])
    return box.movedim(0, dim)


def check_rotate_quantise(
    x: Tensor,
    qmax: int,
    block: int | None,
    scale_format: str,
    tensor_scale: Tensor | None,
    rotation: Tensor | None,
    high: Tensor | None,
) -> None:
    """Refuse arguments of `rotate_quantise` that do not fit each other."""
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise KernelError(
            f"x must be floating-point with channels last, found {x.dtype} {list(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise KernelError(
            "x requires a gradient, and whole numbers have none: call rotate_quantise under "
            "torch.no_grad()"
        )
    channels = x.shape[-1]
    if not 1 <= qmax <= 127:
        raise KernelError(f"qmax must be from 1 to 127, found {qmax}")
    _check_block(block, channels)
    if scale_format not in SCALE_FORMATS:
        known = ", ".join(SCALE_FORMATS)
        raise KernelError(f"scale_format must be one of {known}, found {scale_format!r}")
    if (scale_format == "e4m3") != (tensor_scale is not None):
        raise KernelError("tensor_scale belongs to the scale_format e4m3, and to no other")
    if tensor_scale is not None and (
        tensor_scale.numel() != 1 or not tensor_scale.is_floating_point()
    ):
        raise KernelError(
            "tensor_scale must be one floating-point number, found "
            f"{tensor_scale.dtype} {list(tensor_scale.shape)}"
        )
    if rotation is not None:
        group = rotation.shape[-1]
        if rotation.dim() not in (2, 3) or rotation.shape[-2] != group:
            raise KernelError(
                f"rotation must be [G, G] or [K / G, G, G], found {list(rotation.shape)}"
            )
        if (
            group == 0
            or channels % group
            or (rotation.dim() == 3 and len(rotation) * group != channels)
        ):
            raise KernelError(f"rotation {list(rotation.shape)} does not fit {channels} channels")
        if not rotation.is_floating_point():
            raise KernelError(f"rotation must be floating-point, found {rotation.dtype}")
    rows = math.prod(x.shape[:-1])
    if high is not None and (high.dtype != torch.bool or high.numel() != rows):
        raise KernelError(
            f"high must be bool with one element for each of {rows} rows, found "
            f"{high.dtype} {list(high.shape)}"
        )
    for name, other in (("tensor_scale", tensor_scale), ("rotation", rotation), ("high", high)):
        if other is not None:
            check_like(name, other, "x", x)


def check_quantised_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    block: int | None,
    packed: bool,
    out_dtype: torch.dtype,
) -> None:
    """Refuse arguments of `quantised_linear` that do not fit each other."""
    if codes.dtype != torch.int8 or codes.dim() == 0 or codes.shape[-1] == 0:
        raise KernelError(
            f"codes must be int8 with channels last, found {codes.dtype} {list(codes.shape)}"
        )
    channels = codes.shape[-1]
    _check_block(block, channels)
    kind, width = (torch.uint8, channels / 2) if packed else (torch.int8, channels)
    if weight.dtype != kind or weight.dim() != 2 or weight.shape[1] != width:
        raise KernelError(
            f"weight must be {kind} [N, {width:g}] for {channels} channels"
            f"{', packed' if packed else ''}, found {weight.dtype} {list(weight.shape)}"
        )
    blocks = channels // (block or channels)
    for name, scale, sizes in (
        ("scales", scales, codes.shape[:-1]),
        ("weight_scales", weight_scales, weight.shape[:1]),
    ):
        if scale.shape[:-1] != sizes or scale.dim() == 0 or scale.shape[-1] not in (1, blocks):
            raise KernelError(
                f"{name} must be {[*sizes, blocks]} or {[*sizes, 1]}, found {list(scale.shape)}"
            )
        if scale.dtype != scales.dtype or scale.dtype not in (torch.float32, torch.float64):
            raise KernelError(f"{name} must be float32, found {scale.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise KernelError(
            f"bias must be floating-point [{len(weight)}], found {bias.dtype} {list(bias.shape)}"
        )
    if not out_dtype.is_floating_point:
        raise KernelError(f"out_dtype must be a floating-point dtype, found {out_dtype}")
    for name, other in (
        ("scales", scales),
        ("weight", weight),
        ("weight_scales", weight_scales),
        ("bias", bias),
    ):
        if other is not None:
            check_like(name, other, "codes", codes)


def check_token_haar(x: Tensor, grid: tuple[int, int, int], levels: int) -> None:
    """Refuse arguments of `token_haar` that do not fit each other."""
    if not x.is_floating_point() or x.dim() not in (2, 3):
        raise KernelError(
            "x must be floating-point [batch, tokens, channels] or [tokens, channels], found "
            f"{x.dtype} {list(x.shape)}"
        )
    if len(grid) != 3 or min(grid) < 1 or math.prod(grid) != x.shape[-2]:
        raise KernelError(
            f"the grid {tuple(grid)} of frames, height and width does not hold {x.shape[-2]} tokens"
        )
    if levels < 1:
        raise KernelError(f"levels must be 1 or more, found {levels}")


def _check_block(block: int | None, channels: int) -> None:
    if block is not None and (block < 1 or channels % block):
        raise KernelError(f"blocks of {block} channels do not divide {channels}")
