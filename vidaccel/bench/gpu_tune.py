"""The part "tune": every kernel in a few configs around the shipped one, as a table of times.

A config is put in the place of the shipped one for a call of a whole layer, whose profile tells
the kernel's time, and whose output has to stay what it was. What wins becomes the shipped config by
a change of the function or table that the row names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

from torch import Tensor

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.kernels import video_like
from vidaccel.kernels.state import SemanticConfig, SemanticState

MOST = 8  # configs of a kernel, the shipped one among them
_WAN, _SMALL_HEADS = "Wan-14B 720p", "CogVideoX-5B 480p"
_SIDES = {"mass_averaging": True, "compensation": True}
_CALLS = 3  # of a layer, in one profile

Config = dict[str, int]


def _tiles(*rows: tuple[int, int, int, int]) -> list[Config]:
    """Return configs of tile of queries or tokens, tile of keys, warps and stages."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return [dict(zip(names, row, strict=True)) for row in rows]


_ATTEND = _tiles(
    (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 128, 4, 3),
    (64, 64, 4, 3), (64, 64, 4, 4),
)  # fmt: skip
_ATTEND_64 = _tiles(
    (128, 64, 4, 2), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3),
    (64, 128, 4, 3), (128, 64, 8, 3),
)  # fmt: skip
_ASSIGN = _tiles(
    (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3),
    (256, 64, 8, 3), (128, 64, 8, 2),
)  # fmt: skip
_MASS = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w}
    for m, n, w in ((64, 32, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
]
_UPDATE = [{"BLOCK_M": m, "num_warps": w} for m, w in ((16, 4), (64, 4), (64, 8), (32, 8), (32, 2))]
_THRESHOLD = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_SCAN": s, "num_warps": w}
    for m, n, s, w in ((16, 32, 512, 8), (16, 64, 256, 8), (16, 32, 256, 4), (16, 32, 128, 4))
]


def items(sizes: Sizes) -> list[Item]:
    """List them, by how much of a layer's time each kernel takes."""
    sweep = partial(_item, sizes)
    return [
        sweep("_attend", "block_sparse_attention.attention_config", _ATTEND, _WAN, _SIDES, 40),
        sweep("_assign", "kmeans.assign_config", _ASSIGN, _WAN, {}, 30),
        sweep("_mass", "query_mass.mass_config", _MASS, _WAN, _SIDES, 30),
        sweep("_update_and_sort", "kmeans.update_and_sort_config", _UPDATE, _WAN, {}, 20),
        sweep(
            "_attend", "block_sparse_attention.attention_config", _ATTEND_64, _SMALL_HEADS, {}, 30
        ),
        sweep(
            "_attend", "block_sparse_attention.attention_config", _ATTEND, _WAN,
            {"int8_qk": True}, 40,
        ),
        sweep("_update", "kmeans.update_config", _UPDATE, _WAN, {}, 20),
        sweep("_threshold", "select.THRESHOLD", _THRESHOLD, _WAN, {}, 20),
    ]  # fmt: skip


def _item(
    sizes: Sizes,
    kernel: str,
    place: str,
    configs: Sequence[Config],
    shape: str,
    options: dict[str, Any],
    seconds: float,
) -> Item:
    told = ", ".join(name for name in options if name == "int8_qk")
    name = f"{kernel} {shape}" + (f", {told}" if told else "")
    return Item(
        name,
        partial(_sweep, sizes, kernel, place, configs, shape, options),
        seconds,
        16,
        kernel not in ("_assign", "_threshold"),
    )


def _sweep(
    sizes: Sizes,
    kernel: str,
    place: str,
    configs: Sequence[Config],
    name: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Time a kernel in its shipped config and in others."""
    from vidaccel.kernels.semantic_attention import semantic_attention

    shape = sizes.shape(name)
    q, k, v = video_like(sizes.device, shape, sizes.dtype)
    config = SemanticConfig(
        shape.query_clusters, shape.key_clusters, init_iters=sizes.of(10, 1), **options
    )
    first = SemanticState()
    expected = semantic_attention(q, k, v, first, config, impl="triton")

    def layer() -> Tensor:
        # From the same centroids each time, so that outputs can be compared.
        state = SemanticState(query=first.query, key=first.key)
        out: Tensor = semantic_attention(q, k, v, state, config, impl="triton")
        return out

    expected = layer()
    rows = [{"config": "shipped", **_timed(sizes, kernel, layer, expected)}]
    for changed in configs[: sizes.of(MOST - 1, 1)]:
        try:
            with replaced(place, sizes.of(changed, {})):
                rows.append({"config": changed, **_timed(sizes, kernel, layer, expected)})
        except Exception as error:  # one that does not fit this chip is no candidate
            rows.append({"config": changed, "failed": f"{type(error).__name__}: {error}"[:300]})
    right = [row for row in rows if row.get("error", 1.0) < 1e-2]
    return {
        "place": place,
        "options": options,
        "rows": rows,
        "best": min(right, key=lambda row: row["microseconds"])["config"] if right else None,
    }


def _timed(
    sizes: Sizes, kernel: str, layer: Callable[[], Tensor], expected: Tensor
) -> dict[str, Any]:
    """Return the microseconds of a kernel in one layer, and how far the layer's output is off."""
    found = layer()
    error = float((found.float() - expected.float()).norm() / expected.float().norm())

    def several() -> None:
        for _ in range(sizes.of(_CALLS, 1)):
            layer()

    counts = sizes.device.counted(several)
    # A profile has no kernels where there is no GPU.
    time = counts.kernels.get(kernel, float("nan") if sizes.device.on_gpu else 1.0)
    return {"microseconds": time / sizes.of(_CALLS, 1), "error": error}


def replaced(place: str, changed: Config) -> Any:
    """Return a context in which a config differs: that of a function, or a table of one.

    Args:
        place: module of the kernels and name in it.
        changed: entries to replace.
    """
    module_name, _, name = place.partition(".")
    module = import_module(f"vidaccel.kernels.{module_name}")
    shipped = getattr(module, name)
    if isinstance(shipped, dict):
        return patch.object(module, name, shipped | changed)

    def config(*args: Any, **kwargs: Any) -> Config:
        return {**shipped(*args, **kwargs), **changed}

    return patch.object(module, name, config)
