"""What a pipeline consists of, and what it runs."""

from inspect import signature
from typing import Any

from torch import nn

from tiny.base import STEPS, Case
from vidaccel.hosts.registry import find_transformers


def transformers_of(pipe: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2", "transformer_ref", "unconditional_transformer")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def count_blocks(pipe: Any) -> dict[str, int]:
    """Counts the calls of every real block with hooks of its own; the dict is live."""
    counts = {"blocks": 0}

    def count(module: Any, args: Any) -> None:
        counts["blocks"] += 1

    for transformer, host in find_transformers(pipe).values():
        for blocks in host.blocks:
            for block in transformer._modules[blocks.name]:
                block.register_forward_pre_hook(count)
    return counts


def snapshot(module: nn.Module) -> dict[str, Any]:
    """What `restore` must leave as it was; attributes by identity."""
    hooks = {
        f"{name}.{kind}": list(getattr(child, kind).values())
        for name, child in module.named_modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks")
    }
    return {
        "attributes": {name: id(value) for name, value in vars(module).items()},
        "modules": [(name, id(child)) for name, child in module.named_modules()],
        "hooks": hooks,
        "forward": vars(module).get("forward"),
    }


def two_steps(case: Case) -> dict[str, int]:
    """The arguments for a run of two steps; those of a pipeline with a fixed number are none."""
    name = "num_inference_steps"
    if name not in case.kwargs and name not in signature(type(case.pipe).__call__).parameters:
        return {}
    # Some count the end of the last step as one.
    return {name: 2 + case.kwargs.get(name, STEPS) - STEPS}
