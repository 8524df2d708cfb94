"""Other machines than the one that runs the tests, as far as somebody asks about them."""

import sys

import pytest
import torch

from vidaccel.svg2 import gate


def card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), hip: str | None = None
) -> None:
    """Let the machine have a GPU that no kernel is tried on; AMD's with a version of HIP."""
    monkeypatch.setattr(gate, "why_kernels_fail", lambda *args, **options: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def offloaded_to(device: str, transformer: torch.nn.Module) -> None:
    """Let a transformer be moved to a device for its calls, as `enable_model_cpu_offload` does."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(transformer, CpuOffload(execution_device=device))


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no module of kernels find Triton, also those that have found it before."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vidaccel.kernels.") and hasattr(module, "triton"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "vidaccel.kernels.semantic_attention_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
