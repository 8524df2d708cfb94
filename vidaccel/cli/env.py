"""The commands `vidaccel env` and `vidaccel hosts`: what works here, and for which models."""

import argparse
import json
from importlib.util import find_spec
from typing import Any

from vidaccel.cli.options import add_command


def add_env(commands: Any) -> None:
    """Add `vidaccel env`."""
    parser = add_command(commands, "env", "versions, GPU and what works here, for bug reports")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_env)


def add_hosts(commands: Any) -> None:
    """Add `vidaccel hosts`."""
    parser = add_command(commands, "hosts", "print the table of supported models")
    parser.set_defaults(run=_hosts)


def _env(arguments: argparse.Namespace) -> None:
    """Run `vidaccel env`."""
    from vidaccel.environment import environment

    found, works = environment(), capabilities()
    if arguments.json:
        print(json.dumps({**found, "works": works}, indent=2))
        return
    packages = found.pop("packages")
    found["gpus"] = ", ".join(
        f"{gpu['name']} ({gpu['memory_gib']} GiB, sm {gpu['compute_capability']})"
        for gpu in found["gpus"]
    )
    for title, part in (
        ("", found),
        ("packages", packages),
        ("what works here", works),
    ):
        if title:
            print(f"\n{title}")
        for name, value in part.items():
            print(f"{name.ljust(15)} {value or '-'}")


def _hosts(arguments: argparse.Namespace) -> None:
    """Run `vidaccel hosts`."""
    from vidaccel.hosts.registry import markdown_table

    print(markdown_table())


def capabilities() -> dict[str, str]:
    """Find out what works here.

    Returns:
        Part of vidaccel -> "yes" with what was found, or "no" with what to do.
    """
    import torch

    from vidaccel.clips.embedded import embedded_model
    from vidaccel.hosts.registry import HOSTS
    from vidaccel.plans.shipped import shipped_policies

    def extra(name: str, *modules: str) -> str:
        """Say whether all modules of an optional part are installed."""
        missing = [module for module in modules if find_spec(module) is None]
        return f'no: pip install "vidaccel[{name}]"' if missing else "yes"

    supported = [name for name, row in HOSTS.items() if not row.unsupported]
    model = embedded_model()
    return {
        "step plans": f"yes: {', '.join(supported)}",
        "embedded model": f"yes: {model}"
        if (model / "model_index.json").is_file()
        else "no: reinstall vidaccel",
        "policies": f"{len(shipped_policies())} shipped",
        "GPU": "yes" if torch.cuda.is_available() else "no: runs on the CPU",
        "video files": _ffmpeg(),
        "SSIM": extra("metrics", "skimage"),
        "LPIPS": extra("metrics", "lpips", "torchvision"),
    }


def _ffmpeg() -> str:
    """Say which ffmpeg program there is, or how to get one."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version

        get_ffmpeg_exe()
        return f"yes: ffmpeg {get_ffmpeg_version()}"
    except (ImportError, OSError, RuntimeError):
        return "no: pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
