"""Launches kernels on the device of their tensors, within the limits of a grid, for its chip."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from vidaccel.kernels.common import MAX_GRID_Y, KernelError

MAX_GRID_X = 2**31 - 1


def launch(kernel: Any, device: torch.device, *grid: int) -> Callable[..., None]:
    """Return what launches a kernel on a device, whichever is the current one.

    Triton takes the current device and its stream, which need not be those of the tensors.

    Args:
        kernel: a Triton function.
        device: where its tensors lie.
        grid: number of programs along one or two axes.

    Raises:
        KernelError: CUDA has no grid as large as that.
    """
    tiles, batch_heads = (*grid, 1)[:2]
    if batch_heads > MAX_GRID_Y or tiles > MAX_GRID_X:
        raise KernelError(
            f"a grid of {tiles:,} x {batch_heads:,} programs is over the {MAX_GRID_X:,} x "
            f"{MAX_GRID_Y:,} of a GPU (the second is batch items x heads, of queries and keys "
            "together where both are clustered): split the batch"
        )

    def run(*args: Any, **kwargs: Any) -> None:
        with on_device(device):
            kernel[grid](*args, **kwargs)

    return run


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one for the time being."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chip(device: torch.device) -> int:
    """Return the row of configs that a device takes: a compute capability; 90 if interpreted."""
    return _chip(device.index or 0) if device.type == "cuda" else 90


@lru_cache
def _chip(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return major * 10
