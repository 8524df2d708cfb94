"""The commands `vidaccel build-policy` and `vidaccel show`."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_model_options,
    at_least,
    call_of,
    loader_of,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import check_writable, print_written
from vidaccel.errors import PolicyError


def add_build_policy(commands: Any) -> None:
    """Add `vidaccel build-policy`."""
    parser = add_command(
        commands,
        "build-policy",
        "measure which steps are worth computing, and write a policy file",
    )
    parser.add_argument("out", type=Path, help="the policy file, .json")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one per line")
    parser.add_argument("--steps", type=at_least(3), default=50, help="denoising steps")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds")
    _add_measuring(parser)
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
    parser.add_argument("--ray-address", help="a Ray cluster; this machine if left out")
    add_clip_options(parser, guidance=True)
    add_model_options(parser)
    parser.set_defaults(run=_build_policy)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add which errors are measured, and how plans are chosen by them."""
    group = parser.add_argument_group("errors")
    group.add_argument("--max-skip", type=at_least(2), default=8, help="steps in a segment")
    group.add_argument(
        "--method",
        choices=("exact", "gain", "lazy"),
        default="exact",
        help="exact runs every segment, gain estimates them, lazy runs those that plans use",
    )
    group.add_argument("--faithful", action="store_true", help="only hold, as the paper does")
    group.add_argument(
        "--objective",
        default="leximax",
        help="what plans keep low: leximax (the largest error, then the next), sum or power(N)",
    )
    group.add_argument(
        "--metric",
        choices=("l1", "decoded", "lpips"),
        default="l1",
        help="what an error is: L1 of the latents, L1 of the decoded clip, or its LPIPS",
    )
    group.add_argument(
        "--aggregation",
        choices=("mean", "max", "quantile", "cvar"),
        default="mean",
        help="how the errors of all prompts and seeds become one",
    )


def _build_policy(arguments: argparse.Namespace) -> None:
    """Run `vidaccel build-policy`."""
    out: Path = arguments.out
    if out.suffix != ".json":
        raise PolicyError(f"expected a file name that ends in .json, found {out}")
    prompts = read_prompts(arguments.prompts)
    check_writable(out)

    from vidaccel.calibration.build import build_policy

    pipe = pipeline_of(arguments)
    pipe.set_progress_bar_config(disable=True)
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
        call_kwargs=call_of(pipe, arguments),
        workdir=arguments.workdir,
        validate=not arguments.no_validate,
        improve=arguments.improve,
        workers=arguments.workers,
        ray_address=arguments.ray_address,
        load=loader_of(arguments),
    )
    policy.save(out)
    print(policy.table())
    print_written([out])


def add_show(commands: Any) -> None:
    """Add `vidaccel show`."""
    parser = add_command(commands, "show", "what a policy file says")
    parser.add_argument("policy", help="file, folder or hub id")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw errors and plans there")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    """Run `vidaccel show`."""
    from vidaccel.plans.policy import CachePolicy

    check_writable(arguments.plot)
    policy = CachePolicy.from_pretrained(arguments.policy)
    print(policy.table())
    if arguments.plot is not None:
        from vidaccel.lemica.plot import plot_policy

        plot_policy(policy, arguments.plot)
        print_written([arguments.plot])
