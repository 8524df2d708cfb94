"""The bench of low precision: `vidaccel bench precision`."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vidaccel.cli.argument_types import whole_number
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_prompts_option,
    add_workdir_option,
    call_of,
    model_name,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import check_writable, print_result, print_written, write_json
from vidaccel.errors import BenchError, ModelError

# What is measured: name -> what it is.
PARTS = {
    "presets": "the two presets, and what it takes for 4 bits",
    "grid": "every format, rotation and sequence",
    "torchao": "torchao's dynamic int8 and fp8",
    "together": "plans, block cache, sparse attention and low precision, alone and together",
}


def add_precision(benches: Any) -> None:
    """Add `vidaccel bench precision`."""
    parser = add_command(
        benches, "precision", "low precision: PSNR of every format, rotation and sequence"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=list(PARTS),
        metavar="PART",
        help="; ".join(f"{name}: {text}" for name, text in PARTS.items()),
    )
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="formats of the grid; all")
    parser.add_argument(
        "--steps", nargs="+", type=whole_number(2, 1000), default=[20, 50], help="denoising steps"
    )
    add_prompts_option(parser)
    parser.add_argument(
        "--count", type=whole_number(1), default=4, help="prompts of the model's own"
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="instead: the error that each layer alone causes, in int8 and in nvint4",
    )
    parser.add_argument(
        "--crossover",
        action="store_true",
        help="instead: integers against floating formats on Gaussian numbers, by crest factor",
    )
    add_workdir_option(parser)
    parser.add_argument(
        "--plot", "--figure", type=Path, metavar="FILE", help="draw it there; needs matplotlib"
    )
    add_json_option(parser)
    add_clip_options(parser)
    parser.set_defaults(size="64x64", frames=9)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_precision)


def _precision(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench precision`."""
    check_writable(arguments.json, arguments.plot)
    if arguments.crossover:
        _crossover(arguments)
        return
    prompts = _prompts(arguments)
    with TemporaryDirectory() as temporary:
        folder: Path = arguments.workdir or Path(temporary)
        if arguments.sensitivity:
            _sensitivity(arguments, prompts, folder)
        else:
            _quality(arguments, prompts, folder)


def _quality(arguments: argparse.Namespace, prompts: list[str], folder: Path) -> None:
    """Measure clips."""
    from vidaccel.bench.precision import calibrate_into, precision, precision_table
    from vidaccel.bench.precision_cases import best, cases, grid, together, torchao
    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.precision.formats import FORMATS
    from vidaccel.precision.settings import PRESETS

    formats = tuple(arguments.formats or FORMATS)
    if unknown := [name for name in formats if name not in FORMATS]:
        raise BenchError(f"there is no format {unknown[0]!r}; known are {', '.join(FORMATS)}")
    measured = []
    if "presets" in arguments.parts:
        measured += cases([*PRESETS.values(), *best()], folder)
    if "torchao" in arguments.parts:
        measured += torchao()
    if "grid" in arguments.parts:
        measured += cases(grid(formats), folder)
    if "together" in arguments.parts:
        plans = {f"plan at {n}x": {"policy": "auto", "speedup": float(n)} for n in (2, 3)}
        measured += together(plans, {"int8": "int8"})
    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments)
    call.pop("num_inference_steps", None)
    calibrate_into(pipe, call, [EMBEDDED_PROMPT], folder, measured)
    shards = folder / "clips"
    result = precision(pipe, call, measured, prompts=prompts, steps=arguments.steps, workdir=shards)
    result.settings["model"] = model_name(arguments)
    print_result(precision_table(result), arguments.json)
    write_json(result.to_dict(), arguments.json, one_line="points")
    if arguments.plot is not None:
        from vidaccel.bench.precision_figures import draw_precision

        draw_precision(result, arguments.plot)
        print_written([arguments.plot])


def _sensitivity(arguments: argparse.Namespace, prompts: list[str], folder: Path) -> None:
    """Measure layers."""
    from vidaccel.bench.precision_layers import sensitivity, sensitivity_table

    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments, num_inference_steps=min(arguments.steps))
    result = sensitivity(pipe, call, prompts[:1], folder / "sensitivity.safetensors")
    result["settings"]["model"] = model_name(arguments)
    print_result(sensitivity_table(result), arguments.json)
    write_json(result, arguments.json)


def _crossover(arguments: argparse.Namespace) -> None:
    """Measure formats on Gaussian numbers."""
    from vidaccel.bench.precision_crossover import crossover, crossover_table

    result = crossover()
    print_result(crossover_table(result), arguments.json)
    write_json(result.to_dict(), arguments.json, one_line="points")
    if arguments.plot is not None:
        from vidaccel.bench.precision_figures import draw_crossover

        draw_crossover(result, arguments.plot)
        print_written([arguments.plot])


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts; held-out captions of the embedded model where none are given.

    Raises:
        ModelError: another model has no prompts of its own.
    """
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.model is not None:
        raise ModelError("prompts are needed: vidaccel bench precision --model ... --prompts FILE")
    from vidaccel.cli.bench_quality import EMBEDDED_PROMPTS

    return list(EMBEDDED_PROMPTS[: arguments.count])
