"""The part "kernels": is every kernel right on this device, at real sizes too, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.gpu_sampled import check_sampled
from vidaccel.bench.kernel_checks import check
from vidaccel.bench.kernels import draw_selection, video_like
from vidaccel.engine.compat import int8_product
from vidaccel.kernels.common import HEAD_DIMS
from vidaccel.kernels.state import SemanticConfig, SemanticState

_WAN, _HUNYUAN, _SMALL = "Wan-14B 720p, 300/1000", "HunyuanVideo 720p", "Wan-1.3B 480p"
_SIDES = {"mass_averaging": True, "compensation": True}  # as SVG2 has them


def items(sizes: Sizes) -> list[Item]:
    """List them: ceilings and correctness before times."""
    int8 = {"int8_qk": True}
    listed = [
        Item("ceilings", partial(ceilings, sizes), 5),
        Item("checks bf16 D 128", partial(_checks, sizes, torch.bfloat16, (128,)), 20),
        Item(f"sampled rows {_WAN}", partial(_sampled, sizes, _WAN, _SIDES), 12, 16),
        Item(f"kernel times {_WAN}", partial(_kernel_times, sizes, _WAN, _SIDES), 15, 16),
        Item("beyond 2^31 elements", partial(_large, sizes), 20, 45),
        Item(f"sampled rows {_WAN}, int8", partial(_sampled, sizes, _WAN, int8), 12, 16),
        Item(f"kernel times {_WAN}, int8", partial(_kernel_times, sizes, _WAN, int8), 10, 16, True),
        Item("one large cluster", partial(_large_cluster, sizes), 10, 16),
        Item("moving and selecting", partial(_moving, sizes), 8, 16),
    ]
    for head_dim in HEAD_DIMS[:-1]:
        run = partial(_checks, sizes, torch.bfloat16, (head_dim,))
        listed.append(Item(f"checks bf16 D {head_dim}", run, 20, repeats=True))
    for name, options in ((_HUNYUAN, _SIDES), (_SMALL, {})):
        run = partial(_sampled, sizes, name, options)
        listed.append(Item(f"sampled rows {name}", run, 12, 16, repeats=True))
    listed.append(
        Item(f"kernel times {_SMALL}", partial(_kernel_times, sizes, _SMALL, _SIDES), 10, 8, True)
    )
    for dtype, head_dim in ((torch.float16, 128), (torch.float32, 64)):
        run = partial(_checks, sizes, dtype, (head_dim,))
        listed.append(Item(f"checks {str(dtype)[6:]} D {head_dim}", run, 20, repeats=True))
    return listed


def ceilings(sizes: Sizes) -> dict[str, Any]:
    """Measure what the device can do: bytes moved per second, and operations of large products."""
    device, side = sizes.device, sizes.of(8192, 64)
    out: dict[str, Any] = {}
    source = torch.randn(sizes.of(2**29, 2**10), device=device.name, dtype=sizes.dtype)
    target = torch.empty_like(source)
    time = device.milliseconds(lambda: target.copy_(source), sizes.repeat_ms)
    out["copied_gb_per_s"] = 2 * source.numel() * source.element_size() / time / 1e6
    a, b = (torch.randn(side, side, device=device.name, dtype=sizes.dtype) for _ in range(2))
    time = device.milliseconds(lambda: a @ b, sizes.repeat_ms)
    out["product_tflops"] = 2 * side**3 / time / 1e9
    low, high = -127, 128
    a8, b8 = (
        torch.randint(low, high, (side, side), device=device.name, dtype=torch.int8)
        for _ in range(2)
    )
    time = device.milliseconds(lambda: int8_product(a8, b8.T), sizes.repeat_ms)
    out["int8_product_tops"] = 2 * side**3 / time / 1e9
    return out


def _checks(sizes: Sizes, dtype: torch.dtype, head_dims: tuple[int, ...]) -> dict[str, Any]:
    """Hold every kernel against its reference."""
    if sizes.dry:
        found = check(sizes.dtype, device="cpu", head_dims=(64,), size=(1, 1, 40), clusters=(3, 4))
        return {"checks": found}
    return {"checks": check(dtype, head_dims=head_dims)}


def _config(sizes: Sizes, name: str, options: dict[str, Any]) -> SemanticConfig:
    """Return the settings of a model's layer."""
    shape = sizes.shape(name)
    rounds = sizes.of(10, 1)
    return SemanticConfig(shape.query_clusters, shape.key_clusters, init_iters=rounds, **options)


def _sampled(sizes: Sizes, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Hold a whole layer against float64 on sampled rows."""
    q, k, v = video_like(sizes.device, sizes.shape(name), sizes.dtype)
    return {"checks": check_sampled(q, k, v, _config(sizes, name, options))}


def _large(sizes: Sizes) -> dict[str, Any]:
    """Hold a layer whose tensors have more than 2^31 elements against float64."""
    shape = sizes.shape(_WAN)
    batch = sizes.of(-(-(2**31) // (shape.heads * shape.tokens * shape.head_dim)), 2)
    q, k, v = video_like(sizes.device, shape, sizes.dtype, batch)
    config = SemanticConfig(
        shape.query_clusters, shape.key_clusters, top_p=0.5, init_iters=1, **_SIDES
    )
    return {"elements": q.numel(), "checks": check_sampled(q, k, v, config, rows=4)}


def _kernel_times(sizes: Sizes, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Time each kernel of a layer in its steady state."""
    from vidaccel.kernels.semantic_attention import semantic_attention

    device, shape, state = sizes.device, sizes.shape(name), SemanticState()
    config = _config(sizes, name, options)
    q, k, v = video_like(device, shape, sizes.dtype)

    def layer() -> Tensor:
        out: Tensor = semantic_attention(q, k, v, state, config, impl="triton")
        return out

    layer()
    layer()
    counts = device.counted(layer)
    products = 2 * shape.heads * shape.tokens * shape.head_dim
    return {
        **counts.to_dict(),
        "density": float(state.density().mean()),
        "products_assign": products * (shape.query_clusters + shape.key_clusters) * 2,
        "products_attend": 2 * products * shape.tokens * float(state.density().mean()),
    }


def _large_cluster(sizes: Sizes) -> dict[str, Any]:
    """Time the kernels of a layer where half of the tokens are one and the same."""
    from vidaccel.kernels.semantic_attention import semantic_attention

    device, state = sizes.device, SemanticState()
    q, k, v = video_like(device, sizes.shape(_WAN), sizes.dtype)
    for x in (q, k):
        x[:, :, : x.shape[2] // 2] = x[:, :, :1]
    config = _config(sizes, _WAN, _SIDES)
    run = partial(semantic_attention, q, k, v, state, config, impl="triton")
    run()
    run()
    assert state.key is not None
    share = float(state.key.counts.max() / q.shape[2])
    return {"largest_share": share, **device.counted(run).to_dict()}


def _moving(sizes: Sizes) -> dict[str, Any]:
    """Time what only moves rows or looks at clusters, with bytes per second."""
    from vidaccel.kernels import permute, quantise, select

    device, shape = sizes.device, sizes.shape(_WAN)
    x = video_like(device, shape, sizes.dtype)[0]
    drawn = draw_selection(device, shape, 0.3)
    order = torch.rand(x.shape[:3], device=device.name).argsort(-1).int()
    means = [
        torch.randn(1, shape.heads, count, shape.head_dim, device=device.name)
        for count in (shape.query_clusters, shape.key_clusters)
    ]
    counts = drawn.k_offsets.diff().int()
    options = {"scale": shape.head_dim**-0.5, "top_p": 0.9, "min_ratio": 0.1}
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "permute": (lambda: permute.permute(x, order, impl="triton"), 2.0),
        "unpermute": (lambda: permute.unpermute(x, order, impl="triton"), 2.0),
        "quantise": (
            lambda: quantise.quantise_keys(x, drawn.k_offsets, shape.key_clusters),
            1.0 + 1 / x.element_size(),
        ),
        "select": (
            lambda: select.select_top_p(*means, counts, **options, impl="triton"),
            0.0,
        ),
    }
    found: dict[str, Any] = {}
    for name, (run, passes) in calls.items():
        time = device.milliseconds(run, sizes.repeat_ms)
        rate = passes * x.numel() * x.element_size() / time / 1e6
        found[name] = {"milliseconds": time, "gb_per_s": rate or None}
    return found
