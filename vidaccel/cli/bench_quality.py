"""The benches of results: `vidaccel bench quality`, `parity` and `attention`."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import shares, whole_number
from vidaccel.cli.options import (
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_plot_option,
    add_prompts_option,
    add_seed_option,
    add_steps_option,
    add_workdir_option,
    call_of,
    model_name,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import check_writable, print_bench
from vidaccel.errors import MetricUnavailable, ModelError, PlanError, UnsupportedPipelineError

EMBEDDED_POLICY = "vidaccel--tiny-wan/50-steps.json"
# Held-out captions that no shipped policy was measured or validated on.
EMBEDDED_PROMPTS = (
    "a white checkered circle moving right on a forest checkered background",
    "a red dotted circle moving up on a charcoal striped background",
    "a yellow striped triangle moving left on a charcoal checkered background",
    "a magenta checkered square moving right on a maroon striped background",
    "a green checkered circle moving up on a maroon dotted background",
    "a white dotted square moving left on a forest striped background",
)


def add_quality(benches: Any) -> None:
    """Add `vidaccel bench quality`."""
    parser = add_command(
        benches, "quality", "methods side by side: quality against speed, with figure and table"
    )
    parser.add_argument("--methods", metavar="A,B,...", help="see --list; all if left out")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    add_prompts_option(parser)
    parser.add_argument(
        "--policy", help="policy file, folder or hub id; a shipped one that fits if left out"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="prompts that MagCache is calibrated on"
    )
    parser.add_argument(
        "--budgets",
        type=whole_number(2),
        nargs="+",
        default=[],
        metavar="N",
        help="computed steps of the plans; for speedups of 1.3 to 6 if left out",
    )
    parser.add_argument(
        "--search-runs",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="runs on the --calibration prompts that each search for a plan may make; 0 leaves "
        "the methods out that search by whole runs",
    )
    add_steps_option(parser, 2, 50)
    add_seed_option(parser)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="what speedups are taken from"
    )
    add_workdir_option(parser)
    parser.add_argument(
        "--every-point", action="store_true", help="a row for every setting, not for equal times"
    )
    add_json_option(parser)
    add_plot_option(parser)
    add_clip_options(parser, guidance=True)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_quality)


def _quality(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench quality`."""
    from vidaccel.bench.methods import METHODS, check_names, variants
    from vidaccel.bench.variants import MethodContext

    if arguments.list:
        print("\n".join(METHODS))
        return
    check_writable(arguments.json, arguments.plot)
    if arguments.prompts is None and arguments.model is not None:
        raise ModelError("prompts are needed: vidaccel bench quality --model ... --prompts FILE")

    names = None if arguments.methods is None else arguments.methods.split(",")
    check_names(names or ())
    most = max(arguments.budgets, default=0)
    if most > arguments.steps:
        raise PlanError(f"--budgets: found {most}, expected at most {arguments.steps} steps")
    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(EMBEDDED_PROMPTS)
    policy = _policy_of(arguments)
    if arguments.calibration:
        calibration = read_prompts(arguments.calibration)
    else:
        calibration = list(policy.prompts[:2]) if policy is not None else []
    if arguments.search_runs and not calibration:
        raise ModelError("prompts to search on are needed: --search-runs N --calibration FILE")

    from vidaccel.bench.figures import draw_quality
    from vidaccel.bench.quality import quality
    from vidaccel.bench.tables import points_table, quality_table
    from vidaccel.clips.load import steps_of
    from vidaccel.clips.metrics import load_lpips

    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments, num_inference_steps=arguments.steps)
    ratios = None
    if calibration and (names is None or "MagCache" in names):
        ratios = _magnitude_ratios(pipe, call, calibration, arguments.seed)
    steps = steps_of(pipe, call)
    searched: Any = {}
    if arguments.search_runs:
        searched = _searched(pipe, call, calibration, steps, names, arguments)
    chosen = tuple(arguments.budgets)
    context = MethodContext(steps, policy, ratios, chosen, searched)
    measured, left_out = variants(names, context)
    lpips = None
    try:
        lpips = load_lpips()
    except MetricUnavailable as error:
        left_out["lpips"] = str(error)
    result = quality(
        pipe,
        call,
        prompts,
        measured,
        seed=arguments.seed,
        clock=arguments.clock,
        workdir=arguments.workdir,
        lpips=lpips,
    )
    result.settings.update(
        model=model_name(arguments),
        policy=arguments.policy or (EMBEDDED_POLICY if policy is not None else None),
        mag_ratios=ratios,
    )
    if searched:
        result.settings.update(search_runs=arguments.search_runs, searched_on=calibration)
    result.left_out.update(left_out)
    table = points_table if arguments.every_point else quality_table
    print_bench(arguments, result, table, draw_quality)


def _searched(
    pipe: Any,
    call: dict[str, Any],
    prompts: list[str],
    steps: int,
    names: list[str] | None,
    arguments: argparse.Namespace,
) -> Any:
    """Run the searches of the methods that need them."""
    from vidaccel.bench.plan_searches import SEARCHES, searched_plans
    from vidaccel.bench.variants import MethodContext

    return searched_plans(
        pipe,
        {**call, "num_inference_steps": steps},
        prompts,
        MethodContext(steps, chosen=tuple(arguments.budgets)).budgets,
        [method for method in SEARCHES if names is None or method in names],
        arguments.search_runs,
        seed=arguments.seed,
        workdir=arguments.workdir,
    )


def _policy_of(arguments: argparse.Namespace) -> Any:
    """Return the policy that --policy names, or the embedded model's own; None without either."""
    from vidaccel.plans.policy import CachePolicy
    from vidaccel.plans.shipped import shipped_policies

    if arguments.policy:
        return CachePolicy.from_pretrained(arguments.policy)
    if arguments.model is None:
        return CachePolicy.load(shipped_policies()[EMBEDDED_POLICY])
    return None


def _magnitude_ratios(
    pipe: Any, call: dict[str, Any], prompts: list[str], seed: int
) -> tuple[float, ...] | None:
    """Measure what MagCache needs; None where it does not work, which its row then says."""
    from vidaccel.bench.baselines import magnitude_ratios

    calls = [{**call, "prompt": prompt} for prompt in prompts]
    try:
        return tuple(magnitude_ratios(pipe, calls, seed=seed))
    except UnsupportedPipelineError:
        return None


def add_parity(benches: Any) -> None:
    """Add `vidaccel bench parity`."""
    parser = add_command(
        benches,
        "parity",
        "DBCache beside cache-dit's with equal settings: steps reused and results",
    )
    parser.add_argument("--prompt", default=EMBEDDED_PROMPTS[0], help="what to show")
    add_steps_option(parser, 8, 30)
    add_seed_option(parser)
    add_json_option(parser)
    add_clip_options(parser)
    parser.set_defaults(size="32x32", frames=9)
    add_model_options(parser, threads=True)
    parser.set_defaults(run=_parity)


def _parity(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench parity`."""
    check_writable(arguments.json)
    from vidaccel.bench.parity import parity, parity_table

    pipe = pipeline_of(arguments)
    call = call_of(pipe, arguments, prompt=arguments.prompt, num_inference_steps=arguments.steps)
    result = parity(pipe, call, seed=arguments.seed)
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, parity_table)


def add_attention(benches: Any) -> None:
    """Add `vidaccel bench attention`."""
    parser = add_command(
        benches, "attention", "PSNR against density of sparse attention, on the embedded model"
    )
    add_steps_option(parser, 2, 12)
    add_prompts_option(parser)
    parser.add_argument(
        "--top-p", type=shares, default="0.5,0.7,0.9", help="masses to keep, separated by commas"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="measure these alone, without single changes"
    )
    add_workdir_option(parser, "--partial")
    add_json_option(parser)
    add_plot_option(parser)
    add_model_options(parser, any_model=False)
    parser.set_defaults(run=_attention)


def _attention(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench attention`."""
    check_writable(arguments.json, arguments.plot)
    from vidaccel.bench.attention import PROMPTS, attention, attention_table
    from vidaccel.bench.figures import draw_attention
    from vidaccel.clips.embedded import EMBEDDED_CALL

    pipe = pipeline_of(arguments)
    result = attention(
        pipe,
        {**EMBEDDED_CALL, "num_inference_steps": arguments.steps},
        prompts=read_prompts(arguments.prompts) if arguments.prompts else PROMPTS,
        top_ps=arguments.top_p,
        methods=arguments.methods,
        changes_at=0.7 if arguments.methods is None else None,
        workdir=arguments.workdir,
    )
    result.settings["model"] = model_name(arguments)
    print_bench(arguments, result, attention_table, draw_attention)
