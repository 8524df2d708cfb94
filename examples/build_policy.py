"""Measure which steps are worth computing, keep that in a file, and use it.

    python examples/build_policy.py

Runs the model that comes with vidaccel at a small size and few steps, so that it takes a minute or
two; `--steps 50 --size 96 --frames 17` measures what a policy for daily use needs.
"""

import argparse

from diffusers import WanPipeline

import vidaccel
from vidaccel.clips.embedded import embedded_model

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--frames", type=int, default=9)
parser.add_argument("--out", default="policy.json")
arguments = parser.parse_args()

PROMPTS = [
    "a red striped circle moving right on a navy dotted background",
    "a cyan dotted square moving up on a maroon striped background",
    "a yellow checkered triangle moving left on a teal striped background",
]

pipe = WanPipeline.from_pretrained(embedded_model())
pipe.set_progress_bar_config(disable=True)
size = {"height": arguments.size, "width": arguments.size, "num_frames": arguments.frames}

policy = vidaccel.build_policy(
    pipe,
    PROMPTS,
    num_inference_steps=arguments.steps,
    method="gain",
    max_skip=4,
    call_kwargs=size,
)
policy.save(arguments.out)
print(policy.table())

# The file is held against every run: another model, step count or scheduler is refused.
vidaccel.accelerate(pipe, policy=arguments.out, preset="balanced")
pipe(PROMPTS[0], num_inference_steps=arguments.steps, **size)
print(vidaccel.report(pipe))
