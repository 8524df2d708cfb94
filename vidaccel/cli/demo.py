"""The command `vidaccel demo`: a page that shows clips with and without acceleration."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import MAX_FRAMES, MAX_STEPS, number, size, whole_number
from vidaccel.cli.options import (
    add_command,
    add_model_options,
    loader_of,
)
from vidaccel.errors import ModelError, UnavailableError


def add_demo(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "demo", "a web page that shows clips with and without acceleration"
    )
    parser.add_argument("--server-name", default="127.0.0.1", help="address; 0.0.0.0 for all")
    parser.add_argument(
        "--server-port", type=whole_number(1), help="from 7860 on, the first free one"
    )
    parser.add_argument("--share", action="store_true", help="a public link through Gradio")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    parser.add_argument("--queue-size", type=whole_number(1), default=8, help="runs that may wait")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the runs")
    first = parser.add_argument_group("what the page shows at first")
    first.add_argument("--size", type=size, metavar="WxH", help="width and height in pixels")
    first.add_argument("--frames", type=whole_number(1, MAX_FRAMES), help="number of frames")
    first.add_argument("--steps", type=whole_number(1, MAX_STEPS), help="denoising steps")
    first.add_argument("--guidance", type=number(), help="guidance scale")
    most = parser.add_argument_group("the largest run it takes")
    most.add_argument("--max-size", type=size, metavar="WxH", help="pixels of a frame")
    most.add_argument("--max-frames", type=whole_number(1, MAX_FRAMES), help="number of frames")
    most.add_argument("--max-steps", type=whole_number(1, MAX_STEPS), help="denoising steps")
    add_model_options(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    """Run the command."""
    if find_spec("gradio") is None:
        raise UnavailableError('the page needs gradio: pip install "vidaccel[demo]"')
    if arguments.model is not None and arguments.model.startswith((".", "/", "~")):
        folder = Path(arguments.model).expanduser()
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is no Diffusers model: it has no model_index.json")

    from dataclasses import replace

    from vidaccel.demo import server
    from vidaccel.demo.settings import Limits

    embedded = arguments.model is None
    width, height = arguments.size or (None, None)
    first = server.first_settings(
        embedded,
        width=width,
        height=height,
        frames=arguments.frames,
        steps=arguments.steps,
        guidance=arguments.guidance,
    )
    most_wide, most_high = arguments.max_size or (None, None)
    most = {
        "width": most_wide,
        "height": most_high,
        "frames": arguments.max_frames,
        "steps": arguments.max_steps,
    }
    limits = replace(
        server.EMBEDDED_LIMITS if embedded else Limits(),
        **{name: value for name, value in most.items() if value is not None},
    )
    limits.check(first)
    server.serve(
        arguments.model,
        load=loader_of(arguments),
        defaults=first,
        limits=limits,
        queue_size=arguments.queue_size,
        out=arguments.out,
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        share=arguments.share,
        inbrowser=arguments.open,
    )
