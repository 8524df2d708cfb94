"""What whole models gain, at the size they are used at and without their weights.

How long a step takes does not depend on what the weights are, so random ones tell the seconds of a
model that nobody has to download. They tell nothing of quality. Where the weights would decide what
is skipped, that is given instead: plans and block caches compute every third step, and the density
of sparse attention is measured and stands beside its seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vidaccel.api import accelerate, restore
from vidaccel.clips.generate import Run, generate
from vidaccel.dbcache import DBCache
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.plans.plan import Plan
from vidaccel.svg2.settings import SVG2


@dataclass(frozen=True)
class RealModel:
    """A Wan model and the clip it makes.

    Attributes:
        width, height, frames: of the clip.
        transformer: what its transformer has other than that of Wan 2.1 14B.
        vae: what its VAE has other than that of Wan 2.1.
        text_tokens: of a prompt.
        steps: that it is used with.
    """

    width: int
    height: int
    frames: int = 81
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 512
    steps: int = 50


MODELS = {
    "Wan2.1-T2V-1.3B 480p": RealModel(
        832, 480, transformer={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    ),
    "Wan2.1-T2V-14B 720p": RealModel(1280, 720),
}

# Every third step is computed, whatever the weights make of it.
_EVERY = 3
_CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=_EVERY - 1)


def speed(
    model: RealModel,
    *,
    steps: int | None = None,
    rounds: int = 1,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attention: SVG2 | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Time a plain pipeline and each combination of what skips work, in one run.

    Args:
        model: one of MODELS, or another.
        steps: fewer than the model is used with, to be done sooner. The seconds at its own number
            are then an extrapolation, and named so.
        rounds: every method is timed so often, in turn; medians are reported.
        device, dtype: of the weights.
        attention: settings of sparse attention; its defaults if left out.
        report: takes a line of progress.

    Returns:
        "settings", "methods" (name -> "steps_computed", "density" of the sparse calls or None,
        "seconds" of the whole call, "denoising_seconds", "speedup" of the whole call, "peak_bytes"
        of GPU memory or None, and with fewer steps "extrapolated_seconds" and
        "extrapolated_speedup") and "environment".

    Raises:
        BenchError: there is no GPU, or fewer than 6 steps are asked for.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BenchError(
            "bench models runs models of their real size on a CUDA GPU, and there is none here"
        )
    total = model.steps if steps is None else steps
    if total < 2 * _EVERY:
        raise BenchError(f"steps: found {total}, expected {2 * _EVERY} or more")
    sparse = attention or SVG2()
    pipe = _pipeline(model, device, dtype)
    call = _call(model, pipe, dtype) | {"num_inference_steps": total}
    # A few steps compile what has to be, and are not counted.
    for options in _methods(2 * _EVERY, sparse).values():
        _timed(pipe, call | {"num_inference_steps": 2 * _EVERY}, options)
    methods = _methods(total, sparse)
    runs: dict[str, list[tuple[Run, int | None]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, options in methods.items():
            runs[name].append(_timed(pipe, call, options))
            report(f"{name}: {runs[name][-1][0].seconds:.1f} s")
    found = {name: _row(runs[name], total) for name in methods}
    for row in found.values():
        row["speedup"] = found["plain"]["seconds"] / row["seconds"]
    if total < model.steps:
        for row in found.values():
            row["extrapolated_seconds"] = row["seconds"] + row["denoising_seconds"] * (
                model.steps / total - 1
            )
        for row in found.values():
            of_plain = found["plain"]["extrapolated_seconds"]
            row["extrapolated_speedup"] = of_plain / row["extrapolated_seconds"]
    return {
        "settings": {
            **asdict(model),
            "steps_measured": total,
            "rounds": rounds,
            "dtype": str(dtype),
            "device": device,
            "attention": str(sparse),
            "weights": "random",
            "every": _EVERY,
        },
        "methods": found,
        "environment": environment(),
    }


def speed_table(result: Mapping[str, Any]) -> str:
    """The result of `speed` for people."""
    settings = result["settings"]
    lines = [f"{'method':16s}  computed  density  seconds  speedup  peak GiB"]
    for name, row in result["methods"].items():
        density = "dense" if row["density"] is None else f"{row['density']:.0%}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        lines.append(
            f"{name:16s}  {row['steps_computed']:8d}  {density:>7s}  {row['seconds']:7.1f}  "
            f"{row['speedup']:6.2f}x  {peak:>8s}"
        )
    if settings["steps_measured"] < settings["steps"]:
        lines += [
            "",
            f"extrapolated from {settings['steps_measured']} to {settings['steps']} steps",
        ]
        lines += [
            f"{name:16s}  {row['extrapolated_seconds']:7.1f} s  {row['extrapolated_speedup']:6.2f}x"
            for name, row in result["methods"].items()
        ]
    return "\n".join([*lines, "", "weights are random: seconds, not quality"])


def _methods(steps: int, sparse: SVG2) -> dict[str, dict[str, Any] | None]:
    """Name -> arguments of `accelerate`, or None for the plain pipeline."""
    plan = Plan.every(_EVERY, steps)
    return {
        "plain": None,
        "plan": {"policy": plan, "cache": None, "attention": None},
        "DBCache F1B0": {"policy": None, "cache": _CACHE, "attention": None},
        "SVG2": {"policy": None, "cache": None, "attention": sparse},
        "plan + DBCache": {"policy": plan, "cache": _CACHE, "attention": None},
        "plan + SVG2": {"policy": plan, "cache": None, "attention": sparse},
        "DBCache + SVG2": {"policy": None, "cache": _CACHE, "attention": sparse},
        "all three": {"policy": plan, "cache": _CACHE, "attention": sparse},
    }


def _timed(
    pipe: Any, call: dict[str, Any], options: dict[str, Any] | None
) -> tuple[Run, int | None]:
    """One generation, and the most GPU memory that it took."""
    restore(pipe)
    if options is not None:
        accelerate(pipe, **options)
    on_gpu = pipe.transformer.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    run = generate(pipe, call, progress=False)
    restore(pipe)
    return run, torch.cuda.max_memory_allocated() if on_gpu else None


def _row(runs: Sequence[tuple[Run, int | None]], steps: int) -> dict[str, Any]:
    first = runs[0][0].report
    part = None if first is None else first["transformers"][0]
    attention = None if part is None else part["attention"]
    return {
        "steps_computed": steps if part is None else part["timeline"].count("C"),
        "density": None if attention is None else attention["density"],
        "seconds": statistics.median(run.seconds for run, _ in runs),
        "denoising_seconds": statistics.median(run.denoising_seconds or 0.0 for run, _ in runs),
        "peak_bytes": max((peak for _, peak in runs if peak is not None), default=None),
    }


def _pipeline(model: RealModel, device: str, dtype: torch.dtype) -> Any:
    """The pipeline with random weights, made where they are used, and no text encoder."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    with _made_on(device, dtype):
        transformer = WanTransformer3DModel(**model.transformer).eval()
    with _made_on(device, torch.float32):
        vae = AutoencoderKLWan(**model.vae).eval()
    # As loading does with the modules that the class wants in full precision.
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in WanTransformer3DModel._keep_in_fp32_modules:
            module.float()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
    return WanPipeline(transformer=transformer, **parts)


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _call(model: RealModel, pipe: Any, dtype: torch.dtype) -> dict[str, Any]:
    width = pipe.transformer.config.text_dim
    device = pipe.transformer.device
    texts = torch.randn(2, 1, model.text_tokens, width, generator=torch.Generator().manual_seed(0))
    positive, negative = texts.to(device, dtype)
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "width": model.width,
        "height": model.height,
        "num_frames": model.frames,
        "guidance_scale": 5.0,
    }
