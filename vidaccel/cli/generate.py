"""The command `vidaccel generate`: a prompt to a clip, accelerated, and compared if asked for."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vidaccel.cli.options import (
    add_cache_options,
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    at_least,
    attention_of,
    cache_of,
    call_of,
    model_name,
    pipeline_of,
)
from vidaccel.cli.output import check_writable, print_result, print_written, write_json
from vidaccel.errors import ModelError, PolicyError


def add_generate(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        "turn a prompt into a clip, accelerated, and compare it with the plain one",
    )
    parser.add_argument("prompt", nargs="?", help="what to show; the embedded model has its own")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument("--steps", type=at_least(1), help="denoising steps")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the noise")
    parser.add_argument("--compare", action="store_true", help="also run without acceleration")
    parser.add_argument("--fps", type=at_least(1), default=16, help="frames per second")
    parser.add_argument("--out", type=Path, default=Path("out/video.mp4"), help="an .mp4 file")
    add_json_option(parser)
    _add_policy_options(parser)
    add_cache_options(parser)
    add_clip_options(parser, guidance=True)
    add_model_options(parser)
    parser.set_defaults(run=_generate)


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which steps are computed, and which parts of those."""
    group = parser.add_argument_group("acceleration")
    group.add_argument(
        "--policy",
        "--plan",
        default="auto",
        help='which steps are computed: "auto", "all", "every N", a list such as 0,1,5, or a '
        "policy as a file, folder or hub id; --plan is the same",
    )
    group.add_argument(
        "--preset",
        default="balanced",
        choices=("quality", "balanced", "fast"),
        help="how many steps auto or a policy file computes",
    )
    wish = group.add_mutually_exclusive_group()
    wish.add_argument(
        "--budget", type=at_least(1), help="take the plan of the policy file with so many steps"
    )
    wish.add_argument(
        "--speedup", type=float, help="take the plan that computes so many times fewer steps"
    )
    wish.add_argument(
        "--max-error", type=float, help="take the plan without a segment of a larger error"
    )
    group.add_argument(
        "--cache",
        default="auto",
        metavar="THRESHOLD",
        help='the block cache: "auto", "none", "model" (the threshold of the model\'s row), or a '
        "threshold; with a policy it can only have more steps computed",
    )
    group.add_argument(
        "--attention",
        default="auto",
        metavar="TOP_P",
        help='sparse attention: "auto", "none" or the mass to keep, such as 0.9',
    )


def _generate(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from vidaccel.clips import video
    from vidaccel.plans.plan import RunSettings
    from vidaccel.resolve import Resolver

    # Everything that can be wrong is found before the first second of work.
    policy, cache = _policy_of(arguments), cache_of(arguments)
    attention = attention_of(arguments)
    resolver = Resolver(policy, cache, arguments.preset)
    out: Path = arguments.out
    video.check_writable(out)
    check_writable(arguments.json)
    if arguments.model is not None and not arguments.prompt:
        raise ModelError("a prompt is needed: vidaccel generate --model ... PROMPT")

    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.clips.load import steps_of
    from vidaccel.environment import environment

    pipe = pipeline_of(arguments)
    prompt = EMBEDDED_PROMPT if arguments.prompt is None else arguments.prompt
    call = call_of(
        pipe,
        arguments,
        prompt=prompt,
        negative_prompt=arguments.negative_prompt,
        num_inference_steps=arguments.steps,
    )
    resolver.plan(RunSettings(steps_of(pipe, call)))
    settings = {**call, "model": model_name(arguments), "seed": arguments.seed}
    settings |= {"policy": resolver.policy, "dtype": str(pipe.dtype), "device": str(pipe.device)}
    print(f"{settings['model']}: {call['prompt']}", file=sys.stderr)

    make = _with_plain if arguments.compare else _alone
    table, result, written = make(
        pipe, call, arguments, {"policy": resolver, "attention": attention}
    )
    print_result(table, arguments.json)
    print_written(written)
    write_json({"settings": settings, **result, "environment": environment()}, arguments.json)


# What a generation comes to: a table for people, numbers for JSON, and the files written.
_Made = tuple[str, dict[str, Any], list[Path]]


def _with_plain(
    pipe: Any, call: dict[str, Any], arguments: argparse.Namespace, acceleration: dict[str, Any]
) -> _Made:
    """Make the clip with and without acceleration, and write what shows the difference."""
    from vidaccel.clips.compare import compare, comparison_table, write_comparison

    plain, fast, result = compare(pipe, call, seed=arguments.seed, **acceleration)
    clips = {"plain": plain.frames, f"vidaccel {result['speedup']:.2f}x": fast.frames}
    written = write_comparison(arguments.out, clips, arguments.fps)
    return comparison_table(result), result, written


def _alone(
    pipe: Any, call: dict[str, Any], arguments: argparse.Namespace, acceleration: dict[str, Any]
) -> _Made:
    """Make the accelerated clip, and write it."""
    from vidaccel.api import accelerate, report
    from vidaccel.clips.compare import adherence_of
    from vidaccel.clips.generate import generate
    from vidaccel.clips.video import write_video

    accelerate(pipe, **acceleration)
    run = generate(pipe, call, seed=arguments.seed, label="vidaccel")
    result = {
        "seconds": run.seconds,
        "denoising_seconds": run.denoising_seconds,
        "adherence": adherence_of(run.frames, call["prompt"]),
        "report": run.report,
    }
    write_video(arguments.out, run.frames, arguments.fps)
    return f"{report(pipe)}\n{run.seconds:.1f} s in all", result, [arguments.out]


def _policy_of(arguments: argparse.Namespace) -> Any:
    """Return the policy and the wish beside it, as `accelerate(policy=...)` takes them.

    Raises:
        PolicyError: there is a wish, but no policy file to take it from.
    """
    text = arguments.policy
    wish = {name: getattr(arguments, name) for name in ("budget", "speedup", "max_error")}
    if any(value is not None for value in wish.values()):
        from vidaccel.plans.policy import CachePolicy

        if "/" not in text and not text.endswith(".json"):
            raise PolicyError(
                "--budget, --speedup and --max-error need a policy file in --policy, "
                f"found {text!r}"
            )
        return CachePolicy.from_pretrained(text).plan(**wish)
    from vidaccel.resolve import policy_from_text

    return policy_from_text(text)
