"""One prompt, accelerated: writes quickstart.mp4 and prints what was saved.

    python examples/quickstart.py

Runs the model that comes with vidaccel. For a model of your own, replace the first lines by
`pipe = WanPipeline.from_pretrained("org/name", dtype=torch.bfloat16).to("cuda")`.
"""

import torch
from diffusers import WanPipeline

import vidaccel
from vidaccel.clips.embedded import embedded_model
from vidaccel.clips.video import write_video

pipe = WanPipeline.from_pretrained(embedded_model())

pipe = vidaccel.accelerate(pipe)
clip = pipe(
    "a cyan dotted square moving up on a maroon striped background",
    height=96,
    width=96,
    num_frames=17,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]

write_video("quickstart.mp4", clip)
print(vidaccel.report(pipe))
