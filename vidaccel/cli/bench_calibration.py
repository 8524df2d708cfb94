"""The benches of calibration: `vidaccel bench search`, `calibration` and `learning`."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import whole_number
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_steps_option,
    call_of,
    model_name,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import check_writable, print_bench


def add_search(benches: Any) -> None:
    """Add `vidaccel bench search`."""
    parser = add_command(benches, "search", "how long the search for plans takes")
    parser.add_argument(
        "--rounds", type=whole_number(1), default=9, help="random graphs of each kind"
    )
    add_json_option(parser)
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench search`."""
    check_writable(arguments.json)
    from vidaccel.bench.calibration import search_table, search_times

    result = search_times(arguments.rounds)
    print_bench(arguments, result, search_table)


def add_calibration(benches: Any) -> None:
    """Add `vidaccel bench calibration`."""
    parser = add_command(
        benches, "calibration", "estimated errors and their plans against exact ones"
    )
    parser.add_argument(
        "--exact-workdir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the --workdir of a build-policy --method exact; its complete samples are used",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        required=True,
        metavar="FILE",
        help="prompts that the plans are tried on: a text file, one per line",
    )
    parser.add_argument(
        "--budgets",
        type=whole_number(1),
        nargs="+",
        default=[25, 17, 12],
        metavar="N",
        help="computed steps of the plans",
    )
    add_json_option(parser)
    add_model_options(parser)
    parser.set_defaults(run=_calibration)


def _calibration(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench calibration`."""
    held_out = read_prompts(arguments.held_out)
    check_writable(arguments.json)
    from vidaccel.bench.calibration import calibration, calibration_table
    from vidaccel.calibration.task import read_task

    read_task(arguments.exact_workdir)
    pipe = pipeline_of(arguments)
    pipe.set_progress_bar_config(disable=True)
    result = calibration(pipe, arguments.exact_workdir, held_out, arguments.budgets)
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, calibration_table)


def add_learning(benches: Any) -> None:
    """Add `vidaccel bench learning`."""
    parser = add_command(
        benches, "learning", 'what policy="learn" costs, and how good the learned plans are'
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="each teaches, and the next one is tried with that: a text file, one per line",
    )
    add_steps_option(parser, 8, 50)
    parser.add_argument(
        "--budgets",
        type=whole_number(1),
        nargs="+",
        default=[25, 17, 12, 10],
        metavar="N",
        help="computed steps of the plans",
    )
    parser.add_argument(
        "--gain",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="also plans from the errors that --method gain estimates on the first N prompts",
    )
    parser.add_argument("--plot", type=Path, help="draw predicted against real PSNR there")
    add_json_option(parser)
    add_clip_options(parser, guidance=True)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_learning)


def _learning(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench learning`."""
    prompts = read_prompts(arguments.prompts)
    check_writable(arguments.json, arguments.plot)
    from vidaccel.bench.learning import draw_learning, learning, learning_table

    pipe = pipeline_of(arguments)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(pipe, arguments, num_inference_steps=arguments.steps)
    result = learning(pipe, call, prompts, budgets=arguments.budgets, gain=arguments.gain)
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, learning_table, draw_learning)
