"""Checks every kernel on a CUDA GPU against its reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.errors import VidaccelError
from vidaccel.kernels.common import HEAD_DIMS


class CheckError(VidaccelError):
    """A kernel gave a wrong result, so that its speed means nothing."""


def check(
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str = "cuda",
    head_dims: Sequence[int] = HEAD_DIMS,
    size: tuple[int, int, int] = (2, 3, 1111),
    clusters: tuple[int, int] = (70, 90),
) -> dict[str, dict[str, float]]:
    """Hold every kernel against its reference in float64, on the same random input each time.

    Args:
        dtype: that of q, k and v.
        device: a GPU; or the CPU, where Triton's interpreter has to be on.
        head_dims: head sizes to check.
        size: batch items, heads and tokens.
        clusters: how many of queries, and of keys.

    Returns:
        The name of each check -> its "error" and "limit".

    Raises:
        CheckError: an error is over its limit, or two runs differ.
    """
    checks = _Checks()
    with torch.random.fork_rng([device] if device != "cpu" else []):
        torch.manual_seed(0)  # a failure can be had again
        _check_all(checks, dtype, device, head_dims, size, clusters)
    return checks.found


def _check_all(
    checks: _Checks,
    dtype: torch.dtype,
    device: str,
    head_dims: Sequence[int],
    size: tuple[int, int, int],
    clusters: tuple[int, int],
) -> None:
    """Check every kernel, on random input from the generator of the device."""
    for head_dim in head_dims:
        q, k, v = (torch.randn(*size, head_dim, device=device, dtype=dtype) for _ in range(3))
        checks.suffix = f", D {head_dim}"
        _check_clustering(checks, q, k, v, *clusters)
        _check_semantic_attention(checks, q, k, v, *(count // 2 for count in clusters))
    checks.suffix = ""
    grid, channels = ((3, 5, 2), 64) if device == "cpu" else ((9, 11, 13), 1536)
    _check_linear(checks, torch.randn(*grid, channels, device=device, dtype=dtype))


@dataclass
class _Checks:
    """The checks so far.

    Attributes:
        found: name -> error and limit.
        suffix: end of the names of the next ones.
    """

    found: dict[str, dict[str, float]] = field(default_factory=dict)
    suffix: str = ""

    def note(self, name: str, error: Tensor | float, limit: float) -> None:
        """Keep an error; raises CheckError where it is over its limit."""
        name, value = name + self.suffix, float(error)
        self.found[name] = {"error": value, "limit": limit}
        if not value <= limit:
            raise CheckError(f"{name} is wrong: error {value:.2e}, at most {limit:.2e} allowed")


def _check_clustering(
    checks: _Checks, q: Tensor, k: Tensor, v: Tensor, num_q: int, num_k: int
) -> None:
    """Check k-means, sorting, permuting and selection, and attention with what they give."""
    from vidaccel.kernels import kmeans, permute, reference, select, sort

    start = reference.initial_centroids(q, num_q)
    centroids, labels, _ = kmeans.kmeans(q, start, 2, impl="triton")
    again = kmeans.kmeans(q, start, 2, impl="triton")
    checks.note("k-means twice", (again[0] - centroids).abs().max(), 0.0)
    moved = reference.cluster_means(q.double(), labels, num_q, start)
    checks.note("k-means means", (centroids - moved).abs().max(), 1e-4)
    _, assigned, _ = kmeans.kmeans(q, start, 0, impl="triton")
    distance = torch.cdist(q.double(), start.to(q.dtype).double())
    picked = distance.gather(3, assigned.long()[..., None])[..., 0]
    checks.note("k-means labels", (picked - distance.amin(-1)).max(), 1e-3)
    q_idx, q_offsets = sort.sort_by_label(labels, num_q, impl="triton")
    expected = reference.sort_by_label(labels, num_q)
    differ = (q_idx != expected[0]).sum() + (q_offsets != expected[1]).sum()
    checks.note("sort", differ, 0.0)
    there = permute.permute(q, q_idx, impl="triton")
    checks.note("permute", (there - reference.permute(q, q_idx)).abs().max(), 0.0)
    back = permute.unpermute(there, q_idx, impl="triton")
    checks.note("unpermute", (back - q).abs().max(), 0.0)

    options = {"scale": q.shape[3] ** -0.5, "top_p": 0.7, "min_ratio": 0.1}
    start = reference.initial_centroids(k, num_k)
    k_centroids, k_labels, k_counts = kmeans.kmeans(k, start, 2, impl="triton")
    scored = (centroids, k_centroids, k_counts)
    selection = select.select_top_p(*scored, **options, impl="triton")
    wanted = reference.select_top_p(centroids.double(), k_centroids.double(), k_counts, **options)
    differ = (selection.mask() != wanted.mask()).float().mean()
    checks.note("selection", differ, 1e-3)
    k_idx, k_offsets = sort.sort_by_label(k_labels, num_k, impl="triton")
    sorted_k, sorted_v = (permute.permute(x, k_idx, impl="triton") for x in (k, v))
    means = {
        "k_means": reference.cluster_means(k, k_labels, num_k),
        "v_means": reference.cluster_means(v, k_labels, num_k),
    }
    lists = (q_offsets, k_offsets, selection)
    _check_attention(checks, (q, sorted_k, sorted_v), lists, q_idx, means)


def _check_attention(
    checks: _Checks,
    tensors: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Any, ...],
    q_idx: Tensor,
    means: dict[str, Tensor],
) -> None:
    """Check sparse attention: exact, with scores in int8, and with the means of clusters."""
    from vidaccel.kernels import reference
    from vidaccel.kernels.block_sparse_attention import block_sparse_attention

    options: dict[str, Any] = {"scale": tensors[0].shape[3] ** -0.5, "q_order": q_idx}
    out, lse = block_sparse_attention(*tensors, *lists, **options, impl="triton")
    wide = [x.double() for x in tensors]
    exact, exact_lse = reference.block_sparse_attention(*wide, *lists, **options)
    checks.note("sparse attention", _distance(out, exact), 1e-2)
    checks.note("log-sum-exp", (lse - exact_lse).abs().max(), 2e-3)

    rounded = options | {"int8_qk": True}
    eight, eight_lse = block_sparse_attention(*tensors, *lists, **rounded, impl="triton")
    # In float64 a number half-way between two whole ones could be rounded to the other.
    single = [x.float() for x in tensors]
    twin, twin_lse = reference.block_sparse_attention(*single, *lists, **rounded)
    checks.note("sparse attention in int8", _distance(eight, twin), 1e-2)
    off = (eight_lse - twin_lse).abs()
    # Where it stands next to a half, a number of a query may still be rounded to either side, which
    # moves all scores of this query by up to one step times what it meets in a key.
    q, k = (x.abs().max().item() for x in tensors[:2])
    step = options["scale"] * q / 127 * 2 * k
    checks.note("log-sum-exp in int8", off.max(), 2e-3 + step)
    checks.note("log-sum-exp in int8, mean", off.mean(), 2e-4)
    checks.note("int8 against exact scores", _distance(eight, exact), 3e-2)

    out, _ = block_sparse_attention(*tensors, *lists, **options, **means, impl="triton")
    exact, _ = reference.block_sparse_attention(*wide, *lists, **options, **means)
    checks.note("compensation", _distance(out, exact), 2e-2)


def _check_semantic_attention(
    checks: _Checks, q: Tensor, k: Tensor, v: Tensor, num_q: int, num_k: int
) -> None:
    """Check that attention with every cluster selected is dense attention."""
    from vidaccel.kernels.semantic_attention import semantic_attention
    from vidaccel.kernels.state import SemanticConfig, SemanticState

    config = SemanticConfig(num_q, num_k, top_p=1.0)
    full = semantic_attention(q, k, v, SemanticState(), config, impl="triton")
    dense = scaled_dot_product_attention(q.double(), k.double(), v.double())
    own = (scaled_dot_product_attention(q, k, v).double() - dense).abs().max().item()
    checks.note("everything selected", (full.double() - dense).abs().max(), 2 * own)


def _check_linear(checks: _Checks, x: Tensor) -> None:
    """Check linear layers in low precision on a grid of tokens x [F, H, W, K]."""
    from vidaccel.kernels import reference
    from vidaccel.kernels.linear import pack_int4, quantised_linear, rotate_quantise, token_haar

    grid, channels = (x.shape[0], x.shape[1], x.shape[2]), x.shape[3]
    x = x.reshape(-1, channels)
    mixed = token_haar(x, grid, impl="triton")
    wanted = reference.token_haar(x.double(), grid)
    checks.note("Haar transform", _distance(mixed, wanted), 1e-2)
    back = token_haar(mixed, grid, inverse=True, impl="triton")
    checks.note("Haar transform undone", _distance(back, x.double()), 1e-2)

    turn = torch.linalg.qr(torch.randn(64, 64)).Q.to(x)
    weight = torch.randn(3 * channels // 4, channels, device=x.device, dtype=x.dtype)
    bias = torch.randn(len(weight), device=x.device, dtype=x.dtype)
    unit = x.abs().max().float() / (4 * 448)
    for name, qmax, block, scale_format in (
        ("int8", 127, None, "float32"),
        ("mxint8", 127, 32, "ue8m0"),
        ("nvint4", 7, 16, "e4m3"),
    ):
        options: dict[str, Any] = {"qmax": qmax, "block": block, "scale_format": scale_format}
        options |= {"tensor_scale": unit} if scale_format == "e4m3" else {}
        codes, scales = rotate_quantise(x, rotation=turn, impl="triton", **options)
        twin = reference.rotate_quantise(x.double(), rotation=turn.double(), **options)
        rounded, exact = (c * _spread(s, channels) for c, s in ((codes, scales), twin))
        # A sum next to a half may be rounded to either side of it.
        checks.note(f"rounding to {name}", _distance(rounded, exact), 1e-2 if qmax > 7 else 5e-2)
        whole, sizes = rotate_quantise(weight, rotation=turn, impl="triton", **options)
        packed = qmax == 7
        tensors = (codes, scales, pack_int4(whole) if packed else whole, sizes, bias)
        out = quantised_linear(
            *tensors, block=block, packed=packed, out_dtype=x.dtype, impl="triton"
        )
        exact = rounded.double() @ (whole * _spread(sizes, channels)).double().T + bias.double()
        checks.note(f"linear in {name}", _distance(out, exact), 1e-2)


def _spread(scales: Tensor, channels: int) -> Tensor:
    """Repeat the scale of each block for its channels."""
    return scales.repeat_interleave(channels // scales.shape[-1], -1)


def _distance(x: Tensor, exact: Tensor) -> Tensor:
    """Return the norm of the difference, as a share of the norm."""
    difference: Tensor = (x.double() - exact).norm() / exact.norm()
    return difference
