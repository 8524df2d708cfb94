"""The command `vidaccel suggest-threshold`: a threshold of the block cache, from recorded runs."""

import argparse
from typing import Any

from vidaccel.cli.argument_types import number
from vidaccel.cli.options import (
    add_cache_options,
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    add_seed_option,
    add_steps_option,
    cache_of,
    call_of,
    check_prompts,
    pipeline_of,
)
from vidaccel.cli.output import check_writable, print_result, write_json
from vidaccel.errors import ModelError


def add_suggest_threshold(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "suggest-threshold",
        "find the threshold of the block cache from recorded runs",
    )
    parser.add_argument("prompt", nargs="*", help="one or a few; the embedded model has its own")
    add_steps_option(parser, 2, 50)
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument(
        "--speedup", type=number(0, above=True), help="how many times fewer blocks are to run"
    )
    wish.add_argument(
        "--max-error", type=number(0), help="largest error of the final latents, as a fraction"
    )
    add_seed_option(parser)
    add_json_option(parser)
    add_cache_options(parser)
    add_clip_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=_suggest_threshold)


def _suggest_threshold(arguments: argparse.Namespace) -> None:
    """Run the command."""
    check_writable(arguments.json)
    check_prompts(arguments.prompt)
    if arguments.model is not None and not arguments.prompt:
        raise ModelError("a prompt is needed: vidaccel suggest-threshold --model ... PROMPT")
    cache = cache_of(arguments)

    from dataclasses import asdict, replace

    from vidaccel.calibration.threshold import suggest_threshold
    from vidaccel.clips.embedded import EMBEDDED_PROMPT
    from vidaccel.environment import environment
    from vidaccel.resolve import Resolver

    # Any threshold will do to hold the other settings against the model.
    resolver = Resolver(None, replace(cache, threshold=0.0))
    pipe = pipeline_of(arguments, resolver, arguments.steps)
    pipe.set_progress_bar_config(disable=True)
    found = suggest_threshold(
        pipe,
        arguments.prompt or [EMBEDDED_PROMPT],
        num_inference_steps=arguments.steps,
        speedup=arguments.speedup,
        max_error=arguments.max_error,
        cache=cache,
        call_kwargs=call_of(pipe, arguments),
        seed=arguments.seed,
    )
    print_result(str(found), arguments.json)
    write_json({**asdict(found), "environment": environment()}, arguments.json)
