"""Image models that are built like the video models."""

from typing import Any

import diffusers
import torch

from tiny.base import LAYERS, Case, built, case, embeds, generator


def image_vae(channels: int, cls: str = "AutoencoderKL", **config: Any) -> Any:
    """A decoder to pictures with that many channels of latents."""
    defaults = {"block_out_channels": (4,), "latent_channels": channels, "norm_num_groups": 1}
    return built(cls, **(defaults | config))


def shifted_vae(channels: int) -> Any:
    """One whose latents are shifted, as that of FLUX.1 has them."""
    parts = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06}
    return image_vae(channels, **parts)


def flux2_vae() -> Any:
    """That of FLUX.2, with one channel of latents."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return image_vae(1, "AutoencoderKLFlux2", **blocks)


def qwen_vae() -> Any:
    """That of Qwen-Image, with four channels of latents."""
    return built(
        "AutoencoderKLQwenImage",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def pooled(width: int) -> dict[str, torch.Tensor]:
    """Embeddings of whole prompts, [1, width]."""
    return {
        f"{prefix}pooled_prompt_embeds": torch.randn(1, width, generator=generator(seed))
        for seed, prefix in enumerate(("", "negative_"))
    }


def rotary(**config: Any) -> dict[str, Any]:
    """The config of a transformer that is configured as that of FLUX.1 is."""
    return {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    } | config


def flux() -> Case:
    """Blocks that return the text first; the time in thousandths."""
    transformer = built("FluxTransformer2DModel", **rotary(pooled_projection_dim=8))
    call = pooled(8) | {"true_cfg_scale": 3.0}
    vae = shifted_vae(1)
    parts = {"vae": vae, "text_encoder_2": None, "tokenizer_2": None}
    return case("FluxPipeline", transformer, call, **parts)


def flux2() -> Case:
    """Single blocks on text and picture joined."""
    transformer = built(
        "Flux2Transformer2DModel",
        **rotary(axes_dims_rope=[4, 4, 4, 4], timestep_guidance_channels=32),
    )
    drop = ("negative_prompt_embeds",)
    return case("Flux2Pipeline", transformer, {}, drop, vae=flux2_vae())


def chroma() -> Case:
    transformer = built(
        "ChromaTransformer2DModel",
        **rotary(approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16),
    )
    call = {
        f"{prefix}prompt_attention_mask": torch.ones(1, 16, dtype=torch.bool)
        for prefix in ("", "negative_")
    }
    vae = shifted_vae(1)
    return case("ChromaPipeline", transformer, call, vae=vae)


def sd3() -> Case:
    """Without a cache context; the last block returns no text."""
    transformer = built(
        "SD3Transformer2DModel",
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=LAYERS,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
    )
    vae = shifted_vae(4)
    names = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts = dict.fromkeys(names) | {"vae": vae}
    return case("StableDiffusion3Pipeline", transformer, pooled(8), **parts)


def qwen_image(**config: Any) -> Case:
    transformer = built(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
        **config,
    )
    call = {
        f"{prefix}prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long)
        for prefix in ("", "negative_")
    }
    call |= {"true_cfg_scale": 3.0}
    return case("QwenImagePipeline", transformer, call, ("guidance_scale",), vae=qwen_vae())


def hunyuan_image() -> Case:
    transformer = built(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    vae = built(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=32,
        spatial_compression_ratio=2,
        downsample_match_channel=True,
        upsample_match_channel=True,
    )
    call: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 16)
        call[f"{prefix}prompt_embeds_2"] = embeds(seed + 5)
        call[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 16)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    parts = {"vae": vae, "text_encoder_2": None, "tokenizer_2": None, "guider": guider}
    return case("HunyuanImagePipeline", transformer, call, ("guidance_scale",), **parts)


def cogview4() -> Case:
    transformer = built(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=LAYERS,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    return case("CogView4Pipeline", transformer, {}, vae=image_vae(4))


def z_image() -> Case:
    """Lists of latents and prompts, and a time that rises from 0 to 1."""
    transformer = built(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    call = {"prompt_embeds": [embeds(1)[0]], "negative_prompt_embeds": [embeds(2)[0]]}
    return case("ZImagePipeline", transformer, call, vae=image_vae(4, shift_factor=0.06))


CASES = (flux, flux2, chroma, sd3, qwen_image, hunyuan_image, cogview4, z_image)
