"""Wan 2.2, whose two transformers share the steps: one plan runs over both.

    python examples/wan22.py "a cat surfing a wave"

The 14B model needs a GPU with 80 GB, or `--offload`; any Wan pipeline works with `--model`.
"""

import argparse

import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel.clips.video import write_video

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("prompt")
parser.add_argument("--model", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--size", default="832x480")
parser.add_argument("--frames", type=int, default=81)
parser.add_argument("--offload", action="store_true", help="keep idle parts in host memory")
parser.add_argument("--out", default="wan22.mp4")
arguments = parser.parse_args()
width, height = map(int, arguments.size.split("x"))

gpu = torch.cuda.is_available()
pipe = WanPipeline.from_pretrained(arguments.model).to(torch.bfloat16 if gpu else torch.float32)
if arguments.offload:
    pipe.enable_model_cpu_offload()
else:
    pipe.to("cuda" if gpu else "cpu")

# The step at which the second transformer takes over is computed in any case: it has nothing to
# reuse yet. What each of them did is a part of the report of its own.
vidaccel.accelerate(pipe, preset="quality")
clip = pipe(
    arguments.prompt,
    width=width,
    height=height,
    num_frames=arguments.frames,
    num_inference_steps=arguments.steps,
    generator=torch.Generator().manual_seed(0),
).frames[0]

write_video(arguments.out, clip)
print(vidaccel.report(pipe))
