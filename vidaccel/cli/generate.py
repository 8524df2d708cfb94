"""The command `vidaccel generate`: a prompt to a clip, accelerated, and compared if asked for."""

import argparse
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import MAX_STEPS, number, seeds, whole_number
from vidaccel.cli.options import (
    add_cache_options,
    add_clip_options,
    add_command,
    add_json_option,
    add_model_options,
    attention_of,
    cache_of,
    call_of,
    check_prompts,
    model_name,
    pipeline_of,
    read_prompts,
)
from vidaccel.cli.output import (
    check_writable,
    free_name,
    numbered_names,
    print_quiet,
    print_result,
    print_written,
    write_json,
)
from vidaccel.errors import ModelError, VidaccelError
from vidaccel.precision.settings import PRESETS

DEFAULT_OUT = "out/video.mp4"


def add_generate(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        "turn a prompt into a clip, accelerated, and compare it with the plain one",
    )
    parser.add_argument(
        "prompt", nargs="*", help="what to show, one clip each; the embedded model has its own"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one per line")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="where the clip starts, if the model takes one"
    )
    parser.add_argument("--steps", type=whole_number(1, MAX_STEPS), help="denoising steps")
    parser.add_argument(
        "--seed",
        type=seeds,
        default="0",
        metavar="N",
        help="seeds of the noise, separated by commas",
    )
    parser.add_argument("--compare", action="store_true", help="also run without acceleration")
    parser.add_argument("--fps", type=whole_number(1), default=16, help="frames per second")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"an .mp4 file, numbered if there are several clips; {DEFAULT_OUT}, or a number "
        "behind it where that is taken, if left out",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print the names of the files, and nothing else"
    )
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
        help='which steps are computed: "auto", "learn" (from a first run, for those after it), '
        '"all", "every N", a list such as 0,1,5, or a policy as a file, folder, hub id or the name '
        "of a shipped one (vidaccel show lists them); --plan is the same",
    )
    group.add_argument(
        "--preset",
        default="balanced",
        choices=("quality", "balanced", "fast"),
        help="how many steps auto or a policy file computes",
    )
    wish = group.add_mutually_exclusive_group()
    wish.add_argument(
        "--budget", type=whole_number(1), help="take the plan of the policy with so many steps"
    )
    wish.add_argument(
        "--speedup",
        type=number(0, above=True),
        help="take the plan that computes so many times fewer steps",
    )
    wish.add_argument(
        "--max-error", type=number(0), help="take the plan without a segment of a larger error"
    )
    wish.add_argument(
        "--psnr",
        type=number(0, above=True),
        metavar="DB",
        help="take the fastest plan that is predicted to come so close to the plain clip",
    )
    group.add_argument(
        "--cache",
        default="none",
        metavar="THRESHOLD",
        help='the block cache: "none", "model" (the threshold of the model\'s row), or a '
        "threshold; with a policy it can only have more steps computed",
    )
    group.add_argument(
        "--attention",
        default="auto",
        metavar="TOP_P",
        help='sparse attention: "auto", "none" or the mass to keep, such as 0.9',
    )
    group.add_argument(
        "--precision",
        default="none",
        choices=("none", *PRESETS),
        help="numbers that the linear layers of the blocks compute with",
    )


def _generate(arguments: argparse.Namespace) -> None:
    """Run the command."""
    before = logging.root.manager.disable
    if arguments.quiet:
        logging.disable(logging.WARNING)
    try:
        _make_all(arguments)
    finally:
        logging.disable(before)


def _make_all(arguments: argparse.Namespace) -> None:
    """Make every clip that was asked for."""
    # Everything that can be wrong is found before the first second of work.
    resolver, attention = _resolver_of(arguments), attention_of(arguments)
    prompts = _prompts_of(arguments)
    wanted = [(prompt, seed) for prompt in prompts for seed in arguments.seed]
    outs = _outs_of(arguments, len(wanted))
    check_writable(arguments.json)
    check_steps(arguments, resolver)

    from vidaccel.environment import environment

    call = {
        "prompt": prompts[0],
        "negative_prompt": arguments.negative_prompt,
        "image": _image_of(arguments),
        "num_inference_steps": arguments.steps,
    }
    steps = call.pop("num_inference_steps")
    pipe = pipeline_of(arguments, resolver, steps, **call)
    call = call_of(pipe, arguments, num_inference_steps=steps, **call)

    from vidaccel.clips.notes import notes_before
    from vidaccel.clips.outline import check_acceleration

    check_acceleration(pipe, call, resolver)
    if not arguments.quiet:
        for note in notes_before(pipe, call):
            print(f"note: {note}", file=sys.stderr)
    make = _with_plain if arguments.compare else _alone
    precision = None if arguments.precision == "none" else arguments.precision
    acceleration = {"policy": resolver, "attention": attention, "precision": precision}
    results = []
    for done, ((prompt, seed), out) in enumerate(zip(wanted, outs, strict=True)):
        one = _Clip(arguments, {**call, "prompt": prompt}, seed, out, first=not done)
        if not arguments.quiet:
            count = f" ({done + 1} of {len(wanted)}, seed {seed})" if len(wanted) > 1 else ""
            print(f"{model_name(arguments)}: {prompt}{count}", file=sys.stderr)
        table, result, written = make(pipe, one, acceleration)
        files = [str(path) for path in written]
        results.append({"settings": one.settings(pipe, resolver), **result, "files": files})
        if arguments.quiet:
            print_quiet(written, arguments.json)
        else:
            print_result(table, arguments.json)
            print_written(written)
    found = results[0] if len(results) == 1 else {"clips": results}
    write_json({**found, "environment": environment()}, arguments.json)


@dataclass(frozen=True)
class _Clip:
    """One clip to be made.

    Attributes:
        arguments: those of the command line.
        call: arguments of the pipeline's call.
        seed: seed of the noise.
        out: its file.
        first: no clip was made before it.
    """

    arguments: argparse.Namespace
    call: dict[str, Any]
    seed: int
    out: Path
    first: bool

    def settings(self, pipe: Any, resolver: Any) -> dict[str, Any]:
        """Return the settings as the JSON result has them."""
        image = {} if self.arguments.image is None else {"image": str(self.arguments.image)}
        return {
            **self.call,
            **image,
            "model": model_name(self.arguments),
            "seed": self.seed,
            "policy": resolver.policy,
            "precision": self.arguments.precision,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        }


# What a generation comes to: a table for people, numbers for JSON, and the files written.
_Made = tuple[str, dict[str, Any], list[Path]]


def _with_plain(pipe: Any, one: _Clip, acceleration: dict[str, Any]) -> _Made:
    """Make the clip with and without acceleration, and write what shows the difference."""
    from vidaccel.clips.compare import compare, comparison_table, write_comparison
    from vidaccel.clips.generate import Run

    quiet, fps = one.arguments.quiet, one.arguments.fps
    written: list[Path] = []

    def keep(plain: Run, fast: Run) -> None:
        """Write the clips, so that whatever befalls their measuring, they are there."""
        clips = {
            "plain": plain.frames,
            f"vidaccel {plain.seconds / fast.seconds:.2f}x": fast.frames,
        }
        written.extend(write_comparison(one.out, clips, fps))
        if not quiet:
            print("measuring how close the clips are ...", file=sys.stderr)

    _, _, result = compare(
        pipe,
        one.call,
        seed=one.seed,
        progress=not quiet,
        warm_up=one.first,
        fps=fps,
        keep=keep,
        **acceleration,
    )
    return comparison_table(result), result, written


def _alone(pipe: Any, one: _Clip, acceleration: dict[str, Any]) -> _Made:
    """Make the accelerated clip, and write it."""
    from vidaccel.api import accelerate, report
    from vidaccel.clips.compare import adherence_of
    from vidaccel.clips.generate import generate
    from vidaccel.clips.notes import notes_on
    from vidaccel.clips.video import write_video

    accelerate(pipe, **acceleration)
    run = generate(
        pipe, one.call, seed=one.seed, label="vidaccel", progress=not one.arguments.quiet
    )
    notes = notes_on(pipe, one.call, run)
    result = {
        "seconds": run.seconds,
        "denoising_seconds": run.denoising_seconds,
        "adherence": adherence_of(run.frames, one.call["prompt"]),
        "notes": notes,
        "report": run.report,
    }
    write_video(one.out, run.frames, one.arguments.fps)
    lines = [str(report(pipe)), *(f"note: {note}" for note in notes), f"{run.seconds:.1f} s in all"]
    return "\n".join(lines), result, [one.out]


def _prompts_of(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts; the embedded model's own where none is given.

    Raises:
        ModelError: a prompt is empty, or there is none for a model that has none of its own.
        PolicyError: the file of prompts cannot be read, or holds none.
    """
    prompts: list[str] = arguments.prompt
    if arguments.prompts is not None:
        if prompts:
            raise ModelError("--prompts takes the place of the prompts: give one or the other")
        return read_prompts(arguments.prompts)
    check_prompts(prompts)
    if prompts:
        return prompts
    if arguments.model is not None:
        from vidaccel.clips.outline import outline_of

        outline_of(arguments.model)  # a model that is not there is the worse mistake
        raise ModelError("a prompt is needed: vidaccel generate --model ... PROMPT")
    from vidaccel.clips.embedded import EMBEDDED_PROMPT

    return [EMBEDDED_PROMPT]


def check_steps(arguments: argparse.Namespace, resolver: Any) -> None:
    """Hold the plan against the number of steps, where that is known without the model.

    Raises:
        PlanError: it is for other steps.
    """
    from vidaccel.clips.embedded import EMBEDDED_CALL
    from vidaccel.plans.plan import RunSettings

    embedded = EMBEDDED_CALL["num_inference_steps"] if arguments.model is None else None
    steps = arguments.steps or embedded
    # What auto has for a run depends on its model.
    if steps is None or arguments.policy in ("auto", "learn"):
        return
    try:
        resolver.plan(RunSettings(steps))
    except VidaccelError:
        if arguments.model is None or steps < 2:
            raise
        # MiniMax-H3 makes one step less than it is asked for, and may be the model.
        with suppress(VidaccelError):
            resolver.plan(RunSettings(steps - 1))
            return
        raise


def _outs_of(arguments: argparse.Namespace, count: int) -> list[Path]:
    """Return a file for each clip, numbered where there are several, found writable.

    Only a name that was given is written over.

    Raises:
        VideoError: one of them cannot be written.
    """
    from vidaccel.clips import video
    from vidaccel.clips.compare import files_beside

    given: Path = arguments.out or Path(DEFAULT_OUT)

    def written(out: Path) -> list[Path]:
        numbered = numbered_names(out, count)
        beside = [path for one in numbered for path in files_beside(one)]
        return [*numbered, *(beside if arguments.compare else [])]

    out = given if arguments.out is not None else free_name(given, written)
    outs = numbered_names(out, count)
    video.check_writable(outs[0])
    return outs


def _image_of(arguments: argparse.Namespace) -> Any:
    """Return the image that the clip is to start from; None where none is given.

    Raises:
        VideoError: it is no image.
    """
    if arguments.image is None:
        return None
    from vidaccel.clips.video import read_image

    return read_image(arguments.image)


def _resolver_of(arguments: argparse.Namespace) -> Any:
    """Return what `accelerate(policy=...)` takes: the policy, the wish beside it, and the cache.

    Raises:
        PlanError, PolicyError: there is no such policy, or it has no such plan.
    """
    from vidaccel.resolve import Resolver, policy_from_text

    names = ("budget", "speedup", "max_error", "psnr")
    wish = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    policy: Any = policy_from_text(arguments.policy)
    return Resolver(policy, cache_of(arguments), arguments.preset, wish=wish)
