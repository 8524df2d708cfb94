"""Versions and hardware of this machine, as every result file records them."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The version of a bare clone on the import path.
SOURCE_VERSION = "0+source"

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
    "scikit-image",
    "gradio",
    "ray",
)


def environment() -> dict[str, Any]:
    """Versions and hardware, as every result file records them.

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
        "vidaccel": _version("vidaccel") or SOURCE_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
