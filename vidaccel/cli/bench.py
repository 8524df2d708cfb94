"""The command `vidaccel bench`, and its benches of the engine: overhead and soak."""

import argparse
from typing import Any

from vidaccel.cli.argument_types import whole_number
from vidaccel.cli.bench_calibration import add_calibration, add_learning, add_search
from vidaccel.cli.bench_defaults import add_defaults
from vidaccel.cli.bench_gpu import add_gpu
from vidaccel.cli.bench_kernels import add_codegen, add_kernels, add_layer, add_models
from vidaccel.cli.bench_precision import add_precision
from vidaccel.cli.bench_quality import add_attention, add_parity, add_quality
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_steps_option,
    call_of,
    model_name,
    pipeline_of,
)
from vidaccel.cli.output import check_writable, print_bench


def add_overhead(benches: Any) -> None:
    """Add `vidaccel bench overhead`."""
    parser = add_command(
        benches,
        "overhead",
        "what vidaccel costs when idle, and realised against ideal speedup",
    )
    add_steps_option(parser, 2, 50)
    parser.add_argument("--rounds", type=whole_number(1), default=9, help="medians are over these")
    add_json_option(parser)
    add_clip_options(parser)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_overhead)


def _overhead(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench overhead`."""
    check_writable(arguments.json)
    from vidaccel.bench.overhead import overhead, overhead_table
    from vidaccel.clips.embedded import EMBEDDED_PROMPT

    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments, prompt=EMBEDDED_PROMPT, num_inference_steps=arguments.steps)
    result = overhead(pipe, call, rounds=arguments.rounds)
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, overhead_table)


def add_soak(benches: Any) -> None:
    """Add `vidaccel bench soak`."""
    parser = add_command(
        benches,
        "soak",
        "many generations in one process: memory, and outputs of equal requests",
    )
    parser.add_argument("--generations", type=whole_number(12), default=200, help="how many in all")
    add_steps_option(parser, 8, 8)
    add_json_option(parser)
    add_clip_options(parser)
    parser.set_defaults(size="32x32", frames=5)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_soak)


def _soak(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench soak`."""
    check_writable(arguments.json)
    import torch

    from vidaccel.bench.soak import Request, soak, soak_table
    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.clips.load import call_arguments
    from vidaccel.dbcache import DBCache

    pipe = pipeline_of(arguments)
    width, height = arguments.size
    small = {"width": width, "height": height, "num_frames": arguments.frames}
    small |= {"prompt": EMBEDDED_PROMPT, "num_inference_steps": arguments.steps}
    # Another prompt, shape and number of steps in turn, each with a plan and with a block cache.
    calls = [
        small,
        {**small, "prompt": "a red dotted circle moving left on a navy striped background"},
        {**small, "width": 2 * width, "num_inference_steps": 12},
    ]
    accelerations: list[dict[str, Any]] = [
        {"policy": "every 3", "cache": None},
        {"policy": None, "cache": DBCache(threshold=0.5, warmup_steps=2, forecast_order=1)},
    ]
    requests = [
        Request(call_arguments(pipe, call), seed, acceleration)
        for acceleration in accelerations
        for seed, call in enumerate(calls)
    ]
    result = soak(pipe, requests, arguments.generations)
    result.settings.update(
        model=model_name(arguments),
        dtype=str(pipe.dtype),
        device=str(pipe.device),
        threads=torch.get_num_threads(),
    )
    print_bench(arguments, result, soak_table)


# Each adds one bench.
BENCHES = (
    add_overhead,
    add_soak,
    add_quality,
    add_defaults,
    add_parity,
    add_attention,
    add_precision,
    add_search,
    add_calibration,
    add_gpu,
    add_learning,
    add_kernels,
    add_models,
    add_codegen,
    add_layer,
)


def add_bench(commands: Any) -> None:
    """Add the command, with a command of its own for each bench."""
    parser = add_command(commands, "bench", "measure, and write the numbers as JSON")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for add in BENCHES:
        add(benches)
