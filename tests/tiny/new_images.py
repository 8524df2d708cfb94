"""Image models that came after 2025, built like the video models."""

from typing import Any

import torch

from tiny.base import LAYERS, Case, built, case, embeds, generator
from tiny.images import flux2_vae, image_vae, qwen_vae, rotary, shifted_vae


def _text_masks(suffix: str, dtype: torch.dtype = torch.bool) -> dict[str, torch.Tensor]:
    """Masks of the prompts that leave nothing out, under the names that end in `suffix`."""
    mask = torch.ones(1, 16, dtype=dtype)
    return {f"{prefix}{suffix}": mask for prefix in ("prompt_", "negative_prompt_")}


def alive(model: Any) -> Any:
    """The model, in which no weight is all zero: some classes begin with blocks that do nothing."""
    for seed, parameter in enumerate(model.parameters()):
        if not parameter.any():
            parameter.data.normal_(std=0.02, generator=generator(seed))
    return model


def longcat_image() -> Case:
    """Takes embeddings from its text encoder alone."""
    transformer = built(
        "LongCatImageTransformer2DModel", **rotary(in_channels=64, pooled_projection_dim=32)
    )
    call = {"enable_prompt_rewrite": False, "prompt": "a", "negative_prompt": "bb"}
    drop = ("prompt_embeds", "negative_prompt_embeds")
    parts = {"vae": shifted_vae(1), "text_processor": None}
    found = case("LongCatImagePipeline", transformer, call, drop, **parts)
    found.pipe.encode_prompt = _encoded
    return found


def _encoded(prompt: list[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return embeds(len(prompt[0])), torch.zeros(16, 3)


def ovis_image() -> Case:
    transformer = built("OvisImageTransformer2DModel", **rotary(out_channels=4))
    call = {"negative_prompt": None}
    return case("OvisImagePipeline", transformer, call, vae=shifted_vae(1))


def lumina2() -> Case:
    """The text and the picture as one sequence, of which each sample has its own length."""
    transformer = built(
        "Lumina2Transformer2DModel",
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=LAYERS,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=32,
    )
    call = _text_masks("attention_mask")
    return case("Lumina2Pipeline", transformer, call, vae=shifted_vae(4))


def prx() -> Case:
    transformer = built(
        "PRXTransformer2DModel",
        in_channels=4,
        context_in_dim=32,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=LAYERS,
        axes_dim=[2, 2],
    )
    call = _text_masks("attention_mask") | {"use_resolution_binning": False}
    return case("PRXPipeline", alive(transformer), call, vae=shifted_vae(4))


def sana() -> Case:
    transformer = built(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=32,
        sample_size=8,
    )
    vae = built(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    call = _text_masks("attention_mask") | {"use_resolution_binning": False}
    call |= {"height": 32, "width": 32, "negative_prompt": None}
    return case("SanaPipeline", transformer, call, vae=vae)


def auraflow() -> Case:
    """Single blocks on text and picture joined."""
    transformer = built(
        "AuraFlowTransformer2DModel",
        sample_size=32,
        patch_size=2,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=1024,
    )
    call = _text_masks("attention_mask")
    return case("AuraFlowPipeline", transformer, call, vae=image_vae(4))


def krea2() -> Case:
    """Text and picture as one sequence; several layers of the text encoder."""
    transformer = built(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    call = _text_masks("embeds_mask") | {
        f"{prefix}prompt_embeds": torch.stack([embeds(seed), embeds(seed + 7)], 2)
        for seed, prefix in enumerate(("", "negative_"), 1)
    }
    parts = {"vae": qwen_vae(), "text_encoder_select_layers": (0, 1)}
    return case("Krea2Pipeline", transformer, call, **parts)


def ernie_image() -> Case:
    """Tokens before samples; the text without a batch."""
    transformer = built(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=LAYERS,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=32,
        rope_axes_dim=(8, 4, 4),
    )
    call = {
        "use_pe": False,
        "prompt_embeds": [embeds(1)[0]],
        "negative_prompt_embeds": [embeds(2)[0]],
    }
    return case("ErnieImagePipeline", alive(transformer), call, vae=flux2_vae())


CASES = (longcat_image, ovis_image, lumina2, prx, sana, auraflow, krea2, ernie_image)
