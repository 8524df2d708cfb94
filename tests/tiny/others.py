"""Mochi, Allegro, Latte, EasyAnimate, SANA, Kandinsky, Motif, Helios and AnyFlow."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import torch

from tiny.base import (
    LAYERS,
    STEPS,
    Case,
    built,
    case,
    embeds,
    generator,
    image,
    masks,
    video,
)
from tiny.hunyuan import hunyuan_vae
from tiny.wan import like_wan, wan_transformer, wan_vae


def mochi() -> Case:
    """Timesteps that rise."""
    transformer = built(
        "MochiTransformer3DModel",
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
    vae = built(
        "AutoencoderKLMochi",
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return case(
        "MochiPipeline", transformer, {"num_frames": 7} | masks(), vae=vae, scheduler=scheduler
    )


def allegro() -> Case:
    """Names no guidance branches; guidance in one batched call."""
    transformer = built(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=32,
    )
    vae = built(
        "AutoencoderKLAllegro",
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    call = {"num_frames": 8, "negative_prompt": None} | masks(torch.long)
    return case("AllegroPipeline", transformer, call, vae=vae, scheduler=diffusers.DDIMScheduler())


def latte() -> Case:
    """Spatial and temporal blocks in turn, between which the tokens are rearranged."""
    transformer = built(
        "LatteTransformer3DModel",
        sample_size=8,
        num_layers=LAYERS,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    vae = built("AutoencoderKL", block_out_channels=(8,), norm_num_groups=4)
    call = {"height": 8, "width": 8, "video_length": 4, "negative_prompt": None}
    parts = {"vae": vae, "scheduler": diffusers.DDIMScheduler()}
    return case("LattePipeline", transformer, call, **parts)


def _easyanimate(cls: str, call: dict[str, Any], in_channels: int) -> Case:
    transformer = built(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        num_layers=LAYERS,
        patch_size=2,
        mmdit_layers=LAYERS,
        norm_elementwise_affine=False,
        time_embed_dim=2,
        text_embed_dim=32,
    )
    vae = built(
        "AutoencoderKLMagvit",
        latent_channels=4,
        down_block_types=(
            "SpatialDownBlock3D",
            "SpatialTemporalDownBlock3D",
            "SpatialTemporalDownBlock3D",
            "SpatialTemporalDownBlock3D",
        ),
        up_block_types=(
            "SpatialUpBlock3D",
            "SpatialTemporalUpBlock3D",
            "SpatialTemporalUpBlock3D",
            "SpatialTemporalUpBlock3D",
        ),
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    common = {"num_frames": 5} | masks(torch.long)
    return case(cls, transformer, common | call, vae=vae, scheduler=scheduler)


def easyanimate() -> Case:
    return _easyanimate("EasyAnimatePipeline", {}, 4)


def _clip() -> torch.Tensor:
    """[B, C, F, H, W] in 0 to 1."""
    return torch.rand(1, 3, 5, 16, 16, generator=generator(6))


def easyanimate_inpaint() -> Case:
    mask = torch.zeros(1, 1, 5, 16, 16)
    mask[:, :, :, 8:] = 255
    call = {"video": _clip(), "mask_video": mask}
    found = _easyanimate("EasyAnimateInpaintPipeline", call, 9)
    found.pipe.vae.register_to_config(cache_mag_vae=False)  # asked for, but no option of the class
    return found


def _sana(cls: str, call: dict[str, Any], scheduler: Any) -> Case:
    transformer = built(
        "SanaVideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=LAYERS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    common = {"height": 32, "width": 32, "frames": 9, "use_resolution_binning": False}
    common |= {"complex_human_instruction": [], "negative_prompt": None} | masks(torch.long)
    parts = {"vae": wan_vae(), "scheduler": scheduler}
    return case(cls, transformer, common | call, **parts)


def sana_video() -> Case:
    """Linear attention."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    return _sana("SanaVideoPipeline", {}, scheduler)


def sana_i2v() -> Case:
    """A timestep per token: the first frame is clean."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return _sana("SanaImageToVideoPipeline", {"image": image(32)}, scheduler)


def _woken(transformer: torch.nn.Module, among: str = "") -> None:
    """Fill what starts as zeros, so that blocks and branches would do nothing."""
    for name, weight in transformer.named_parameters():
        if among in name and not weight.any():
            torch.nn.init.normal_(weight, std=0.1, generator=generator(7))


def sana_wm() -> Case:
    """Camera paths; recurrent attention, and softmax in every second block."""
    from tiny.ltx import ltx2_vae

    transformer = built(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        caption_channels=32,
        chunk_plucker_channels=48,
    )
    _woken(transformer)
    call = {
        "image": image(32),
        "prompt": "",
        "c2w": np.tile(np.eye(4, dtype=np.float32), (9, 1, 1)),
        "intrinsics": [30.0, 30.0, 16.0, 16.0],
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "prompt_embeds": embeds(1)[:, None],
        "negative_prompt_embeds": embeds(2)[:, None],
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {"vae": ltx2_vae(), "scheduler": scheduler}
    return case("SanaWMPipeline", transformer, call | masks(torch.long), **parts)


def _kandinsky5(cls: str, call: dict[str, Any], **config: Any) -> Case:
    transformer = built(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=8,
        time_dim=32,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=LAYERS,
        axes_dims=(8, 8, 8),
        **config,
    )
    _woken(transformer, "modulation")
    common: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}
    for seed, prefix in enumerate(("", "negative_")):
        common[f"{prefix}prompt_embeds_qwen"] = embeds(seed)
        common[f"{prefix}prompt_embeds_clip"] = torch.randn(1, 8, generator=generator(seed))
        common[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, 16], dtype=torch.int32)
    drop = ("prompt_embeds", "negative_prompt_embeds")
    parts = {"vae": hunyuan_vae(), "text_encoder_2": None, "tokenizer_2": None}
    return case(cls, transformer, common | call, drop, **parts)


def kandinsky5() -> Case:
    """Names no guidance branches; the head gets the tokens as a grid."""
    return _kandinsky5("Kandinsky5T2VPipeline", {}, visual_cond=False)


def kandinsky5_i2v() -> Case:
    return _kandinsky5(
        "Kandinsky5I2VPipeline", {"image": image(32), "num_frames": 21}, visual_cond=True
    )


def _kandinsky6(**call: Any) -> Case:
    transformer = built(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=8,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=12,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=LAYERS,
        axes_dims=(2, 1, 1),
        visual_cond=True,
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = built(
        "MMAudioVAE",
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = built(
        "MMAudioVocoder",
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    common: dict[str, Any] = {"num_frames": 5}
    for seed, prefix in enumerate(("", "negative_")):
        common[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, 8, generator=generator(seed))
    parts = {"vae": hunyuan_vae(), "text_encoder_2": None, "tokenizer_2": None}
    parts |= {"audio_vae": audio_vae, "vocoder": vocoder}
    return case("Kandinsky6TI2VAPipeline", transformer, common | call, **parts)


def kandinsky6() -> Case:
    """Blocks that work on picture and sound together."""
    return _kandinsky6()


def kandinsky6_silent() -> Case:
    return _kandinsky6(sample_audio=False)


def kandinsky6_sr() -> Case:
    """No text and no guidance; every tile of the clip is a generation of its own."""
    transformer = built(
        "Kandinsky6SRTransformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=24,
        ff_dim=24,
        num_visual_blocks=LAYERS,
        axes_dims=(4, 4, 4),
        nabla_window=(3, 3, 3),
        tile_sizes=((16, 16),),
    )
    vae = built(
        "Kandinsky6SRVAE",
        latent_channels=4,
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        layers_per_block=1,
        temporal_compression_start_level=0,
    )
    cls = diffusers.Kandinsky6SRPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = cls(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"video": video(5), "resolution_scale": 2, "min_overlap": 0.0, "output_type": "pt"}
    other = {"video": video(5, 8), "num_inference_steps": 4}
    return Case(pipe, call | {"num_inference_steps": STEPS}, other)


def _motif(cls: str, decoders: int, **call: Any) -> Case:
    transformer = built(
        diffusers.MotifVideoTransformer3DModel,
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=LAYERS,
        num_decoder_layers=decoders,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    common = {"num_frames": 9} | masks(torch.long)
    parts = {"vae": wan_vae(), "guider": guider, "feature_extractor": None}
    return case(cls, transformer, common | call, ("guidance_scale",), **parts)


def motif() -> Case:
    return _motif("MotifVideoPipeline", 0)


def motif_decoder() -> Case:
    """The last blocks start over from the patches and read what the others made of them."""
    return _motif("MotifVideoPipeline", 2)


def motif_i2v() -> Case:
    return _motif("MotifVideoImage2VideoPipeline", 0, image=image(), prompt=None)


def _helios_transformer() -> Any:
    return like_wan(
        "HeliosTransformer3DModel",
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )


def helios() -> Case:
    """Two chunks, each a generation of its own, with the history before the current frames."""
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    call = {"num_frames": 33, "num_latent_frames_per_chunk": 5}
    parts = {"vae": wan_vae(), "scheduler": scheduler}
    return case("HeliosPipeline", _helios_transformer(), call, **parts)


def helios_pyramid() -> Case:
    """Stages of rising resolution, each a generation of its own."""
    scheduler = diffusers.HeliosScheduler(
        stage_range=[0, 1 / 3, 2 / 3, 1], stages=3, gamma=0.3, use_dynamic_shifting=True
    )
    call = {
        "num_frames": 9,
        "num_latent_frames_per_chunk": 3,
        "height": 64,
        "width": 64,
        "pyramid_num_inference_steps_list": [STEPS, STEPS, STEPS],
    }
    parts = {"vae": wan_vae(), "scheduler": scheduler, "drop": ("num_inference_steps",)}
    found = case("HeliosPyramidPipeline", _helios_transformer(), call, **parts)
    return replace(found, other={"width": 128, "pyramid_num_inference_steps_list": [4, 4, 4]})


def anyflow() -> Case:
    """A flow map: a second time says where each step goes."""
    transformer = wan_transformer("AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    parts = {"vae": wan_vae(), "scheduler": scheduler}
    return case("AnyFlowPipeline", transformer, {"num_frames": 9}, **parts)


CASES = (
    mochi,
    allegro,
    latte,
    easyanimate,
    easyanimate_inpaint,
    sana_video,
    sana_i2v,
    sana_wm,
    kandinsky5,
    kandinsky5_i2v,
    kandinsky6,
    kandinsky6_silent,
    kandinsky6_sr,
    motif,
    motif_decoder,
    motif_i2v,
    helios,
    helios_pyramid,
    anyflow,
)
