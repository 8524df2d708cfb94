"""Image models with labels for prompts, text in cross-attention, or streams that skip blocks."""

import diffusers
import torch

from tiny.base import LAYERS, Case, built, case, embeds, masks
from tiny.images import image_vae, qwen_vae, rotary, shifted_vae
from tiny.new_images import alive


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


def lumina_next() -> Case:
    """Guidance on some of the channels, and text behind gates that start closed."""
    transformer = built(
        "LuminaNextDiT2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=LAYERS,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        cross_attention_dim=32,
    )
    call = masks() | {"height": 32, "width": 32}
    found = case("LuminaPipeline", alive(transformer), call, vae=image_vae(4))
    found.other = {"height": 32, "width": 64, "num_inference_steps": 4}
    return found


def hunyuan_dit() -> Case:
    """Blocks of the second half that take what those of the first have made as well."""
    transformer = built(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=8,
        text_len=16,
        text_len_t5=16,
    )
    call = masks() | {f"{name}_2": mask for name, mask in masks().items()}
    call |= {"prompt_embeds_2": embeds(3), "negative_prompt_embeds_2": embeds(4)}
    call |= {"use_resolution_binning": False, "height": 32, "width": 32}
    parts = {
        "vae": None,
        "scheduler": diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    found = case("HunyuanDiTPipeline", transformer, call, **parts)
    found.other = {"height": 32, "width": 64, "num_inference_steps": 4}
    return found


def dit() -> Case:
    """A class of things in the place of a prompt, one size, and pictures instead of latents."""
    transformer = built(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=LAYERS,
        sample_size=8,
    )
    drop = ("prompt_embeds", "negative_prompt_embeds", "height", "width")
    parts = {"vae": image_vae(4), "scheduler": diffusers.DDIMScheduler()}
    found = case("DiTPipeline", transformer, {"class_labels": [3]}, drop, **parts)
    found.other = {"num_inference_steps": 4}
    return found


CASES = (bria, nucleus_image, lumina_next, hunyuan_dit, dit)
