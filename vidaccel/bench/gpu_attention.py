"""The part "attention": sparse attention and whole layers, beside the dense attention of torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.kernels import dense_times, layer_times, measured, sparse_times, video_like
from vidaccel.kernels.state import SemanticConfig

_WAN, _HUNYUAN, _SMALL = "Wan-14B 720p", "HunyuanVideo 720p", "Wan-1.3B 480p"
_SIDES = {"mass_averaging": True, "compensation": True}  # as SVG2 has them
# Of the drawn tokens about 30 % of all pairs, as is published for trained models at 0.9.
_TOP_P = 0.35


def items(sizes: Sizes) -> list[Item]:
    """List them: what the project's targets are about before what shows where they come from."""
    few, more, most = (100, 500), (200, 500), (300, 1000)
    listed = [
        _sparse_item(sizes, _WAN, few, 0.3, 12),
        _layer_item(sizes, _WAN, {}),
        _sparse_item(sizes, _WAN, more, 0.3, 8, repeats=True),
        _layer_item(sizes, _WAN, _SIDES | {"int8_qk": True}),
        _layer_item(sizes, _WAN, _SIDES, repeats=True),
        _layer_item(sizes, _WAN, {"int8_qk": True}, repeats=True),
        _sparse_item(sizes, _WAN, most, 0.3, 8, repeats=True),
    ]
    for density in (0.1, 0.2, 0.5, 1.0):
        listed.append(_sparse_item(sizes, _WAN, few, density, 8, repeats=True))
    listed += [
        _sparse_item(sizes, _WAN, few, 0.3, 60, repeats=True, others=True),
        _layer_item(sizes, _SMALL, {}, repeats=True),
        _layer_item(sizes, _SMALL, _SIDES, repeats=True),
        _sparse_item(sizes, _SMALL, few, 0.3, 8, repeats=True),
        _sparse_item(sizes, _HUNYUAN, more, 0.3, 20, repeats=True),
        _layer_item(sizes, _HUNYUAN, _SIDES, repeats=True),
        _layer_item(sizes, "CogVideoX-5B 480p", {}, repeats=True),
        _sparse_item(sizes, "CogVideoX-5B 480p", (64, 128), 0.3, 8, repeats=True),
    ]
    return listed


def _sparse_item(
    sizes: Sizes,
    name: str,
    clusters: tuple[int, int],
    density: float,
    seconds: float,
    *,
    repeats: bool = False,
    others: bool = False,
) -> Item:
    run = partial(_sparse, sizes, name, clusters, density, others=others)
    told = f"{name} {clusters[0]}/{clusters[1]} at {density}"
    told += ", other libraries too" if others else ""
    return Item(told, run, seconds, 12, repeats)


def _layer_item(sizes: Sizes, name: str, options: dict[str, Any], *, repeats: bool = False) -> Item:
    told = ", ".join(options) or "plain"
    run = partial(_layer, sizes, name, options)
    return Item(f"layer {name}, {told}", run, 15, 16, repeats)


def _sparse(
    sizes: Sizes, name: str, clusters: tuple[int, int], density: float, *, others: bool
) -> dict[str, Any]:
    """Time sparse attention on one random selection, and dense attention on the same tensors."""
    device = sizes.device
    shape = sizes.clustered(name, *clusters)
    q, k, v = video_like(device, shape, sizes.dtype)
    dense = dense_times(device, q, k, v, sizes.repeat_ms)
    # Clusters that are few and a density that is low may select nothing: half of all, then.
    wanted = sizes.of(density, 0.5)
    times = sparse_times(device, shape, q, k, v, wanted, sizes.repeat_ms, others=others)
    return {
        "query_clusters": clusters[0],
        "key_clusters": clusters[1],
        "wanted_density": density,
        "fastest_dense_ms": min(dense.values()),
        "dense": {
            method: measured(device, shape, method, 1.0, time) for method, time in dense.items()
        },
        "sparse": {
            method: measured(device, shape, method, share, time)
            for method, (share, time) in times.items()
        },
    }


def _layer(sizes: Sizes, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Time a whole layer: alone, in a CUDA graph, and what of it is attention."""
    device, shape = sizes.device, sizes.shape(name)
    q, k, v = video_like(device, shape, sizes.dtype)
    dense = min(dense_times(device, q, k, v, sizes.repeat_ms).values())
    config = SemanticConfig(
        shape.query_clusters,
        shape.key_clusters,
        top_p=_TOP_P,
        init_iters=sizes.of(10, 1),
        **options,
    )
    found = layer_times(device, q, k, v, config, sizes.repeat_ms)
    del q, k, v
    if device.on_gpu:
        torch.cuda.empty_cache()
    return {
        **found,
        "options": options,
        "dense_ms": dense,
        "share_of_dense": found["overhead_ms"] / dense,
        "over_dense": dense / found["layer_ms"],
    }
