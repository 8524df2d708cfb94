"""The part "precision": linear layers in whole numbers, beside those of the library in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.gpu_sampled import spread
from vidaccel.bench.kernel_checks import CheckError
from vidaccel.engine.compat import int8_product

_TOKENS = {"Wan-14B 720p": 75_600, "Wan-1.3B 480p": 32_760}
# Channels in and out of the linear layers of a block.
_LAYERS = {
    "Wan-14B 720p": {"attention": (5120, 5120), "up": (5120, 13_824), "down": (13_824, 5120)},
    "Wan-1.3B 480p": {"attention": (1536, 1536), "up": (1536, 8960), "down": (8960, 1536)},
}


@dataclass(frozen=True)
class _Format:
    """A format as the kernels take it.

    Attributes:
        qmax: largest code.
        block: channels to a scale; None: one scale per token and output channel.
        scale_format: the numbers that scales may be.
        packed: two codes of a weight lie in a byte.
        group: channels that are rotated together, as `LowPrecision` has them.
    """

    qmax: int = 127
    block: int | None = None
    scale_format: str = "float32"
    packed: bool = False
    group: int = 16


_FORMATS = {
    "int8": _Format(group=256),
    "mxint8": _Format(block=32, scale_format="ue8m0"),
    "nvint4": _Format(7, 16, "e4m3", packed=True),
    "mxint4": _Format(7, 32, "ue8m0", packed=True),
}
_ROWS = 32  # that are held against float64


def items(sizes: Sizes) -> list[Item]:
    """List them: the format of the preset before the others, the large model before the small."""
    listed: list[Item] = []
    for model, layers in _LAYERS.items():
        for layer in layers:
            repeats = bool(listed)
            run = partial(_sixteen, sizes, model, layer)
            listed.append(
                Item(f"{model} {layer}, 16 bits and int8 by torch", run, 4, repeats=repeats)
            )
            for name in _FORMATS:
                run = partial(_format, sizes, model, layer, name)
                listed.append(Item(f"{model} {layer}, {name}", run, 5, repeats=repeats))
    listed.append(Item("token_haar", partial(_haar, sizes), 8))
    return listed


def _tensors(sizes: Sizes, model: str, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw activations with some large channels, as trained models have, a weight and a bias."""
    torch.manual_seed(0)
    inputs, outputs = sizes.of(_LAYERS[model][layer], (64, 32))
    on: Any = {"device": sizes.device.name, "dtype": sizes.dtype}
    x = torch.randn(sizes.of(_TOKENS[model], 40), inputs, **on)
    x[:, :: inputs // 8] *= 20
    return x, torch.randn(outputs, inputs, **on) * inputs**-0.5, torch.randn(outputs, **on)


def _rate(
    sizes: Sizes, x: Tensor, weight: Tensor, milliseconds: float, bits: int
) -> dict[str, Any]:
    """Return the time of a product, its operations per second, and their share of the peak."""
    rate = 2 * x.shape[0] * weight.shape[0] * weight.shape[1] / milliseconds / 1e9
    peak = sizes.device.peak_rate(bits)
    return {
        "milliseconds": milliseconds,
        "tera_operations": rate,
        "share_of_datasheet_peak": None if peak is None else rate * 1e12 / peak,
    }


def _sixteen(sizes: Sizes, model: str, layer: str) -> dict[str, Any]:
    """Time the product of the library in 16 bits, and its bare product of whole numbers."""
    x, weight, bias = _tensors(sizes, model, layer)
    time = sizes.device.milliseconds(lambda: linear(x, weight, bias), sizes.repeat_ms)
    found = {"sixteen": _rate(sizes, x, weight, time, 16)}
    codes, weights = (torch.clamp(y * 20, -127, 127).to(torch.int8) for y in (x, weight))
    time = sizes.device.milliseconds(lambda: int8_product(codes, weights.T), sizes.repeat_ms)
    return found | {"int8_by_torch": _rate(sizes, x, weight, time, 8)}


def _format(sizes: Sizes, model: str, layer: str, name: str) -> dict[str, Any]:
    """Time rounding and product of a format, and hold sampled rows against float64.

    Raises:
        CheckError: the kernels differ from their reference.
    """
    from vidaccel.kernels import linear as kernels

    chosen, device = _FORMATS[name], sizes.device
    x, weight, bias = _tensors(sizes, model, layer)
    # Regular Hadamard matrix: symmetric, orthogonal, every entry of one size.
    rotation = four = torch.ones(4, 4, device=x.device) - 2 * torch.eye(4, device=x.device).flip(0)
    while len(rotation) < sizes.of(chosen.group, 16):
        rotation = torch.kron(rotation, four)
    rotation = (rotation / len(rotation) ** 0.5).to(x.dtype)
    rounding: dict[str, Any] = {"block": chosen.block, "scale_format": chosen.scale_format}
    rounding["qmax"] = chosen.qmax
    scales_of = {"x": x, "weight": weight}
    tensor_scales: Mapping[str, Tensor | None] = dict.fromkeys(scales_of)
    if chosen.scale_format == "e4m3":  # 448 is its largest number
        tensor_scales = {
            key: (value.abs().max().float() / (448 * chosen.qmax))
            for key, value in scales_of.items()
        }
    weight_codes, weight_scales = kernels.rotate_quantise(
        weight, rotation=rotation, tensor_scale=tensor_scales["weight"], **rounding, impl="triton"
    )
    stored = kernels.pack_int4(weight_codes) if chosen.packed else weight_codes

    def rounded() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = kernels.rotate_quantise(
            x, rotation=rotation, tensor_scale=tensor_scales["x"], **rounding, impl="triton"
        )
        return found

    codes, scales = rounded()
    options: dict[str, Any] = {"block": chosen.block, "packed": chosen.packed}
    options["out_dtype"] = x.dtype

    def product() -> Tensor:
        found: Tensor = kernels.quantised_linear(
            codes, scales, stored, weight_scales, bias, **options, impl="triton"
        )
        return found

    out = product()
    rows = spread(x.shape[0], _ROWS).to(x.device)
    wide = _widened(codes[rows], scales[rows]) @ _widened(weight_codes, weight_scales).T
    wide += bias.double()
    error = float((out[rows].double() - wide).norm() / wide.norm())
    limit = 1e-2
    if not error <= limit:
        raise CheckError(f"{name}: error {error:.2e}, at most {limit:.2e} allowed")
    plain = x[rows].double() @ weight.double().T + bias.double()
    times = [device.milliseconds(run, sizes.repeat_ms) for run in (rounded, product)]
    moved = x.numel() * (x.element_size() + 1) / times[0] / 1e6
    return {
        "error": error,
        "limit": limit,
        "error_of_rounding": float((wide - plain).norm() / plain.norm()),
        "round": {"milliseconds": times[0], "gb_per_s": moved},
        "product": _rate(sizes, x, weight, times[1], 8),
        "both_ms": sum(times),
    }


def _widened(codes: Tensor, scales: Tensor) -> Tensor:
    """Return what codes [R, K] and their scales [R, K / block] stand for, in float64."""
    return codes.double() * scales.double().repeat_interleave(
        codes.shape[1] // scales.shape[1], dim=1
    )


def _haar(sizes: Sizes) -> dict[str, Any]:
    """Time the transform of tokens and its inverse, which must give the tokens back.

    Raises:
        CheckError: it does not.
    """
    from vidaccel.kernels.linear import token_haar

    grid = sizes.of((21, 45, 80), (3, 4, 5))
    shape = (1, grid[0] * grid[1] * grid[2], sizes.of(5120, 16))
    x = torch.randn(shape, device=sizes.device.name, dtype=sizes.dtype)
    there = token_haar(x, grid, impl="triton")
    back = token_haar(there, grid, inverse=True, impl="triton")
    error = float((back - x).norm() / x.norm())
    if not error <= 2e-2:
        raise CheckError(f"token_haar and its inverse: error {error:.2e}, at most 2e-2 allowed")
    found: dict[str, Any] = {"error": error}
    for name, y, inverse in (("forward", x, False), ("inverse", there, True)):
        time = sizes.device.milliseconds(
            partial(token_haar, y, grid, inverse=inverse, impl="triton"), sizes.repeat_ms
        )
        rate = 2 * x.numel() * x.element_size() / time / 1e6
        found[name] = {"milliseconds": time, "gb_per_s": rate}
    return found
