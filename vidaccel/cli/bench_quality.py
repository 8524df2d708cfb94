"""The commands that compare methods: vidaccel bench quality | parity."""

import argparse
import sys
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
from vidaccel.errors import MetricUnavailable, ModelError, UnsupportedPipelineError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies

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


def add_quality(benches: Any, add_model_options: Any) -> None:
    """Add the parser of `bench quality`."""
    parser = benches.add_parser(
        "quality",
        help="methods side by side: quality against speed, with figure and table",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--methods", metavar="A,B,...", help="see --list; all if left out")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    parser.add_argument(
        "--every-point", action="store_true", help="a row for every setting, not for equal times"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one per line")
    parser.add_argument("--policy", help="policy file, folder or hub id; a shipped one that fits")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="prompts that MagCache is calibrated on"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--size", type=size, metavar="WxH", help="of a frame, in pixels")
    parser.add_argument("--frames", type=at_least(1), help="number of frames")
    parser.add_argument("--steps", type=at_least(2), default=50, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads of torch")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="what speedups are taken from"
    )
    parser.add_argument("--workdir", type=Path, help="keeps what is measured; go on from there")
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    parser.add_argument("--plot", type=Path, help="draw the curves: .png, .svg or .pdf")
    add_model_options(parser)
    parser.set_defaults(run=_quality)


def add_parity(benches: Any, add_model_options: Any) -> None:
    """Add the parser of `bench parity`."""
    parser = benches.add_parser(
        "parity",
        help="DBCache beside cache-dit's with equal settings: steps reused and results",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="folder or hub id; the embedded model if left out")
    parser.add_argument("--prompt", default=EMBEDDED_PROMPTS[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--size", type=size, metavar="WxH", default="32x32", help="of a frame")
    parser.add_argument("--frames", type=at_least(1), default=9, help="number of frames")
    parser.add_argument("--steps", type=at_least(8), default=30, help="denoising steps")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads of torch")
    parser.add_argument("--json", type=Path, help="write the numbers there, or - for the screen")
    add_model_options(parser)
    parser.set_defaults(run=_parity)


def _parity(arguments: argparse.Namespace) -> None:
    check_writable(arguments.json)
    from vidaccel.bench.parity import parity, parity_table
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g

    pipe = _pipeline(arguments)
    width, height = arguments.size
    call = dict(embedded.EMBEDDED_CALL) if arguments.model is None else {}
    call |= {"prompt": arguments.prompt, "height": height, "width": width}
    call |= {"num_frames": arguments.frames, "num_inference_steps": arguments.steps}
    result = parity(pipe, g.call_arguments(pipe, call), seed=arguments.seed)
    result["settings"] |= {"model": arguments.model or "tiny-wan"}
    print_result(parity_table(result), arguments.json)
    write_json(result, arguments.json)


def _pipeline(arguments: argparse.Namespace) -> Any:
    import torch

    from vidaccel.clips.generate import load_pipeline

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load_pipeline(
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        offload=arguments.offload,
    )


def _quality(arguments: argparse.Namespace) -> None:
    from vidaccel.bench.methods import METHODS, MethodContext, check_names, variants

    if arguments.list:
        print("\n".join(METHODS))
        return
    check_writable(arguments.json, arguments.plot)
    if arguments.prompts is None and arguments.model is not None:
        raise ModelError("prompts are needed: vidaccel bench quality --model ... --prompts FILE")

    names = None if arguments.methods is None else arguments.methods.split(",")
    check_names(names or ())
    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(EMBEDDED_PROMPTS)
    policy = CachePolicy.from_pretrained(arguments.policy) if arguments.policy else None
    if policy is None and arguments.model is None:
        policy = CachePolicy.load(shipped_policies()[EMBEDDED_POLICY])
    if arguments.calibration:
        calibration = read_prompts(arguments.calibration)
    else:
        calibration = list(policy.prompts[:2]) if policy is not None else []

    from vidaccel.bench import curves
    from vidaccel.bench.quality import quality
    from vidaccel.clips import embedded
    from vidaccel.clips import generate as g
    from vidaccel.clips.metrics import load_lpips

    pipe = _pipeline(arguments)
    width, height = arguments.size or (None, None)
    wanted = {"height": height, "width": width, "num_frames": arguments.frames}
    wanted |= {"guidance_scale": arguments.guidance, "num_inference_steps": arguments.steps}
    call = dict(embedded.EMBEDDED_CALL) if arguments.model is None else {}
    call |= {name: value for name, value in wanted.items() if value is not None}
    call = g.call_arguments(pipe, call)
    steps = g.steps_of(pipe, call)
    ratios = None
    if calibration and (names is None or "MagCache" in names):
        ratios = _ratios(pipe, call, calibration, arguments.seed)
    contenders, left_out = variants(names, MethodContext(steps, policy, ratios))
    lpips = None
    try:
        lpips = load_lpips()
    except MetricUnavailable as error:
        left_out["lpips"] = str(error)
    result = quality(
        pipe,
        call,
        prompts,
        contenders,
        seed=arguments.seed,
        clock=arguments.clock,
        workdir=arguments.workdir,
        lpips=lpips,
    )
    result["settings"] |= {
        "model": arguments.model or "tiny-wan",
        "policy": arguments.policy or (EMBEDDED_POLICY if policy is not None else None),
        "mag_ratios": ratios,
    }
    result |= {"left_out": left_out, "equal_time": curves.equal_time(result["points"])}
    shown = curves.points_table if arguments.every_point else curves.report
    print_result(shown(result), arguments.json)
    write_json(result, arguments.json)
    if arguments.plot is not None:
        curves.figure(result, arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)


def _ratios(
    pipe: Any, call: dict[str, Any], prompts: list[str], seed: int
) -> tuple[float, ...] | None:
    """What MagCache needs; None where it does not work, which its row then says."""
    import torch

    from vidaccel.bench.baselines import magnitude_ratios

    calls = [
        {**call, "prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed)}
        for prompt in prompts
    ]
    try:
        return tuple(magnitude_ratios(pipe, calls))
    except UnsupportedPipelineError:
        return None
