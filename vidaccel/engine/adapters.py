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
