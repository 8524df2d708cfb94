"""Which adapters (LoRA) are at work in a transformer."""

from typing import Any


def active_adapters(transformer: Any) -> tuple[str, ...]:
    """Names of the adapters that change what `transformer` computes, in alphabetical order.

    Fused ones count, disabled ones do not. One that was fused and then unloaded cannot be told from
    weights that were trained that way.
    """
    if not getattr(transformer, "_hf_peft_config_loaded", False):
        return ()
    loaded = set(getattr(transformer, "peft_config", {}))
    found: set[str] = set()
    for module in transformer.modules():
        if not getattr(module, "disable_adapters", True):
            found |= loaded & {*module.active_adapters, *module.merged_adapters}
    return tuple(sorted(found))
