"""Measure assets/tiny-wan and write the numbers that its model card quotes.

    python assets/training/evaluate.py --parts vae adherence caching

Parts: `vae` (reconstruction of held-out clips), `adherence` (do generated videos follow held-out
captions) and `caching` (PSNR of block-stack reuse to the fully computed video, by schedule). Each
part replaces its own entry of the result file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from parts import HELD_OUT_SCENES, SIZES, render, render_batch

import vidaccel
from vidaccel.clips import scenes
from vidaccel.clips.metrics import psnr
from vidaccel.environment import environment

STEPS, GUIDANCE, SEED = 50, 5.0, 7
COMPUTED = 17
VAE_CLIPS = 16
Video = np.ndarray  # float [frames, height, width, 3] in 0..1


def main() -> None:
    here = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=here / "tiny-wan")
    parser.add_argument("--output", type=Path, default=here / "results" / "tiny-wan.json")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--captions", type=int, default=64, help="held-out captions to generate")
    parser.add_argument("--prompts", type=int, default=6, help="of the caching comparison")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = WanPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        for size in args.sizes:
            started = time.perf_counter()
            entry = PARTS[part](pipe, size, args)
            entry["seconds"] = round(time.perf_counter() - started, 1)
            print(part, size, json.dumps(entry))
            # Read again: sizes may be measured by processes beside each other.
            result = json.loads(args.output.read_text()) if args.output.exists() else {}
            result["environment"] = environment()
            result.setdefault(part, {})[size] = entry
            args.output.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


def measure_vae(pipe: WanPipeline, size: str, _args: argparse.Namespace) -> dict[str, Any]:
    """Mean and worst PSNR of held-out clips, without sampling noise."""
    values = []
    for i in range(VAE_CLIPS):
        clip = render_batch(HELD_OUT_SCENES, (SEED, i), size, 1)
        with torch.no_grad():
            output = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
        values.append(psnr(frames(clip), frames(output)))
    return {
        "clips": VAE_CLIPS,
        "psnr_mean": digits(np.mean(values)),
        "psnr_min": digits(min(values)),
    }


def measure_adherence(pipe: WanPipeline, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Share of generated and of rendered clips that follow their caption."""
    picked = held_out(args.captions)
    rng = np.random.default_rng(SEED)
    rendered = [render(scene, rng, size) for scene in picked]
    generated = [generate(pipe, s, size, seed=i) for i, s in enumerate(picked)]
    return {
        "captions": len(picked),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "generated": shares(generated, picked),
        "rendered": shares(rendered, picked),
    }


def measure_caching(pipe: WanPipeline, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Mean PSNR to the full video, for schedules that compute the same number of steps."""
    picked = held_out(args.prompts)
    full = [generate(pipe, s, size, seed=i) for i, s in enumerate(picked)]
    result: dict[str, Any] = {"prompts": len(picked), "steps": STEPS, "computed": COMPUTED}
    for name, computed in schedules(STEPS, COMPUTED).items():
        vidaccel.accelerate(pipe, policy=computed)
        cached = [generate(pipe, s, size, seed=i) for i, s in enumerate(picked)]
        vidaccel.restore(pipe)
        result[name] = digits(np.mean([psnr(a, b) for a, b in zip(full, cached, strict=True)]))
    fewer = [generate(pipe, s, size, seed=i, steps=COMPUTED) for i, s in enumerate(picked)]
    result["fewer_steps"] = digits(np.mean([psnr(a, b) for a, b in zip(full, fewer, strict=True)]))
    return result


PARTS: dict[str, Callable[[WanPipeline, str, argparse.Namespace], dict[str, Any]]] = {
    "vae": measure_vae,
    "adherence": measure_adherence,
    "caching": measure_caching,
}


def schedules(steps: int, computed: int) -> dict[str, list[int]]:
    """Which steps to compute: evenly spaced, or denser at one end (quadratic spacing)."""
    position = np.linspace(0, 1, computed)
    spacing = {"even": position, "dense_early": position**2, "dense_late": 1 - (1 - position) ** 2}
    return {name: distinct((steps - 1) * x) for name, x in spacing.items()}


def distinct(positions: np.ndarray) -> list[int]:
    """Round increasing positions, whose last is the last step, to distinct steps."""
    steps = np.round(positions).astype(int)
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    latest = steps[-1].clip(max=round(positions[-1])) - np.arange(len(steps))[::-1]
    return np.minimum(steps, latest).tolist()


def held_out(count: int) -> list[scenes.Scene]:
    order = np.random.default_rng(SEED).permutation(len(HELD_OUT_SCENES))
    return [HELD_OUT_SCENES[i] for i in order[:count]]


def generate(
    pipe: WanPipeline, scene: scenes.Scene, size: str, *, seed: int, steps: int = STEPS
) -> Video:
    frames, height, width = SIZES[size]
    return pipe(
        scene.caption,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def shares(videos: list[Video], picked: list[scenes.Scene]) -> dict[str, float]:
    """Percent of videos that follow each part of their caption."""
    checks = [
        asdict(scenes.adherence(np.clip(v, 0, 1), s.caption))
        for v, s in zip(videos, picked, strict=True)
    ]
    return {part: digits(100 * np.mean([c[part] for c in checks])) for part in checks[0]}


def frames(clip: torch.Tensor) -> Video:
    """[1, 3, F, H, W] in -1..1 -> [F, H, W, 3] in 0..1"""
    return (clip[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5).clip(0, 1)


def digits(value: float) -> float:
    return round(float(value), 2)


if __name__ == "__main__":
    main()
