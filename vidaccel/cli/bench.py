"""The commands of `bench` that measure the engine, the kernels and sparse attention."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vidaccel.cli.options import (
    at_least,
    check_writable,
    print_result,
    read_prompts,
    shares,
    size,
    write_json,
)
from vidaccel.errors import VidaccelError

AddOptions = Callable[[argparse.ArgumentParser], None]
# Loads the pipeline that the arguments name.
LoadPipeline = Callable[[argparse.Namespace], Any]


def add_engine(benches: Any, add_model_options: AddOptions, load: LoadPipeline) -> None:
    """Add `bench overhead` and `bench soak`."""
    overhead = benches.add_parser(
        "overhead",
        help="what vidaccel costs when idle, and realised against ideal speedup",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    overhead.add_argument("--model", help="folder or hub id; the embedded model if left out")
    overhead.add_argument("--steps", type=at_least(2), default=50)
    overhead.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    overhead.add_argument("--frames", type=at_least(1), help="number of frames")
    overhead.add_argument("--rounds", type=at_least(1), default=9, help="medians are over these")
    overhead.add_argument("--threads", type=at_least(1), help="CPU threads of torch")
    overhead.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(overhead)
    overhead.set_defaults(run=partial(_overhead, load))
    soak = benches.add_parser(
        "soak",
        help="many generations in one process: memory, and outputs of equal requests",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    soak.add_argument("--model", help="folder or hub id; the embedded model if left out")
    soak.add_argument("--generations", type=at_least(12), default=200)
    soak.add_argument("--steps", type=at_least(8), default=8)
    soak.add_argument("--size", type=size, metavar="WxH", default="32x32", help="in pixels")
    soak.add_argument("--frames", type=at_least(1), default=5, help="number of frames")
    soak.add_argument("--threads", type=at_least(1), help="CPU threads of torch")
    soak.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(soak)
    soak.set_defaults(run=partial(_soak, load))


def _overhead(load: LoadPipeline, arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    import torch

    from vidaccel.bench import overhead as bench
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    pipe = load(arguments)
    width, height = arguments.size or (None, None)
    wanted = {"height": height, "width": width, "num_frames": arguments.frames}
    call = {
        "prompt": embedded.EMBEDDED_PROMPT,
        **(embedded.EMBEDDED_CALL if arguments.model is None else {}),
    }
    call |= {name: value for name, value in wanted.items() if value is not None}
    call["num_inference_steps"] = arguments.steps
    result = bench.overhead(pipe, g.call_arguments(pipe, call), rounds=arguments.rounds)
    result["settings"] |= {"model": arguments.model or "tiny-wan"}
    print_result(bench.overhead_table(result), arguments.json)
    write_json(result, arguments.json)


def _soak(load: LoadPipeline, arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    import torch

    from vidaccel.bench.soak import Request, soak, soak_table
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g
    from vidaccel.dbcache import DBCache

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    pipe = load(arguments)
    width, height = arguments.size
    small = {"width": width, "height": height, "num_frames": arguments.frames}
    small |= {"num_inference_steps": arguments.steps}
    # Another prompt, shape and number of steps in turn, each with a plan and with a block cache.
    calls = [
        {"prompt": embedded.EMBEDDED_PROMPT, **small},
        {"prompt": "a red dotted circle moving left on a navy striped background", **small},
        {
            "prompt": embedded.EMBEDDED_PROMPT,
            **small,
            "width": 2 * width,
            "num_inference_steps": 12,
        },
    ]
    accelerations = [
        {"policy": "every 3", "cache": None},
        {"policy": None, "cache": DBCache(threshold=0.5, warmup_steps=2, forecast_order=1)},
    ]
    requests = [
        Request(g.call_arguments(pipe, call), seed, acceleration)
        for acceleration in accelerations
        for seed, call in enumerate(calls)
    ]
    result = soak(pipe, requests, arguments.generations)
    result["settings"] = {
        "model": arguments.model or "tiny-wan",
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
    }
    print_result(soak_table(result), arguments.json)
    write_json(result, arguments.json)


def add_kernels(benches: Any) -> None:
    """Add `bench kernels`, `bench models` and `bench codegen`."""
    kernels = benches.add_parser(
        "kernels", help="check the attention kernels on a CUDA GPU, then measure them"
    )
    kernels.add_argument("--shapes", help="part of a model's name, such as Wan; all if left out")
    kernels.add_argument("--check-only", action="store_true", help="measure nothing")
    kernels.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    kernels.set_defaults(run=_kernels)
    models = benches.add_parser(
        "models",
        help="seconds of Wan models of their real size on a CUDA GPU, with random weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    models.add_argument("--models", default="", help="part of a model's name; all if left out")
    models.add_argument("--steps", type=at_least(6), help="fewer than the model's 50, to be sooner")
    models.add_argument("--rounds", type=at_least(1), default=1, help="medians are over these")
    models.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    models.set_defaults(run=_models)
    codegen = benches.add_parser(
        "codegen", help="compile every kernel without a GPU: registers, spills, instruction mix"
    )
    codegen.add_argument("--chips", default="80,90,100,120", help="compute capabilities")
    codegen.add_argument("--kernels", default="", help="part of a kernel's name")
    codegen.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    codegen.set_defaults(run=_codegen)


def _kernels(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from vidaccel.bench import kernels as kernel_bench

    names = [name for name in kernel_bench.SHAPES if (arguments.shapes or "") in name]
    if not names:
        known = ", ".join(kernel_bench.SHAPES)
        raise VidaccelError(f"no shape is called {arguments.shapes!r}; there are {known}")
    if arguments.check_only:
        names = []
    result = kernel_bench.kernels(names, report=lambda line: print(line, file=sys.stderr))
    print_result(kernel_bench.kernels_table(result), arguments.json)
    write_json(result, arguments.json)


def _models(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from vidaccel.bench import models as bench

    names = [name for name in bench.MODELS if arguments.models in name]
    if not names:
        known = ", ".join(bench.MODELS)
        raise VidaccelError(f"no model is called {arguments.models!r}; there are {known}")
    results = {}
    for name in names:
        results[name] = bench.speed(
            bench.MODELS[name],
            steps=arguments.steps,
            rounds=arguments.rounds,
            report=lambda line, name=name: print(f"{name}: {line}", file=sys.stderr),
        )
        print_result(f"{name}\n{bench.speed_table(results[name])}\n", arguments.json)
    write_json(results, arguments.json)


def _codegen(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from vidaccel.bench import codegen

    chips = [int(chip) for chip in arguments.chips.split(",") if chip.strip().isdigit()]
    if not chips or not set(chips) <= set(codegen.CHIPS):
        raise VidaccelError(f"--chips takes some of 80,90,100,120, found {arguments.chips!r}")
    result = codegen.codegen(chips, wanted=lambda shipped: arguments.kernels in shipped.name)
    print_result(codegen.codegen_table(result), arguments.json)
    write_json(result, arguments.json)
    if result["problems"]:
        raise VidaccelError(f"{len(result['problems'])} problems in generated code")


def add_attention(benches: Any, add_model_options: AddOptions, load: LoadPipeline) -> None:
    """Add `bench attention`."""
    attention = benches.add_parser(
        "attention",
        help="PSNR against density of sparse attention, on the embedded model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    attention.add_argument("--steps", type=at_least(2), default=12)
    attention.add_argument("--prompts", type=Path, help="a text file, one per line")
    attention.add_argument(
        "--top-p", type=shares, default="0.5,0.7,0.9", help="masses to keep, separated by commas"
    )
    attention.add_argument(
        "--methods", nargs="+", metavar="NAME", help="measure these alone, without single changes"
    )
    attention.add_argument("--partial", type=Path, help="keep what is measured, to go on from it")
    attention.add_argument("--figure", type=Path, help="draw it there; needs matplotlib")
    attention.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(attention)
    attention.set_defaults(run=partial(_attention, load), model=None)


def _attention(load: LoadPipeline, arguments: argparse.Namespace) -> None:
    check_writable(arguments.json, arguments.figure)
    from vidaccel.bench import attention as bench
    from vidaccel.clips import embedded

    pipe = load(arguments)
    result = bench.attention(
        pipe,
        {**embedded.EMBEDDED_CALL, "num_inference_steps": arguments.steps},
        prompts=read_prompts(arguments.prompts) if arguments.prompts else bench.PROMPTS,
        top_ps=arguments.top_p,
        methods=arguments.methods,
        changes_at=0.7 if arguments.methods is None else None,
        partial=arguments.partial,
    )
    result["settings"] |= {"model": "tiny-wan"}
    print_result(bench.attention_table(result), arguments.json)
    if arguments.figure is not None:
        bench.draw(result, arguments.figure)
    write_json(result, arguments.json)
