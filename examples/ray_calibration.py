"""Measure a policy on several workers, each with a pipeline of its own: GPUs or machines.

    python examples/ray_calibration.py --workers 4
    python examples/ray_calibration.py --workers 16 --ray-address auto      # a running cluster

A worker that dies is replaced: what it was measuring is measured elsewhere, and what was measured
stays in the work folder, from which the same command goes on.
"""

import argparse

from diffusers import WanPipeline

import vidaccel
from vidaccel.clips.embedded import embedded_model
from vidaccel.clips.load import default_device

PROMPTS = [
    "a red striped circle moving right on a navy dotted background",
    "a cyan dotted square moving up on a maroon striped background",
    "a yellow checkered triangle moving left on a teal striped background",
]


def load() -> WanPipeline:
    """The pipeline of one worker; Ray shows it one GPU, where there are any."""
    pipe = WanPipeline.from_pretrained(embedded_model()).to(default_device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--ray-address")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--frames", type=int, default=9)
parser.add_argument("--workdir", default="build/ray-policy")
parser.add_argument("--out", default="policy.json")
arguments = parser.parse_args()

policy = vidaccel.build_policy(
    load(),
    PROMPTS,
    num_inference_steps=arguments.steps,
    method="gain",
    max_skip=4,
    call_kwargs={
        "height": arguments.size,
        "width": arguments.size,
        "num_frames": arguments.frames,
    },
    workdir=arguments.workdir,
    workers=arguments.workers,
    ray_address=arguments.ray_address,
    load=load,
)
policy.save(arguments.out)
print(policy.table())
