"""What a pipeline consists of, and what it runs."""

from typing import Any

from vidaccel.hosts import find_transformers


def transformers_of(pipe: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2")
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
