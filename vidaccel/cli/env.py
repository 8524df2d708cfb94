"""The commands `vidaccel env` and `vidaccel hosts`: what works here, and for which models."""

import argparse
import json
import logging
from importlib import import_module
from importlib.util import find_spec
from textwrap import fill
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
    parser.add_argument(
        "--markdown", action="store_true", help="as Markdown, with the pipelines that are tested"
    )
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
            print(fill(f"{name.ljust(17)} {value or '-'}", 150, subsequent_indent=" " * 18))


def _hosts(arguments: argparse.Namespace) -> None:
    """Run `vidaccel hosts`."""
    from vidaccel.hosts.registry import left_out_list, markdown_table

    if arguments.markdown:
        print(f"{markdown_table()}\n\n{left_out_list()}")
    else:
        print(hosts_table())


def hosts_table() -> str:
    """Return the table of supported models for a terminal: a line each, reasons below it."""
    from vidaccel.hosts.registry import HOSTS

    rows = [("model", "step plans", "block cache", "SVG2", "diffusers")]
    reasons: dict[str, int] = {}
    left_out: dict[str, list[str]] = {}

    def no(reason: str) -> str:
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"

    for row in HOSTS.values():
        name = row.family or row.transformer
        if row.is_left_out:
            left_out.setdefault(row.unsupported, []).append(name)
            continue
        if row.unsupported:
            told = no(f"{row.transformer} {row.unsupported}")
            rows.append((name, told, told, told, f">= {row.since}"))
            continue
        cache = "yes" if row.threshold is None else f"yes, {row.threshold:g}"
        cache += ", no corrector" if row.no_corrector else ""
        attention = "yes" if row.attention else no(row.attention_note)
        rows.append((name, "yes", cache, attention, f">= {row.since}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    notes = [
        "",
        "block cache: the number is the threshold of DBCache; models without one need "
        "--cache THRESHOLD",
        *(f"({number}) {reason}" for reason, number in reasons.items()),
        "",
        "not supported:",
        *(f"{', '.join(names)}: {reason}" for reason, names in left_out.items()),
    ]
    return "\n".join(
        [
            lines[0],
            "-" * max(map(len, lines)),
            *lines[1:],
            *(fill(note, 100, subsequent_indent="    ") for note in notes),
        ]
    )


def capabilities() -> dict[str, str]:
    """Find out what works here.

    Returns:
        Part of vidaccel -> "yes" with what was found, or "no" with what to do.
    """
    import torch

    from vidaccel.clips.embedded import embedded_model
    from vidaccel.hosts.registry import families_of_diffusers
    from vidaccel.plans.shipped import shipped_policies

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # of libraries that its models look for
    try:
        here, later = families_of_diffusers()
    finally:
        logging.disable(before)
    model = embedded_model()
    return {
        "step plans": f"yes: for {len(here)} families of models, which vidaccel hosts lists",
        "families": ", ".join(here),
        "later Diffusers": ", ".join(later) or "none that this vidaccel knows",
        "embedded model": f"yes: {model}"
        if (model / "model_index.json").is_file()
        else "no: reinstall vidaccel",
        "policies": f"{len(shipped_policies())} shipped, which vidaccel show lists",
        "GPU": "yes" if torch.cuda.is_available() else "no: runs on the CPU",
        "sparse attention": _sparse(),
        "video files": _ffmpeg(),
        "SSIM": _extra("metrics", "skimage.metrics"),
        "LPIPS": _lpips(),
        "VMAF": _vmaf(),
        "ColorVideoVDP": _cvvdp(),
        "demo page": _extra("demo", "gradio"),
        "Ray workers": _extra("ray", "ray"),
    }


def _extra(name: str, *modules: str) -> str:
    """Say whether an optional part is installed, and whether it can be imported here."""
    if any(find_spec(module.partition(".")[0]) is None for module in modules):
        return f'no: pip install "vidaccel[{name}]"'
    try:
        for module in modules:
            import_module(module)
    # One package built for another version of the next raises what it likes.
    except Exception as error:
        return f"no: installed, but it does not work here ({_first_line(error)})"
    return "yes"


def _lpips() -> str:
    """Say whether LPIPS can be computed, without asking a network for its weights."""
    found = _extra("metrics", "lpips", "torchvision")
    if found != "yes":
        return found
    from vidaccel.clips.metrics import lpips_weights

    url, file = lpips_weights()
    if file.is_file():
        return "yes"
    return f"not yet: installed, its weights are not; the first use downloads {url}"


def _vmaf() -> str:
    """Say whether VMAF can be computed."""
    from vidaccel.clips.vmaf import why_no_vmaf

    missing = why_no_vmaf()
    return f"no: {missing}" if missing else "yes"


def _cvvdp() -> str:
    """Say whether ColorVideoVDP can be computed."""
    from vidaccel.clips.cvvdp import load_cvvdp
    from vidaccel.errors import MetricUnavailable

    try:
        load_cvvdp()
    except MetricUnavailable as error:
        return f"no: {error}"
    return "yes"


def _sparse() -> str:
    """Say where sparse attention runs."""
    import torch

    found = _extra("triton", "triton")
    if not torch.cuda.is_available():
        return "no: without a GPU it is computed by its reference, which takes longer than dense"
    return found if found == "yes" else "no: it needs Triton on a GPU: pip install triton"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or repr(error)


def _ffmpeg() -> str:
    """Say which ffmpeg program there is, or how to get one."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe, get_ffmpeg_version

        get_ffmpeg_exe()
        return f"yes: ffmpeg {get_ffmpeg_version()}"
    except (ImportError, OSError, RuntimeError):
        return "no: pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
