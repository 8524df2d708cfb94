"""MiniMax-H3 with two of its workflows: text to video with sound, and the same with references.

    python examples/minimax_h3.py

On random weights and without text encoder and decoders, so that it runs anywhere. The real model is
`ModularPipeline.from_pretrained("MiniMaxAI/MiniMax-H3")`, called with prompts and pictures.
"""

import torch
from diffusers import MiniMaxH3Blocks, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference
from PIL import Image

import vidaccel

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 8}
SMALL |= {"ffn_dim": 32, "text_dim": 32, "freq_dim": 32, "rope_freq_dim": 2}
SMALL |= {"time_embed_hidden_dim": 16, "time_embed_dim": 16}

torch.manual_seed(0)
blocks = MiniMaxH3Blocks()
for name in ("text_encoder", "vae_encoder", "decode"):
    del blocks.sub_blocks[name]
pipe = blocks.init_pipeline()
pipe.update_components(
    transformer=MiniMaxH3Transformer3DModel(**SMALL).eval(),
    scheduler=MiniMaxH3Scheduler(shift=12.0),
    audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    reference_image_short_edge=64,
)
# Every second step is computed, and both the picture and the sound go on in the others.
vidaccel.accelerate(pipe, policy="every 2")

call = {
    "prompt_embeds": torch.randn(1, 16, 32),
    "text_token_tags": torch.ones(16, dtype=torch.long),
    "height": 64,
    "width": 64,
    "num_frames": 124,
    # The end of the last step counts as one: these are 12 steps.
    "num_inference_steps": 13,
}
video, sound = pipe(**call, output=["latents", "audio_latents"]).values()
print("text to video:", tuple(video.shape), tuple(sound.shape))
print(vidaccel.report(pipe))

# References run another transformer. It is loaded now, and accelerated as the pipeline is.
pipe.update_components(transformer_ref=MiniMaxH3Transformer3DModel(**SMALL).eval())
reference = {
    "references": [MiniMaxH3ImageReference(Image.new("RGB", (64, 64)))],
    "condition_latents": [torch.randn(1, 24, 1, 4, 4)],
    "audio_condition_latents": [],
}
video = pipe(**call, **reference, output="latents")
print("references to video:", tuple(video.shape))
print(vidaccel.report(pipe))
