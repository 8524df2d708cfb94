"""Which of two settings is closer to the plain clip, and how fast is each?

    python examples/compare_settings.py

Makes one clip plain and with two settings, on the same noise, and draws all three.
"""

import argparse

import vidaccel
from vidaccel.clips import metrics, video
from vidaccel.clips.embedded import EMBEDDED_PROMPT
from vidaccel.clips.generate import generate
from vidaccel.clips.load import load_pipeline

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--frames", type=int, default=9)
parser.add_argument("--out", default="compare-settings.png")
arguments = parser.parse_args()

SETTINGS = {
    "every 3rd step": {"policy": "every 3"},
    "block cache": {"policy": None, "cache": vidaccel.DBCache(threshold=0.1)},
}

pipe = load_pipeline()
call = {
    "prompt": EMBEDDED_PROMPT,
    "height": arguments.size,
    "width": arguments.size,
    "num_frames": arguments.frames,
    "num_inference_steps": arguments.steps,
}
generate(pipe, {**call, "num_inference_steps": 2}, label="warm-up")
plain = generate(pipe, call, label="plain")
clips = {"plain": plain.frames}

for name, setting in SETTINGS.items():
    vidaccel.accelerate(pipe, **setting)
    run = generate(pipe, call, label=name)
    clips[name] = run.frames
    timeline = run.report["transformers"][0]["timeline"]
    speedup, psnr = plain.seconds / run.seconds, metrics.psnr(plain.frames, run.frames)
    print(f"{name:15} {speedup:.2f}x  {psnr:.1f} dB  {timeline}")
vidaccel.restore(pipe)

video.write_image(arguments.out, video.contact_sheet(clips))
