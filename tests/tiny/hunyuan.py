"""HunyuanVideo in all its forms."""

from dataclasses import replace
from typing import Any

import diffusers
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tiny.base import LAYERS, Case, built, case, embeds, generator, image


def hunyuan_vae() -> Any:
    return built(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def _siglip(width: int, size: int) -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return {
        "image_encoder": built(SiglipVisionModel, config=config),
        "feature_extractor": SiglipImageProcessor(size={"height": size, "width": size}),
    }


_TRUE_GUIDANCE = {
    "true_cfg_scale": 3.0,
    "negative_pooled_prompt_embeds": torch.randn(1, 8, generator=generator(4)),
    "negative_prompt_attention_mask": torch.ones(1, 16, dtype=torch.long),
}


def _hunyuan(
    call: dict[str, Any],
    cls: str = "HunyuanVideoPipeline",
    transformer: str = "HunyuanVideoTransformer3DModel",
    components: dict[str, Any] | None = None,
    **config: Any,
) -> Case:
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 32,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    common = {
        "num_frames": 9,
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator(3)),
        "prompt_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    parts = {"vae": hunyuan_vae(), "text_encoder_2": None, "tokenizer_2": None}
    drop = () if "true_cfg_scale" in call else ("negative_prompt_embeds",)
    return case(
        cls,
        built(transformer, **(defaults | config)),
        common | call,
        drop,
        **(parts | (components or {})),
    )


def hunyuan() -> Case:
    """Two block lists, two streams, guidance embedded: one call per step."""
    return _hunyuan({})


def hunyuan_true_cfg() -> Case:
    return _hunyuan(_TRUE_GUIDANCE)


def hunyuan_i2v() -> Case:
    """Names no guidance branches."""
    return _hunyuan(
        {"image": image()} | _TRUE_GUIDANCE,
        "HunyuanVideoImageToVideoPipeline",
        components={"image_processor": None},
        in_channels=9,
        guidance_embeds=False,
        image_condition_type="latent_concat",
    )


def hunyuan_i2v_token_replace() -> Case:
    """The first frame is clean and modulated with time 0; blocks of another class."""
    return _hunyuan(
        {"image": image()},
        "HunyuanVideoImageToVideoPipeline",
        components={"image_processor": None},
        image_condition_type="token_replace",
    )


def skyreels_v1() -> Case:
    return _hunyuan(
        {"image": image()} | _TRUE_GUIDANCE,
        "HunyuanSkyreelsImageToVideoPipeline",
        in_channels=8,
        guidance_embeds=False,
    )


def framepack() -> Case:
    """Two sections, each a generation of its own, with the history before the current frames."""
    return _hunyuan(
        {"image": image(32), "height": 32, "width": 32, "latent_window_size": 2},
        "HunyuanVideoFramepackPipeline",
        "HunyuanVideoFramepackTransformer3DModel",
        _siglip(8, 16),
        patch_size=2,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )


def _hunyuan15(cls: str, call: dict[str, Any], task: str, **components: Any) -> Case:
    transformer = built(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=LAYERS,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task,
    )
    vae = built(
        "AutoencoderKLHunyuanVideo15",
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    common: dict[str, Any] = {"num_frames": 9}
    for seed, prefix in enumerate(("", "negative_")):
        common[f"{prefix}prompt_embeds"] = embeds(seed)
        common[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 16)
        common[f"{prefix}prompt_embeds_2"] = embeds(seed + 5)
        common[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 16)
    parts = {
        "vae": vae,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }
    return case(cls, transformer, common | call, **(parts | components))


def hunyuan15() -> Case:
    """Guidance through a guider component, no step callback."""
    found = _hunyuan15("HunyuanVideo15Pipeline", {}, "t2v", drop=("guidance_scale",))
    found.pipe.vision_num_semantic_tokens = 16  # of 729, which take most of the time
    return found


def hunyuan15_i2v() -> Case:
    parts = {"drop": ("guidance_scale", "height", "width")} | _siglip(8, 16)
    found = _hunyuan15("HunyuanVideo15ImageToVideoPipeline", {"image": image()}, "i2v", **parts)
    return replace(found, other={"num_frames": 5, "num_inference_steps": 4})


CASES = (
    hunyuan,
    hunyuan_true_cfg,
    hunyuan_i2v,
    hunyuan_i2v_token_replace,
    skyreels_v1,
    framepack,
    hunyuan15,
    hunyuan15_i2v,
)
