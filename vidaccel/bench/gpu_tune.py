"""The part "tune": every kernel in a few configs around the shipped one, as a table of times.

A config is put in the place of the shipped one, for a call of the kernel or of a whole layer, whose
profile tells the kernel's time; the output has to stay what it was. What wins becomes the shipped
config by a change of the function or table that the row names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.kernels import SHAPES, draw_selection, video_like
from vidaccel.kernels.state import SemanticConfig, SemanticState

MOST = 8  # configs of a kernel, the shipped one among them
_WAN, _SMALL_HEADS = "Wan-14B 720p", "CogVideoX-5B 480p"
_CALLS = 3  # of a layer, in one profile

Config = dict[str, int]


def _tiles(*rows: tuple[int, int, int, int]) -> list[Config]:
    """Return configs of tile of queries or tokens, tile of keys, warps and stages."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return [dict(zip(names, row, strict=True)) for row in rows]


_ATTEND = _tiles(
    (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2),
    (128, 32, 8, 3), (128, 128, 8, 2),
)  # fmt: skip
# Where `hopper_attention` does the work.
_ON_HOPPER: list[Config] = [
    {"BLOCK_M": m, "BLOCK_N": n, "STAGES": s, "COPY_FIRST": first, "num_warps": m // 16}
    for m, n, s, first in (
        (64, 64, 3, False), (64, 64, 3, True), (64, 64, 2, False), (128, 64, 3, True),
        (128, 128, 2, False), (128, 128, 2, True),
    )
]  # fmt: skip
_ATTEND_64 = _tiles(
    (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2)
)
_ASSIGN = _tiles(
    (128, 32, 4, 4), (128, 32, 4, 2), (64, 32, 4, 3), (128, 16, 4, 3), (128, 32, 8, 3),
    (64, 64, 4, 3), (128, 64, 8, 3),
)  # fmt: skip
_MASS = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w}
    for m, n, w in ((64, 64, 4), (128, 32, 4), (128, 64, 8), (64, 32, 2))
]
_UPDATE_AND_SORT = [
    {"BLOCK_M": m, "num_warps": w} for m, w in ((16, 2), (64, 8), (64, 16), (128, 8))
]
_THRESHOLD = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_SCAN": s, "num_warps": w}
    for m, n, s, w in ((16, 32, 256, 8), (16, 32, 64, 4), (16, 32, 128, 2), (16, 32, 64, 2))
]
_ROTATE = [
    {"BLOCK_M": m, "num_warps": w}
    for m, w in ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8))
]
_PRODUCT = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s}
    for m, n, k, w, s in (
        (128, 256, 128, 8, 4), (128, 256, 64, 8, 4), (256, 128, 128, 8, 3), (128, 128, 128, 4, 4),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A kernel, what is tried in the place of its config, and a call that it runs in.

    Attributes:
        kernel: its name in a profile.
        place: module of the kernels and name of the config in it.
        configs: entries that are replaced.
        case: sets the call up on a device, whose output has to stay what it is.
        alone: the call is this kernel and little else, so that its own time is taken.
    """

    kernel: str
    place: str
    configs: Sequence[Config]
    case: Callable[[Sizes], Callable[[], Tensor]]
    alone: bool = False


def items(sizes: Sizes) -> list[Item]:
    """List them, by how much of a layer's time each kernel takes."""
    attend, module = "_attend", "block_sparse_attention.attention_config"

    def sparse(name: str, queries: int, keys: int, int8: bool = False) -> Sweep:
        configs = _ATTEND if SHAPES[name].head_dim == 128 else _ATTEND_64
        place = module
        if sizes.on_hopper and not int8:
            configs, place = _ON_HOPPER, "hopper_attention.hopper_config"
        case = partial(_sparse_case, name=name, clusters=(queries, keys), int8=int8)
        return Sweep(attend, place, configs, case, alone=True)

    def layer(kernel: str, place: str, configs: Sequence[Config]) -> Sweep:
        return Sweep(kernel, place, configs, _layer_case)

    rotate, rotation = "_rotate_quantise", "rotate.rotate_config"
    sweeps = {
        f"{attend} {_WAN} 100/500": sparse(_WAN, 100, 500),
        f"{attend} {_WAN} 300/1000": sparse(_WAN, 300, 1000),
        f"{rotate} int8": Sweep(rotate, rotation, _ROTATE, _rotate_case, alone=True),
        f"{rotate} nvint4": Sweep(
            rotate, rotation, _ROTATE, partial(_rotate_case, small=True), alone=True
        ),
        "_product int8": Sweep(
            "_product", "product.product_config", _PRODUCT, _product_case, alone=True
        ),
        "_assign": layer("_assign", "kmeans.assign_config", _ASSIGN),
        "_mass": layer("_mass", "query_mass.mass_config", _MASS),
        "_update_and_sort": layer(
            "_update_and_sort", "kmeans.update_and_sort_config", _UPDATE_AND_SORT
        ),
        "_threshold": layer("_threshold", "select.threshold_config", _THRESHOLD),
        f"{attend} {_SMALL_HEADS}": sparse(_SMALL_HEADS, 64, 128),
        f"{attend} {_WAN} 100/500, int8": sparse(_WAN, 100, 500, int8=True),
    }
    dry = ("_assign", "_threshold", "_product int8", f"{rotate} nvint4")
    return [
        Item(name, partial(_swept, sizes, sweep), 15, 16, name not in dry)
        for name, sweep in sweeps.items()
    ]


def _sparse_case(
    sizes: Sizes, *, name: str, clusters: tuple[int, int], int8: bool
) -> Callable[[], Tensor]:
    """Attend to a random selection of 30 %."""
    from vidaccel.kernels.block_sparse_attention import block_sparse_attention

    shape = sizes.clustered(name, *clusters)
    tensors = video_like(sizes.device, shape, sizes.dtype)
    drawn = draw_selection(sizes.device, shape, sizes.of(0.3, 0.5))
    lists = (drawn.q_offsets, drawn.k_offsets, drawn.selection)
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "int8_qk": int8, "impl": "triton"}

    def run() -> Tensor:
        out: Tensor = block_sparse_attention(*tensors, *lists, **options)[0]
        return out

    return run


def _layer_case(sizes: Sizes) -> Callable[[], Tensor]:
    """Run a whole layer, from the same centroids each time, so that outputs can be compared."""
    from vidaccel.kernels.semantic_attention import semantic_attention

    shape = sizes.shape(_WAN)
    q, k, v = video_like(sizes.device, shape, sizes.dtype)
    # Little is selected: how long attention takes does not matter here.
    config = SemanticConfig(
        shape.query_clusters,
        shape.key_clusters,
        top_p=0.1,
        min_ratio=0.01,
        init_iters=sizes.of(10, 1),
        mass_averaging=True,
    )
    first = SemanticState()
    semantic_attention(q, k, v, first, config, impl="triton")

    def run() -> Tensor:
        state = SemanticState(query=first.query, key=first.key)
        out: Tensor = semantic_attention(q, k, v, state, config, impl="triton")
        return out

    return run


def _rotate_case(sizes: Sizes, *, small: bool = False) -> Callable[[], Tensor]:
    """Rotate and round the activations of a layer: as int8 is, or with scales of small blocks."""
    from vidaccel.kernels.linear import rotate_quantise

    x = torch.randn(sizes.of((75_600, 5120), (40, 256)), device=sizes.device.name).to(sizes.dtype)
    rotation = torch.linalg.qr(torch.randn(16 if small else 256, 16 if small else 256)).Q.to(x)
    options: dict[str, Any] = {"rotation": rotation, "impl": "triton"}
    if small:
        unit = x.abs().max().float() / (448 * 7)
        options |= {"qmax": 7, "block": 16, "scale_format": "e4m3", "tensor_scale": unit}

    def run() -> Tensor:
        codes: Tensor = rotate_quantise(x, **options)[0]
        return codes

    return run


def _product_case(sizes: Sizes) -> Callable[[], Tensor]:
    """Multiply in int8."""
    from vidaccel.kernels.linear import quantised_linear

    rows, channels, outputs = sizes.of((75_600, 5120, 13_824), (40, 64, 32))
    on: Any = {"device": sizes.device.name}
    codes, weight = (
        torch.randint(-127, 128, (count, channels), dtype=torch.int8, **on)
        for count in (rows, outputs)
    )
    scales, weight_scales = (torch.rand(count, 1, **on) for count in (rows, outputs))
    options: dict[str, Any] = {"out_dtype": sizes.dtype, "impl": "triton"}

    def run() -> Tensor:
        out: Tensor = quantised_linear(codes, scales, weight, weight_scales, **options)
        return out

    return run


def _swept(sizes: Sizes, sweep: Sweep) -> dict[str, Any]:
    """Time a kernel in its shipped config and in others; the shipped one at both ends."""
    run = sweep.case(sizes)
    expected = run()
    rows: list[dict[str, Any]] = []
    for changed in (None, *sweep.configs[: sizes.of(MOST - 1, 1)], None):
        try:
            with replaced(sweep.place, sizes.of(changed, None) or {}):
                rows.append({"config": changed or "shipped"} | _timed(sizes, sweep, run, expected))
        except Exception as error:  # one that does not fit this chip is no candidate
            rows.append({"config": changed, "failed": f"{type(error).__name__}: {error}"[:300]})
    right = [row for row in rows if row.get("error", 1.0) < 1e-2]
    best = min(right, key=lambda row: row["microseconds"])["config"] if right else None
    return {"place": sweep.place, "rows": rows, "best": best}


def _timed(
    sizes: Sizes, sweep: Sweep, run: Callable[[], Tensor], expected: Tensor
) -> dict[str, Any]:
    """Return the microseconds of a kernel in a call, and how far the call's output is off."""
    found, wanted = run().float(), expected.float()
    error = float((found - wanted).norm() / wanted.norm())
    del found, wanted
    if sweep.alone:
        return {
            "microseconds": 1e3 * sizes.device.milliseconds(run, sizes.repeat_ms),
            "error": error,
        }

    def several() -> None:
        for _ in range(sizes.of(_CALLS, 1)):
            run()

    counts = sizes.device.counted(several)
    # A profile has no kernels where there is no GPU.
    time = counts.kernels.get(sweep.kernel, float("nan") if sizes.device.on_gpu else 1.0)
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
