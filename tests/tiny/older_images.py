"""Image models with labels for prompts, text in cross-attention, or streams that skip blocks."""

import torch

from tiny.base import LAYERS, Case, built, case
from tiny.images import qwen_vae, rotary, shifted_vae


def bria() -> Case:
    transformer = built("BriaTransformer2DModel", **rotary())
    return case("BriaPipeline", transformer, {}, vae=shifted_vae(1))


def nucleus_image() -> Case:
    """Text in keys and values alone, and mixtures of experts after the first block."""
    transformer = built(
        "NucleusMoEImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
        mlp_ratio=6.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=1.0,
    )
    call = {
        f"{prefix}prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long)
        for prefix in ("", "negative_")
    }
    return case("NucleusMoEImagePipeline", transformer, call, vae=qwen_vae(), processor=None)


CASES = (bria, nucleus_image)
