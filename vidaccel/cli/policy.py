"""The commands about policies: build-policy, show, bench search and bench calibration."""

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
    size,
    write_json,
)
from vidaccel.errors import PolicyError

AddOptions = Callable[[argparse.ArgumentParser], None]
# Loads the pipeline that the arguments name.
LoadPipeline = Callable[[argparse.Namespace], Any]


def add_build(commands: Any, add_model_options: AddOptions, load: LoadPipeline) -> None:
    """Add `build-policy`."""
    parser = commands.add_parser(
        "build-policy",
        help="measure which steps are worth computing, and write a policy file",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="the policy file, .json")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one per line")
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--steps", type=at_least(3), default=50, help="denoising steps")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds")
    parser.add_argument("--max-skip", type=at_least(2), default=8, help="longest segment")
    parser.add_argument(
        "--method",
        choices=("exact", "gain", "lazy"),
        default="exact",
        help="exact runs every segment, gain estimates them, lazy runs those that plans use",
    )
    parser.add_argument("--faithful", action="store_true", help="only hold, as the paper does")
    parser.add_argument("--objective", default="leximax", help="leximax, sum or power(N)")
    parser.add_argument(
        "--metric", choices=("l1", "decoded", "lpips"), default="l1", help="what an error is"
    )
    parser.add_argument(
        "--aggregation",
        choices=("mean", "max", "quantile", "cvar"),
        default="mean",
        help="of the errors of all prompts and seeds",
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    parser.add_argument("--frames", type=at_least(1), help="number of frames")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--no-validate", action="store_true", help="skip the end-to-end check")
    parser.add_argument(
        "--improve",
        type=at_least(0),
        default=0,
        metavar="RUNS",
        help="so many runs for each validated budget improve its plan by small changes",
    )
    parser.add_argument("--workdir", type=Path, help="keeps what is measured; go on from there")
    parser.add_argument(
        "--workers", type=at_least(0), default=0, help="Ray workers with a pipeline each; 0: here"
    )
    parser.add_argument("--ray-address", help="of a Ray cluster; this machine if left out")
    add_model_options(parser)
    parser.set_defaults(run=partial(_build, load))


def _build(load: LoadPipeline, arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix != ".json":
        raise PolicyError(f"expected a file name that ends in .json, found {out}")
    prompts = read_prompts(arguments.prompts)
    check_writable(out)

    from vidaccel.calibration.build import build_policy
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g

    pipe = load(arguments)
    pipe.set_progress_bar_config(disable=True)
    width, height = arguments.size or (None, None)
    wanted = {"height": height, "width": width, "num_frames": arguments.frames}
    wanted |= {"guidance_scale": arguments.guidance}
    defaults = {} if arguments.model is not None else embedded.EMBEDDED_CALL
    given = {name: value for name, value in wanted.items() if value is not None}
    # A worker needs no more of the arguments than what names the pipeline.
    model = argparse.Namespace(**{n: v for n, v in vars(arguments).items() if n != "run"})
    policy = build_policy(
        pipe,
        prompts,
        num_inference_steps=arguments.steps,
        seeds=range(arguments.seeds),
        max_skip=arguments.max_skip,
        method=arguments.method,
        objective=arguments.objective,
        metric=arguments.metric,
        aggregation=arguments.aggregation,
        faithful=arguments.faithful,
        call_kwargs=g.call_arguments(pipe, defaults | given),
        workdir=arguments.workdir,
        validate=not arguments.no_validate,
        improve=arguments.improve,
        workers=arguments.workers,
        ray_address=arguments.ray_address,
        load=partial(load, model),
    )
    policy.save(out)
    print(policy.table())
    print(f"wrote {out}", file=sys.stderr)


def add_show(commands: Any) -> None:
    """Add `show`."""
    parser = commands.add_parser("show", help="what a policy file says")
    parser.add_argument("policy", help="file, folder or hub id")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw errors and plans there")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    from vidaccel.plans.policy import CachePolicy

    if arguments.plot is not None:
        check_writable(arguments.plot)
    policy = CachePolicy.from_pretrained(arguments.policy)
    print(policy.table())
    if arguments.plot is not None:
        from vidaccel.lemica.plot import plot_policy

        plot_policy(policy, arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)


def add_benches(benches: Any, add_model_options: AddOptions, load: LoadPipeline) -> None:
    """Add `bench search` and `bench calibration`."""
    parser = benches.add_parser(
        "search",
        help="how long the search for plans takes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=at_least(1), default=9, help="random graphs of each kind")
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    parser.set_defaults(run=_bench_search)

    parser = benches.add_parser(
        "calibration",
        help="estimated errors and their plans against exact ones",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--exact-workdir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of a build-policy --method exact --workdir FOLDER; its complete samples are used",
    )
    parser.add_argument("--held-out", type=Path, required=True, help="text file, one per line")
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--budgets", type=at_least(1), nargs="+", default=[25, 17, 12])
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(parser)
    parser.set_defaults(run=partial(_bench_calibration, load))


def _bench_search(arguments: argparse.Namespace) -> None:
    from vidaccel.bench import calibration as bench

    _write(bench.search_times(arguments.rounds), bench.search_table, arguments.json)


def _bench_calibration(load: LoadPipeline, arguments: argparse.Namespace) -> None:
    held_out = read_prompts(arguments.held_out)
    check_writable(arguments.json)
    from vidaccel.bench import calibration as bench

    bench.read_task(arguments.exact_workdir)
    pipe = load(arguments)
    pipe.set_progress_bar_config(disable=True)
    result = bench.calibration(pipe, arguments.exact_workdir, held_out, arguments.budgets)
    result["settings"]["model"] = arguments.model or "tiny-wan"
    _write(result, bench.calibration_table, arguments.json)


def _write(result: dict[str, Any], table: Callable[[dict[str, Any]], str], path: Any) -> None:
    print_result(table(result), path)
    if path is not None:
        write_json(result, path)
