"""Tells before a run whether the attention of a transformer can be sparse, and here."""

from typing import Any

import torch
from torch import nn

from vidaccel.engine.compat import offload_device
from vidaccel.errors import AttentionError
from vidaccel.hosts.spec import HostSpec
from vidaccel.kernels.common import DTYPES, HEAD_DIMS, why_no_kernels


def gpu_of(transformer: nn.Module) -> torch.device | None:
    """Return the GPU on which a transformer is, or to which its offloading moves it for a call.

    None where it runs on the CPU, as long as nobody moves it.
    """
    device = offload_device(transformer)
    if device is None:
        device = next((x.device for x in transformer.parameters()), torch.device("cpu"))
    return None if device.type in ("cpu", "meta") else device


def gpu_here() -> torch.device | None:
    """Return a GPU of this machine, to which a transformer may yet be moved; None without one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.accelerator.current_accelerator(check_available=True)


def why_dense(transformer: nn.Module, host: HostSpec) -> str:
    """Return why the self-attention of a transformer cannot be made sparse; empty when it can."""
    # Only here, since Diffusers' attention takes seconds to import.
    from vidaccel.svg2.interception import Interception

    if host.attention is None:
        return host.attention_note or "its row names no self-attention"
    config: Any = transformer.config
    if config.get("attention_type") == "nabla":
        return "its own sparse attention (NABLA) is on"
    try:
        Interception(attention_modules(transformer, host))
    except AttentionError as error:
        return str(error)
    return ""


def why_not_on(gpu: torch.device, transformer: nn.Module, host: HostSpec) -> str:
    """Return why the kernels cannot run on a GPU for a transformer; empty when they can.

    Args:
        gpu: where it runs.
        transformer: one whose attention can be made sparse, by `why_dense`.
        host: its row of the table.
    """
    floats = (x.dtype for x in transformer.parameters() if x.is_floating_point())
    dtype = next(floats, torch.float32)
    # Weights may be kept in another dtype than they are computed in, but never in a wider one.
    wide = dtype if dtype == torch.float64 else torch.float32
    return why_no_kernel_for(head_size(transformer, host), wide) or why_no_kernels(gpu)


def why_no_kernel_for(head_dim: int | None, dtype: torch.dtype) -> str:
    """Return why there is no kernel for heads of this size (None: unknown) and this dtype."""
    if head_dim is not None and head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        return f"there are kernels for heads of size {known}, and its heads have {head_dim}"
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, and this is {_name(dtype)}"
    return ""


def head_size(transformer: nn.Module, host: HostSpec) -> int | None:
    """Return the size of the heads of the self-attention; None where nothing tells it."""
    module: Any = attention_modules(transformer, host)[0]
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    for name in ("to_q", "to_query"):
        width = getattr(getattr(module, name, None), "out_features", None)
        if isinstance(heads, int) and isinstance(width, int):
            return width // heads
    config: Any = transformer.config
    size = config.get("attention_head_dim")
    return size if isinstance(size, int) else None


def attention_modules(transformer: nn.Module, host: HostSpec) -> list[nn.Module]:
    """Return the self-attention modules, in the order in which the blocks run.

    Raises:
        AttentionError: a block has none at the path of the row.
    """
    stacks: list[Any] = [transformer.get_submodule(spec.name) for spec in host.blocks]
    blocks = [block for stack in stacks for block in stack]
    try:
        return [block.get_submodule(host.attention) for block in blocks]
    except AttributeError as error:
        raise AttentionError(f"a block has no self-attention {host.attention!r}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
