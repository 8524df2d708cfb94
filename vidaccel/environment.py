"""What this machine has: versions, hardware, and which parts of vidaccel work here."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
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
    "scikit-image",
    "gradio",
    "ray",
)


def embedded_model() -> Path:
    """Folder of tiny-wan, the text-to-video model that comes with vidaccel."""
    return Path(str(files("vidaccel.assets").joinpath("tiny-wan")))


def shipped_policies() -> dict[str, Path]:
    """The policy files that come with vidaccel: <org>--<model>/<name>.json -> path, sorted."""
    return {
        f"{folder.name}/{file.name}": Path(str(file))
        for folder in sorted(files("vidaccel.policies").iterdir(), key=lambda entry: entry.name)
        if folder.is_dir()
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".json")
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, as every result file records them.

    Returns:
        "vidaccel", "python", "platform", "cpu", "cores", "threads" (of torch), "gpus" (a list of
        name, GiB and compute capability) and "packages" (name -> version, missing ones left out).
    """
    import torch

    import vidaccel

    gpus = [
        {
            "name": (properties := torch.cuda.get_device_properties(i)).name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "vidaccel": vidaccel.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def capabilities() -> dict[str, str]:
    """What works here: part of vidaccel -> "yes" with what it found, or "no" with what to do."""
    import torch

    from vidaccel.hosts import HOSTS

    def extra(name: str, *modules: str) -> str:
        missing = [module for module in modules if find_spec(module) is None]
        return f'no: pip install "vidaccel[{name}]"' if missing else "yes"

    supported = [name for name, row in HOSTS.items() if not row.unsupported]
    return {
        "step plans": f"yes: {', '.join(supported)}",
        "embedded model": f"yes: {embedded_model()}"
        if (embedded_model() / "model_index.json").is_file()
        else "no: reinstall vidaccel",
        "policies": f"{len(shipped_policies())} shipped",
        "GPU": "yes" if torch.cuda.is_available() else "no: runs on the CPU",
        "video files": _ffmpeg(),
        "SSIM": extra("metrics", "skimage"),
        "LPIPS": extra("metrics", "lpips", "torchvision"),
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


def _ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version

        get_ffmpeg_exe()
        return f"yes: ffmpeg {get_ffmpeg_version()}"
    except (ImportError, OSError, RuntimeError):
        return "no: pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
