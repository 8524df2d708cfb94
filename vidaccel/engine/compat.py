"""Every use of private API of Diffusers: the one place to check with a new release."""

from typing import Any

import torch
from torch import Tensor, nn


def native_cache_enabled(transformer: nn.Module) -> bool:
    """Tell whether one of Diffusers' own caches is enabled on a transformer."""
    return getattr(transformer, "_cache_config", None) is not None


# What other caches leave on a transformer that they work on.
_OTHER_CACHES = {"_is_cached": "cache-dit or ParaAttention", "enable_teacache": "TeaCache"}


def other_cache(transformer: nn.Module) -> str:
    """Return the name of another library's cache that works on a transformer; empty for none."""
    found = (name for mark, name in _OTHER_CACHES.items() if getattr(transformer, mark, False))
    return next(found, "")


def compiled_as_a_whole(transformer: nn.Module) -> bool:
    """Tell whether a transformer went through `torch.compile` as one module."""
    return hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None


def original_class(module: Any) -> type:
    """Return the class of a module, or that of the module inside of a compiled one."""
    return type(getattr(module, "_orig_mod", module))


# What pipelines call on their transformer when a generation has ended.
RESET_CACHE = "_reset_stateful_cache"


def reset_cache(transformer: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run the class's own method of that name."""
    own: Any = type(transformer)
    own._reset_stateful_cache(transformer, *args, **kwargs)


def has_adapters(transformer: nn.Module) -> bool:
    """Tell whether adapters (LoRA) were loaded into a transformer."""
    return bool(getattr(transformer, "_hf_peft_config_loaded", False))


def parallel_config(transformer: nn.Module) -> Any:
    """Return the `ParallelConfig` that is enabled on a transformer; None without one."""
    return getattr(transformer, "_parallel_config", None)


def context_parallel_group(context_parallel_config: Any) -> Any:
    """Return the process group of a context-parallel mesh."""
    return context_parallel_config._flattened_mesh.get_group()


def input_split_hooks(block: nn.Module) -> tuple[Any, ...]:
    """Return the hooks in which Diffusers splits the tokens that a block is given over ranks."""
    registry = vars(block).get("_diffusers_hook")
    if registry is None:
        return ()
    return tuple(hook for name, hook in registry.hooks.items() if name.startswith("cp_input"))


def progress_bar_config(pipe: Any) -> dict[str, Any]:
    """Return the options of a pipeline's progress bar."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def owners_of_loops(pipe: Any) -> list[Any]:
    """Return what makes the progress bars of a pipeline: itself, or loops among its blocks."""
    blocks = vars(pipe).get("_blocks")
    return [pipe] if blocks is None else [part for part in _parts(blocks) if _has_loop(part)]


def _parts(blocks: Any) -> list[Any]:
    """The blocks of a modular pipeline, and those inside of them."""
    inner = getattr(blocks, "sub_blocks", {}).values()
    return [blocks, *(part for block in inner for part in _parts(block))]


def _has_loop(blocks: Any) -> bool:
    return hasattr(type(blocks), "progress_bar")


def guiders_of(pipe: Any) -> list[Any]:
    """Return the guiders among the components of a pipeline."""
    return [part for part in list(vars(pipe).values()) if hasattr(part, "prepare_models")]


def prepared_by(guider: Any) -> tuple[Any, int] | None:
    """Return step and number of the condition that a guider has prepared last; None before one."""
    state = guider.get_state()
    return (state["step"], state["count_prepared"]) if state["count_prepared"] else None


def time_of(guider: Any) -> float:
    """Return the time of the step that a guider is in."""
    return float(guider.get_state()["timestep"])


def guidance_branch(guider: Any) -> str | None:
    """Return the name of the condition that a guider has prepared last; None where it has none."""
    batches = guider.prepare_inputs({})  # one for each condition of the step, with its name alone
    position = guider.get_state()["count_prepared"] - 1
    if position >= len(batches):
        return None
    return getattr(batches[position], guider._identifier_key, None)


def offload_device(transformer: nn.Module) -> torch.device | None:
    """Return the device to which hooks move weights and inputs for a call; None without such."""
    for module in transformer.modules():
        hook: Any = vars(module).get("_hf_hook")
        registry: Any = vars(module).get("_diffusers_hook")
        groups = [] if registry is None else registry.hooks.values()
        devices = [
            *(getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))),
            *(getattr(getattr(part, "group", None), "onload_device", None) for part in groups),
        ]
        if found := next((device for device in devices if device is not None), None):
            return torch.device(found)
    return None


def sequential_offload(transformer: nn.Module) -> tuple[Any, bool] | None:
    """Return device and whether buffers move too where layers are offloaded one by one."""
    for module in transformer.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if part is not None and getattr(part, "offload", False) is True:
                return part.execution_device, part.offload_buffers
    return None


def remove_sequential_offload(transformer: nn.Module) -> None:
    """Give every layer its own weights again."""
    from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]

    remove_hook_from_module(transformer, recurse=True)


def sequential_offload_again(transformer: nn.Module, found: tuple[Any, bool]) -> None:
    """Offload layers one by one, as `sequential_offload` has found it."""
    from accelerate import cpu_offload  # type: ignore[import-untyped]

    device, buffers = found
    cpu_offload(transformer, device, offload_buffers=buffers)


def group_offload_again(transformer: nn.Module) -> None:
    """Have group offloading, where it is enabled, know the layers that there are now."""
    from diffusers.hooks import group_offloading

    group_offloading._maybe_remove_and_reapply_group_offloading(transformer)


def templated_context_parallel_attention(*args: Any, **kwargs: Any) -> Any:
    """Attention over the tokens of several ranks around a function for those of one."""
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    return _templated_context_parallel_attention(*args, **kwargs)


def full_precision_modules(transformer_class: type) -> list[str]:
    """Return the last names of the modules that loading a class of transformer keeps in float32."""
    return list(getattr(transformer_class, "_keep_in_fp32_modules", None) or [])


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices [M, K] and [K, N] of int8, as int32, by torch's own kernel."""
    return torch._int_mm(a, b)
