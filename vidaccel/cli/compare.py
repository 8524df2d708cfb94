"""The commands for looking at clips: vidaccel compare | demo."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidaccel.cli.options import (
    add_model_options,
    at_least,
    check_writable,
    print_result,
    size,
    write_json,
)
from vidaccel.errors import ModelError, UnavailableError


def compare_parser(commands: Any) -> None:
    """Add `vidaccel compare`."""
    parser = commands.add_parser(
        "compare",
        help="measure and draw how two clips differ",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("reference", type=Path, help="the plain clip")
    parser.add_argument("clip", type=Path, help="the other one, of the same size and length")
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare.mp4"), help="both beside each other, .mp4"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from vidaccel.clips.compare import compare_files, fidelity_table

    check_writable(arguments.json)
    result, written = compare_files(arguments.reference, arguments.clip, arguments.out)
    print_result(fidelity_table(result), arguments.json)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    write_json(result, arguments.json)


def demo_parser(commands: Any) -> None:
    """Add `vidaccel demo`."""
    parser = commands.add_parser(
        "demo",
        help="a web page that shows clips with and without acceleration",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--server-name", default="127.0.0.1", help="address; 0.0.0.0 for all")
    parser.add_argument("--server-port", type=at_least(1), help="from 7860 on, the first free one")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    parser.add_argument("--queue-size", type=at_least(1), default=8, help="runs that may wait")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the runs")
    first = parser.add_argument_group("what the page shows at first")
    first.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    first.add_argument("--frames", type=at_least(1), help="number of frames")
    first.add_argument("--steps", type=at_least(1), help="denoising steps")
    first.add_argument("--guidance", type=float, help="guidance scale")
    most = parser.add_argument_group("the largest run it takes")
    most.add_argument("--max-size", type=size, metavar="WxH", help="pixels of a frame")
    most.add_argument("--max-frames", type=at_least(1), help="number of frames")
    most.add_argument("--max-steps", type=at_least(1), help="denoising steps")
    add_model_options(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise UnavailableError('the page needs gradio: pip install "vidaccel[demo]"')
    if arguments.model is not None and arguments.model.startswith((".", "/", "~")):
        folder = Path(arguments.model).expanduser()
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is no Diffusers model: it has no model_index.json")

    from dataclasses import replace
    from functools import partial

    import torch

    from vidaccel.clips.generate import load_pipeline
    from vidaccel.demo import page as demo
    from vidaccel.demo.settings import Limits

    embedded = arguments.model is None
    width, height = arguments.size or (None, None)
    defaults = demo.first_settings(
        embedded,
        width=width,
        height=height,
        frames=arguments.frames,
        steps=arguments.steps,
        guidance=arguments.guidance,
    )
    most_wide, most_high = arguments.max_size or (None, None)
    given = {
        "width": most_wide,
        "height": most_high,
        "frames": arguments.max_frames,
        "steps": arguments.max_steps,
    }
    limits = replace(
        demo.EMBEDDED_LIMITS if embedded else Limits(),
        **{name: value for name, value in given.items() if value is not None},
    )
    limits.check(defaults)
    load = partial(
        load_pipeline,
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        offload=arguments.offload,
    )
    demo.serve(
        arguments.model,
        load=load,
        defaults=defaults,
        limits=limits,
        queue_size=arguments.queue_size,
        out=arguments.out,
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=arguments.share,
        inbrowser=arguments.open,
    )
