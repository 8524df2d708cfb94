"""Versions and hardware of this machine, as every result file records them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "numpy",
    "peft",
    "torchvision",
    "lpips",
    "cvvdp",
    "scikit-image",
    "gradio",
    "ray",
)


def vidaccel_version() -> str:
    """Return the version of the installed package; "0+source" for a bare clone."""
    return _version("vidaccel") or "0+source"


def environment() -> dict[str, Any]:
    """Return versions and hardware, as every result file records them.

    Returns:
        "vidaccel", "python", "platform", "cpu", "cores", "threads" (of torch), "gpus" (a list of
        name, GiB and compute capability) and "packages" (name -> version, missing ones left out).
    """
    import torch

    gpus = [
        {
            "name": (properties := torch.cuda.get_device_properties(i)).name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "vidaccel": vidaccel_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package; None for one that is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
