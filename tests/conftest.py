"""Tiny random pipelines that need no download, and how to run them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

torch.set_num_threads(1)

STEPS = 6
LAYERS = 3


@dataclass
class Case:
    """A tiny pipeline with the arguments of a call."""

    pipe: Any
    kwargs: dict[str, Any]

    def run(self, seed: int = 0, **overrides: Any) -> torch.Tensor:
        """The latents of one generation."""
        kwargs = {"output_type": "latent", **self.kwargs, **overrides}
        return self.pipe(generator=generator(seed), **kwargs).frames


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def embeds(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, 32, generator=generator(seed))


def _built(cls: type, seed: int = 0, **config: Any) -> Any:
    """A model with random weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return cls(**config).eval()


def _wan_transformer(cls: type = WanTransformer3DModel, seed: int = 0, **config: Any) -> Any:
    defaults = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": LAYERS,
        "rope_max_seq_len": 32,
    }
    return _built(cls, seed, **(defaults | config))


def _wan_vae() -> AutoencoderKLWan:
    return _built(
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _case(cls: type, transformer: Any, call: dict[str, Any], **components: Any) -> Case:
    parts = {"tokenizer": None, "text_encoder": None, "transformer": transformer}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=7.0)
    if "vae" not in components:
        components["vae"] = _wan_vae()
    pipe = cls(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {
        "prompt_embeds": embeds(1),
        "negative_prompt_embeds": embeds(2),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
    }
    if cls is not HunyuanVideo15Pipeline:  # it has a guider instead
        kwargs["guidance_scale"] = 5.0
    return Case(pipe, kwargs | call)


def wan() -> Case:
    return _case(WanPipeline, _wan_transformer(), {"num_frames": 9})


def wan_unipc() -> Case:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=3.0, use_flow_sigmas=True
    )
    return _case(WanPipeline, _wan_transformer(), {"num_frames": 9}, scheduler=scheduler)


def wan_expand_timesteps() -> Case:
    """Wan 2.2 5B: a timestep per token."""
    return _case(WanPipeline, _wan_transformer(), {"num_frames": 9}, expand_timesteps=True)


def wan22() -> Case:
    """Two transformers: the first for high noise, the second for low noise."""
    return _case(
        WanPipeline,
        _wan_transformer(),
        {"num_frames": 9},
        transformer_2=_wan_transformer(seed=1),
        boundary_ratio=0.875,
    )


def wan_i2v() -> Case:
    image = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    return _case(
        WanImageToVideoPipeline,
        _wan_transformer(in_channels=36),
        {"num_frames": 9, "image": image},
        image_encoder=None,
        image_processor=None,
    )


def wan_v2v() -> Case:
    """Names no guidance branches and starts inside the schedule."""
    rng = np.random.default_rng(0)
    video = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(9)]
    return _case(WanVideoToVideoPipeline, _wan_transformer(), {"video": video, "strength": 0.7})


def wan_vace() -> Case:
    """Adds hints between the blocks, also after the last one."""
    return _case(
        WanVACEPipeline,
        _wan_transformer(WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=96),
        {"num_frames": 9},
    )


def skyreels() -> Case:
    transformer = _built(
        SkyReelsV2Transformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=8.0, use_flow_sigmas=True
    )
    return _case(SkyReelsV2Pipeline, transformer, {"num_frames": 9}, scheduler=scheduler)


def _hunyuan(**call: Any) -> Case:
    transformer = _built(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = _built(
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    call |= {
        "num_frames": 9,
        "pooled_prompt_embeds": torch.randn(1, 8, generator=generator(3)),
        "prompt_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    case = _case(
        HunyuanVideoPipeline, transformer, call, vae=vae, text_encoder_2=None, tokenizer_2=None
    )
    if "true_cfg_scale" not in call:
        del case.kwargs["negative_prompt_embeds"]
    return case


def hunyuan() -> Case:
    """Two block lists, two streams, guidance embedded: one call per step."""
    return _hunyuan()


def hunyuan_true_cfg() -> Case:
    return _hunyuan(
        true_cfg_scale=3.0,
        negative_pooled_prompt_embeds=torch.randn(1, 8, generator=generator(4)),
        negative_prompt_attention_mask=torch.ones(1, 16, dtype=torch.long),
    )


def hunyuan15() -> Case:
    """Guidance through a guider component, no step callback."""
    transformer = _built(
        HunyuanVideo15Transformer3DModel,
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
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = _built(
        AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    call: dict[str, Any] = {"num_frames": 9}
    for seed, prefix in enumerate(("", "negative_")):
        call[f"{prefix}prompt_embeds"] = embeds(seed)
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 16)
        call[f"{prefix}prompt_embeds_2"] = embeds(seed + 5)
        call[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 16)
    return _case(
        HunyuanVideo15Pipeline,
        transformer,
        call,
        vae=vae,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )


def _cogvideox(**config: Any) -> Case:
    transformer = _built(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=LAYERS,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        **config,
    )
    vae = _built(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = CogVideoXDDIMScheduler()
    return _case(CogVideoXPipeline, transformer, {"num_frames": 8}, vae=vae, scheduler=scheduler)


def cogvideox() -> Case:
    """Guidance in one batched call, a scheduler that does not count its steps."""
    return _cogvideox()


def cogvideox_rotary() -> Case:
    return _cogvideox(use_rotary_positional_embeddings=True)


def ltx() -> Case:
    """Packed latents [B, S, C]."""
    transformer = _built(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=LAYERS,
        caption_channels=32,
    )
    vae = _built(
        AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    call = {"num_frames": 9, "height": 32, "width": 32}
    return _case(LTXPipeline, transformer, call | _masks(), vae=vae)


def mochi() -> Case:
    """Timesteps that rise."""
    transformer = _built(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=LAYERS,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    torch.nn.init.zeros_(transformer.pos_frequencies)
    vae = _built(
        AutoencoderKLMochi,
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    call = {"num_frames": 7} | _masks()
    return _case(MochiPipeline, transformer, call, vae=vae, scheduler=scheduler)


def _masks() -> dict[str, torch.Tensor]:
    mask = torch.ones(1, 16, dtype=torch.bool)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


CASES: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (
        wan,
        wan_unipc,
        wan_expand_timesteps,
        wan22,
        wan_i2v,
        wan_v2v,
        wan_vace,
        skyreels,
        hunyuan,
        hunyuan_true_cfg,
        hunyuan15,
        cogvideox,
        cogvideox_rotary,
        ltx,
        mochi,
    )
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def transformers_of(pipe: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def count_blocks(pipe: Any) -> dict[str, int]:
    """Counts the calls of every real block with hooks of its own; the dict is live."""
    counts = {"blocks": 0}

    def count(module: Any, args: Any) -> None:
        counts["blocks"] += 1

    for transformer in transformers_of(pipe).values():
        for name, module in transformer.named_modules():
            if "blocks." in name and name.rsplit(".", 1)[1].isdigit() and name.count(".") == 1:
                module.register_forward_pre_hook(count)
    return counts
