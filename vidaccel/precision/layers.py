"""Finds the linear layers of the blocks of a transformer, and says which are left alone and why."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from vidaccel.errors import PrecisionError
from vidaccel.hosts.spec import HostSpec

_TWICE = (
    "is quantised already ({found}), and would be a second time: load the pipeline without its "
    "quantization_config, or accelerate without precision"
)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(NamedTuple):
    """A linear layer of a block.

    Attributes:
        name: its dotted name in the transformer, without adapters.
        parent, key: the module that holds it, and its name there.
        module: the layer.
    """

    name: str
    parent: nn.Module
    key: str
    module: nn.Linear


def linear_layers(transformer: nn.Module, host: HostSpec) -> list[Layer]:
    """Return the linear layers of the blocks, in their order; those of adapters are not among them.

    Raises:
        PrecisionError: there are none, or one is quantised already.
    """
    found = []
    for blocks in host.blocks:
        for position, block in enumerate(getattr(transformer, blocks.name)):
            found += list(_inside(block, f"{blocks.name}.{position}"))
    if not found:
        raise PrecisionError(
            f"{type(transformer).__name__} has no linear layers in its blocks: pass precision=None"
        )
    for layer in found:
        _check(layer, type(transformer).__name__)
    return found


def _inside(module: nn.Module, name: str) -> Iterator[Layer]:
    # An adapter's own layers stay as they are, around the layer that it is on top of.
    adapter = isinstance(getattr(module, "base_layer", None), nn.Module)
    for key, child in module.named_children():
        if adapter and key != "base_layer":
            continue
        # Under the name that it has without the adapter, which calibrations know.
        own = name if adapter else f"{name}.{key}"
        if isinstance(child, nn.Linear) or _quantised_as(child):
            # Of a layer in low precision, the one that it stands for.
            yield Layer(own, module, key, vars(child).get("stock", child))
        else:
            yield from _inside(child, own)


def _check(layer: Layer, model: str) -> None:
    """Refuse a layer whose weight is no plain numbers."""
    weight = layer.module.weight
    if found := _quantised_as(layer.module):
        raise PrecisionError(f"{layer.name} of {model} {_TWICE.format(found=found)}")
    if weight.dtype not in _TYPES:
        raise PrecisionError(
            f"{layer.name} of {model} has weights of {weight.dtype}: low precision starts from "
            "float32, bfloat16 or float16 (layerwise casting comes after accelerate)"
        )


def _quantised_as(module: nn.Module) -> str:
    """Return the class that tells that a layer is quantised; empty when it is not."""
    if type(module) is nn.Linear:
        weight = module.weight
        kind = type(weight) if type(weight) is not nn.Parameter else type(weight.data)
        return "" if kind is torch.Tensor else kind.__name__
    library = type(module).__module__.split(".")[0]
    quantised = isinstance(module, nn.Linear) or library in ("bitsandbytes", "torchao", "optimum")
    return type(module).__name__ if quantised and hasattr(module, "weight") else ""


def why_left_alone(layer: Layer, skip: tuple[str, ...], block: int | None, packed: bool) -> str:
    """Return why a layer stays as it is; empty when it does not.

    Args:
        layer: the layer.
        skip: parts of names that were asked to be left alone.
        block: channels with one scale.
        packed: two channels share a byte.
    """
    name, channels = f"{layer.name}.", layer.module.in_features
    if part := next((part for part in skip if part in name), None):
        return f"skipped ({part})"
    if channels % (block or (2 if packed else 1)):
        return f"{channels} channels are no whole blocks of {block or 2}"
    return ""
