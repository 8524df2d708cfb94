"""A modular pipeline: its blocks are taken apart, its guider is another, and steps are reused.

    python examples/modular.py "a red circle moving right"

Runs the model that comes with vidaccel; any folder or hub id of a Wan model works with `--model`.
"""

import argparse

import torch
from diffusers import LayerSkipConfig, ModularPipeline, SkipLayerGuidance

import vidaccel
from vidaccel.clips.embedded import embedded_model
from vidaccel.clips.video import write_video

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("prompt", nargs="?", default="a red circle moving right")
parser.add_argument("--model", default=embedded_model())
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--frames", type=int, default=9)
arguments = parser.parse_args()

pipe = ModularPipeline.from_pretrained(str(arguments.model))
pipe.load_components()
vidaccel.accelerate(pipe)

# Components may be replaced afterwards. This guider makes three calls in a step while it is on;
# each of its conditions is a branch of its own in the report.
pipe.update_components(
    guider=SkipLayerGuidance(
        guidance_scale=5.0,
        skip_layer_config=LayerSkipConfig([2]),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=0.5,
    )
)
# Modular Wan pipelines count on a VAE that halves the size per stage. This one, like that of
# Wan 2.2 5B, folds patches of pixels besides, so they are asked for as many pixels less.
size = arguments.size * pipe.vae_scale_factor_spatial // pipe.vae.config.scale_factor_spatial
clips = pipe(
    prompt=arguments.prompt,
    height=size,
    width=size,
    num_frames=arguments.frames,
    num_inference_steps=arguments.steps,
    generator=torch.Generator().manual_seed(0),
    output="videos",
)

write_video("modular.mp4", clips[0])
print(vidaccel.report(pipe))
