"""The commands `vidaccel build-policy` and `vidaccel show`."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import whole_number
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_model_options,
    add_steps_option,
    add_workdir_option,
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
    add_steps_option(parser, 3, 50)
    parser.add_argument("--seeds", type=whole_number(1), default=1, help="number of seeds")
    _add_measuring(parser)
    parser.add_argument("--no-validate", action="store_true", help="skip the end-to-end check")
    parser.add_argument(
        "--improve",
        type=whole_number(0),
        default=0,
        metavar="RUNS",
        help="so many runs for each validated budget improve its plan by small changes",
    )
    add_workdir_option(parser)
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=0,
        help="Ray workers with a pipeline each; 0: here",
    )
    parser.add_argument("--ray-address", help="a Ray cluster; this machine if left out")
    add_clip_options(parser, guidance=True)
    add_model_options(parser)
    parser.set_defaults(run=_build_policy)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add which errors are measured, and how plans are chosen by them."""
    group = parser.add_argument_group("errors")
    group.add_argument("--max-skip", type=whole_number(2), default=8, help="steps in a segment")
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

    from vidaccel.calibration.build import build_policy, check_build
    from vidaccel.resolve import Resolver

    options: dict[str, Any] = {
        "num_inference_steps": arguments.steps,
        "seeds": range(arguments.seeds),
        "validate": not arguments.no_validate,
    }
    names = ("max_skip", "method", "objective", "metric", "aggregation", "improve", "workers")
    options |= {name: getattr(arguments, name) for name in names}
    check_build(prompts, **options)
    pipe = pipeline_of(arguments, Resolver(None), arguments.steps)
    pipe.set_progress_bar_config(disable=True)
    policy = build_policy(
        pipe,
        prompts,
        **options,
        faithful=arguments.faithful,
        call_kwargs=call_of(pipe, arguments),
        workdir=arguments.workdir,
        ray_address=arguments.ray_address,
        load=loader_of(arguments),
    )
    policy.save(out)
    print(policy.table())
    print_written([out])


def add_show(commands: Any) -> None:
    """Add `vidaccel show`."""
    parser = add_command(
        commands, "show", "what a policy says, or which policies come with vidaccel"
    )
    parser.add_argument(
        "policy",
        nargs="?",
        help="file, folder, name of a shipped one or hub id; the list of those shipped if left out",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw errors and plans there")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    """Run `vidaccel show`."""
    from vidaccel.plans.policy import CachePolicy
    from vidaccel.plans.store import shipped_as

    if arguments.policy is None:
        if arguments.plot is not None:
            raise PolicyError("--plot draws one policy: name it")
        print(shipped_table())
        return
    check_writable(arguments.plot)
    shipped = {} if Path(arguments.policy).exists() else shipped_as(arguments.policy)
    if len(shipped) > 1 and arguments.plot is None:
        print("\n\n".join(CachePolicy.load(path).table() for path in shipped.values()))
        return
    policy = CachePolicy.from_pretrained(arguments.policy)
    print(policy.table())
    if arguments.plot is not None:
        from vidaccel.lemica.plot import plot_policy

        plot_policy(policy, arguments.plot)
        print_written([arguments.plot])


def shipped_table() -> str:
    """Return the policies that come with vidaccel: a line each, by the name that commands take."""
    from vidaccel.plans.shipped import load_shipped

    rows = [("name for --policy and show", "steps", "made", "budgets")]
    for file, policy in sorted(load_shipped()):
        name = file.removesuffix(".json").replace("--", "/", 1)
        budgets = policy.budgets()
        few = ", ".join(map(str, budgets)) if len(budgets) < 8 else f"{budgets[0]} to {budgets[-1]}"
        rows.append((name, str(policy.num_inference_steps), policy.provenance, few))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
