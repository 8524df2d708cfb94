"""The benches of the kernels: `vidaccel bench kernels`, `models`, `codegen` and `layer`."""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from vidaccel.cli.argument_types import MAX_STEPS, shares, whole_number
from vidaccel.cli.options import (
    add_command,
    add_json_option,
)
from vidaccel.cli.output import check_writable, print_result, write_json
from vidaccel.errors import VidaccelError


def add_kernels(benches: Any) -> None:
    """Add `vidaccel bench kernels`."""
    parser = add_command(
        benches, "kernels", "check the attention kernels on a CUDA GPU, then measure them"
    )
    parser.add_argument(
        "--shapes",
        default="",
        help="check and measure at those with this in their name, such as Wan; all if left out",
    )
    parser.add_argument("--check-only", action="store_true", help="check the same, measure nothing")
    add_json_option(parser)
    parser.set_defaults(run=_kernels)


def _kernels(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench kernels`."""
    check_writable(arguments.json)
    from vidaccel.bench.kernels import SHAPES, kernels, kernels_table

    names = _named(arguments.shapes, SHAPES, "shape")
    result = kernels(
        names,
        timed=not arguments.check_only,
        report=lambda line: print(line, file=sys.stderr),
    )
    print_result(kernels_table(result), arguments.json)
    write_json(result, arguments.json)


def add_models(benches: Any) -> None:
    """Add `vidaccel bench models`."""
    parser = add_command(
        benches,
        "models",
        "seconds of Wan models of their real size on a CUDA GPU, with random weights",
    )
    parser.add_argument("--models", default="", help="part of a model's name; all if left out")
    parser.add_argument(
        "--steps", type=whole_number(6, MAX_STEPS), help="fewer than the model's 50, to be sooner"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=1, help="medians are over these")
    add_json_option(parser)
    parser.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench models`."""
    check_writable(arguments.json)
    from vidaccel.bench.models import MODELS, speed, speed_table

    results = {}
    for name in _named(arguments.models, MODELS, "model"):
        result = speed(
            MODELS[name],
            steps=arguments.steps,
            rounds=arguments.rounds,
            log=partial(_log, name),
        )
        print_result(f"{name}\n{speed_table(result)}\n", arguments.json)
        results[name] = result.to_dict()
    write_json(results, arguments.json)


def _log(name: str, line: str) -> None:
    """Print a line of progress of a model."""
    print(f"{name}: {line}", file=sys.stderr)


def _named(part: str, known: Iterable[str], kind: str) -> list[str]:
    """Return the known names that hold a part.

    Raises:
        VidaccelError: there is none.
    """
    names = [name for name in known if part in name]
    if not names:
        raise VidaccelError(f"no {kind} is called {part!r}; there are {', '.join(known)}")
    return names


def add_codegen(benches: Any) -> None:
    """Add `vidaccel bench codegen`."""
    parser = add_command(
        benches, "codegen", "compile every kernel without a GPU: registers, spills, instruction mix"
    )
    parser.add_argument("--chips", default="80,90,100,120", help="compute capabilities")
    parser.add_argument("--kernels", default="", help="part of a kernel's name; all if left out")
    add_json_option(parser)
    parser.set_defaults(run=_codegen)


def _codegen(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench codegen`."""
    check_writable(arguments.json)
    from vidaccel.bench.codegen import CHIPS, codegen, codegen_table

    chips = [int(chip) for chip in arguments.chips.split(",") if chip.strip().isdigit()]
    if not chips or not set(chips) <= set(CHIPS):
        raise VidaccelError(f"--chips takes some of 80,90,100,120, found {arguments.chips!r}")
    result = codegen(chips, wanted=lambda shipped: arguments.kernels in shipped.name)
    print_result(codegen_table(result), arguments.json)
    write_json(result, arguments.json, one_line="rows")
    if result["problems"]:
        raise VidaccelError(f"{len(result['problems'])} problems in generated code")


def add_layer(benches: Any) -> None:
    """Add `vidaccel bench layer`."""
    parser = add_command(
        benches,
        "layer",
        "predict a layer of sparse attention from its generated code, without a GPU",
    )
    parser.add_argument(
        "--shapes", default="Wan-14B 720p", help="part of a model's name (default: %(default)s)"
    )
    parser.add_argument(
        "--densities", type=shares, default="0.3", help="computed shares (default: %(default)s)"
    )
    parser.add_argument(
        "--chip", type=int, choices=(80, 90, 120), default=90, help="compute capability"
    )
    parser.add_argument("--plain", action="store_true", help="without mass averaging and means")
    add_json_option(parser)
    parser.set_defaults(run=_layer)


def _layer(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench layer`."""
    check_writable(arguments.json)
    from vidaccel.bench.kernels import SHAPES
    from vidaccel.bench.layer import layer, layer_table

    names = _named(arguments.shapes, SHAPES, "shape")
    more = {"mass": not arguments.plain, "means": not arguments.plain}
    results = [
        layer(SHAPES[name], density, arguments.chip, **more)
        for name in names
        for density in arguments.densities
    ]
    print_result("\n\n".join(map(layer_table, results)), arguments.json)
    write_json({"layers": results}, arguments.json)
