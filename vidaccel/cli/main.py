"""The command line: vidaccel COMMAND; --help lists them."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vidaccel import __version__
from vidaccel.cli import bench as commands_of_benches
from vidaccel.cli import bench_quality as comparisons
from vidaccel.cli import policy as commands_of_policies
from vidaccel.cli.compare import compare_parser, demo_parser
from vidaccel.cli.env import env_parser
from vidaccel.cli.options import (
    add_cache_options,
    add_model_options,
    at_least,
    cache_of,
    check_writable,
    print_result,
    size,
    sparse_attention_of,
    write_json,
)
from vidaccel.errors import ModelError, PolicyError, VidaccelError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for bad input, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="vidaccel", description="Makes Diffusers video pipelines faster without training."
    )
    parser.add_argument("--version", action="version", version=f"vidaccel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _generate_parser,
        _policy_parsers,
        _suggest_parser,
        _bench_parser,
        _hosts_parser,
        compare_parser,
        demo_parser,
        env_parser,
    ):
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except VidaccelError as error:
        print(f"vidaccel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vidaccel: stopped", file=sys.stderr)
        return 130
    return 0


def _generate_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="turn a prompt into a clip, accelerated, and compare it with the plain one",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", help="what to show; the embedded model has its own")
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--negative-prompt", metavar="TEXT")
    parser.add_argument("--steps", type=at_least(1), help="denoising steps")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    parser.add_argument("--frames", type=at_least(1), help="number of frames")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument(
        "--plan",
        default="auto",
        help='steps to compute: "auto", "all", "every N", a list such as 0,1,5, or a policy file',
    )
    parser.add_argument(
        "--preset",
        default="balanced",
        choices=("quality", "balanced", "fast"),
        help="how many steps auto or a policy file computes",
    )
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--budget", type=at_least(1), help="of a policy file: computed steps")
    wish.add_argument("--speedup", type=float, help="of a policy file: computed steps alone")
    wish.add_argument("--max-error", type=float, help="of a policy file: of any segment")
    parser.add_argument(
        "--cache",
        default="auto",
        metavar="THRESHOLD",
        help='the block cache: "auto", "none", "model" (the threshold of the model\'s row), or a '
        "threshold; with a plan it can only have more steps computed",
    )
    add_cache_options(parser)
    parser.add_argument(
        "--attention",
        default="auto",
        metavar="TOP_P",
        help='sparse attention: "auto", "none" or the mass to keep, such as 0.9',
    )
    parser.add_argument("--compare", action="store_true", help="also run without acceleration")
    parser.add_argument("--fps", type=at_least(1), default=16, help="of the files")
    parser.add_argument("--out", type=Path, default=Path("out/video.mp4"), help="an .mp4 file")
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(parser)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    from vidaccel.clips import video
    from vidaccel.plans.plan import RunSettings
    from vidaccel.resolve import course_source, policy_source

    # Everything that can be wrong is found before the first second of work.
    policy, cache = _policy(arguments), cache_of(arguments)
    attention = sparse_attention_of(arguments)
    course_source(policy, cache, arguments.preset)
    source = policy_source(policy, arguments.preset)
    out: Path = arguments.out
    video.check_writable(out)
    check_writable(arguments.json)
    if arguments.model is not None and not arguments.prompt:
        raise ModelError("a prompt is needed: vidaccel generate --model ... PROMPT")

    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g
    from vidaccel.environment import environment

    pipe = _pipeline(arguments)
    width, height = arguments.size or (None, None)
    defaults = (
        {"prompt": embedded.EMBEDDED_PROMPT, **embedded.EMBEDDED_CALL}
        if arguments.model is None
        else {}
    )
    wanted = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": arguments.frames,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
    }
    call = g.call_arguments(
        pipe, defaults | {name: value for name, value in wanted.items() if value is not None}
    )
    source.resolve(RunSettings(g.steps_of(pipe, call)))
    settings = {**call, "model": arguments.model or "tiny-wan", "seed": arguments.seed}
    settings |= {"policy": source.description, "dtype": str(pipe.dtype), "device": str(pipe.device)}
    print(f"{settings['model']}: {call['prompt']}", file=sys.stderr)

    if arguments.compare:
        plain, fast, result = g.compare(
            pipe,
            call,
            policy=policy,
            cache=cache,
            attention=attention,
            preset=arguments.preset,
            seed=arguments.seed,
        )
        clips = {"plain": plain.frames, f"vidaccel {result['speedup']:.2f}x": fast.frames}
        written = g.write_comparison(out, clips, arguments.fps)
        print_result(g.comparison_table(result), arguments.json)
    else:
        from vidaccel.api import accelerate, report

        accelerate(pipe, policy=policy, cache=cache, attention=attention, preset=arguments.preset)
        fast = g.generate(pipe, call, seed=arguments.seed, label="vidaccel")
        result = {
            "seconds": fast.seconds,
            "denoising_seconds": fast.denoising_seconds,
            "adherence": g.adherence_of(fast.frames, call["prompt"]),
            "report": fast.report,
        }
        video.write_video(out, fast.frames, arguments.fps)
        written = [out]
        print_result(f"{report(pipe)}\n{fast.seconds:.1f} s in all", arguments.json)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    write_json({"settings": settings, **result, "environment": environment()}, arguments.json)


def _policy_parsers(commands: Any) -> None:
    commands_of_policies.add_build(commands, add_model_options, _pipeline)
    commands_of_policies.add_show(commands)


def _suggest_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "suggest-threshold",
        help="find the threshold of the block cache from recorded runs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", nargs="*", help="one or a few; the embedded model has its own")
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--steps", type=at_least(2), default=50, help="denoising steps")
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--speedup", type=float, help="how many times fewer blocks are to run")
    wish.add_argument("--max-error", type=float, help="of the final latents, as a fraction")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    parser.add_argument("--frames", type=at_least(1), help="number of frames")
    add_cache_options(parser)
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(parser)
    parser.set_defaults(run=_suggest)


def _suggest(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    if arguments.model is not None and not arguments.prompt:
        raise ModelError("a prompt is needed: vidaccel suggest-threshold --model ... PROMPT")
    cache = cache_of(arguments)

    from dataclasses import asdict

    from vidaccel.calibration.threshold import suggest_threshold
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g
    from vidaccel.environment import environment

    pipe = _pipeline(arguments)
    pipe.set_progress_bar_config(disable=True)
    width, height = arguments.size or (None, None)
    wanted = {"height": height, "width": width, "num_frames": arguments.frames}
    defaults = embedded.EMBEDDED_CALL if arguments.model is None else {}
    given = {name: value for name, value in wanted.items() if value is not None}
    found = suggest_threshold(
        pipe,
        arguments.prompt or [embedded.EMBEDDED_PROMPT],
        num_inference_steps=arguments.steps,
        speedup=arguments.speedup,
        max_error=arguments.max_error,
        cache=cache,
        call_kwargs=g.call_arguments(pipe, defaults | given),
        seed=arguments.seed,
    )
    print_result(str(found), arguments.json)
    write_json({**asdict(found), "environment": environment()}, arguments.json)


def _bench_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure, and write the numbers as JSON")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    commands_of_benches.add_engine(benches, add_model_options, _pipeline)
    commands_of_benches.add_kernels(benches)
    comparisons.add_quality(benches, add_model_options)
    comparisons.add_parity(benches, add_model_options)
    commands_of_policies.add_benches(benches, add_model_options, _pipeline)
    commands_of_benches.add_attention(benches, add_model_options, _pipeline)


def _hosts_parser(commands: Any) -> None:
    parser = commands.add_parser("hosts", help="print the table of supported models")
    parser.set_defaults(run=_hosts)


def _hosts(arguments: argparse.Namespace) -> None:
    from vidaccel.hosts.registry import markdown_table

    print(markdown_table())


def _pipeline(arguments: argparse.Namespace) -> Any:
    import torch

    from vidaccel.clips.generate import load_pipeline

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return load_pipeline(
        arguments.model, device=arguments.device, dtype=dtype, offload=arguments.offload
    )


def _policy(arguments: argparse.Namespace) -> Any:
    """What `--plan` and the wish beside it say, as `accelerate(policy=...)` takes it."""
    text = arguments.plan
    wish = {name: getattr(arguments, name) for name in ("budget", "speedup", "max_error")}
    if any(value is not None for value in wish.values()):
        from vidaccel.plans.policy import CachePolicy

        if "/" not in text and not text.endswith(".json"):
            raise PolicyError(
                f"--budget, --speedup and --max-error need a policy file in --plan, found {text!r}"
            )
        return CachePolicy.from_pretrained(text).plan(**wish)
    if text == "all":
        return None
    if re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        return [int(step) for step in text.split(",")]
    return text
