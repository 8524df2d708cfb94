"""The bench of the call without a calibration: `vidaccel bench defaults`."""

import argparse
from typing import Any

from vidaccel.cli.bench_quality import EMBEDDED_PROMPTS
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_plot_option,
    add_prompts_option,
    add_seed_option,
    add_workdir_option,
    call_of,
    model_name,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import check_writable, print_bench
from vidaccel.errors import BenchError


def add_defaults(benches: Any) -> None:
    """Add `vidaccel bench defaults`."""
    parser = add_command(
        benches,
        "defaults",
        "auto without any policy against other caches at equal CPU time, over schedulers, shifts, "
        "steps and guidance scales",
    )
    add_prompts_option(parser)
    parser.add_argument(
        "--only", metavar="TEXT", help='settings whose name holds this, such as "16 steps"'
    )
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    add_seed_option(parser)
    add_workdir_option(parser)
    add_json_option(parser)
    add_plot_option(parser)
    add_clip_options(parser)
    parser.set_defaults(size="48x48", frames=9)
    add_model_options(parser, any_model=False, threads=True)
    parser.set_defaults(run=_defaults)


def _defaults(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench defaults`."""
    from vidaccel.bench.defaults import defaults, defaults_table
    from vidaccel.bench.grid import GRID

    grid = [setting for setting in GRID if (arguments.only or "") in str(setting)]
    if not grid:
        raise BenchError(f"no setting holds {arguments.only!r}: vidaccel bench defaults --list")
    if arguments.list:
        print("\n".join(map(str, grid)))
        return
    check_writable(arguments.json, arguments.plot)
    from vidaccel.bench.figures import draw_defaults

    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments)
    for name in ("num_inference_steps", "guidance_scale"):  # those of each setting
        call.pop(name)
    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(EMBEDDED_PROMPTS[:2])
    result = defaults(pipe, call, prompts, grid, seed=arguments.seed, workdir=arguments.workdir)
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, defaults_table, draw_defaults)
