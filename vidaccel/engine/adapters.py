"""Finds the adapters (LoRA) that are at work in a transformer."""

from typing import Any

from vidaccel.engine.compat import has_adapters


def active_adapters(transformer: Any) -> tuple[str, ...]:
    """Return the names of the adapters that change what `transformer` computes, sorted.

    Fused ones count, disabled ones do not. One that was fused and then unloaded cannot be told from
    weights that were trained that way.
    """
    if not has_adapters(transformer):
        return ()
    loaded = set(getattr(transformer, "peft_config", {}))
    found: set[str] = set()
    for module in transformer.modules():
        if not getattr(module, "disable_adapters", True):
            found |= loaded & {*module.active_adapters, *module.merged_adapters}
    return tuple(sorted(found))


def adapter_state(transformer: Any) -> tuple[Any, ...]:
    """Return what tells the adapters at work and their strengths from others; empty for none."""
    if not has_adapters(transformer):
        return ()
    return tuple(
        (
            bool(module.disable_adapters),
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            tuple(module.scaling.get(name) for name in module.active_adapters),
        )
        for module in transformer.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "scaling")
    )
