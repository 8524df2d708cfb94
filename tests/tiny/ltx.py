"""LTX-Video and LTX-2."""

from dataclasses import replace
from inspect import signature
from typing import Any

import diffusers
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tiny.base import LAYERS, Case, built, case, image, masks, video


def _ltx(cls: str, call: dict[str, Any], drop: tuple[str, ...] = (), **parts: Any) -> Case:
    transformer = built(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=LAYERS,
        caption_channels=32,
    )
    vae = built(
        "AutoencoderKLLTXVideo",
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
    common = {"num_frames": 9, "height": 32, "width": 32} | masks()
    return case(cls, transformer, common | call, drop, **({"vae": vae} | parts))


def ltx() -> Case:
    """Packed latents [B, S, C]."""
    return _ltx("LTXPipeline", {})


def ltx_i2v() -> Case:
    """A timestep per token: the first frame is clean."""
    return _ltx("LTXImageToVideoPipeline", {"image": image(32)})


def ltx_condition() -> Case:
    """Tokens of the conditions stand before those of the video; a timestep per token."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    condition = LTXVideoCondition(image=image(32), frame_index=8, strength=0.8)
    return _ltx("LTXConditionPipeline", {"conditions": condition})


def ltx_long() -> Case:
    """Windows, each a generation of its own, with its own prompt."""
    config = T5Config(
        vocab_size=384, d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1, dropout_rate=0.0
    )
    call = {
        "prompt": "a | b",
        "num_frames": 33,
        "temporal_tile_size": 24,
        "temporal_overlap": 8,
        "skip_steps_sigma_threshold": None,
        "max_sequence_length": 16,
        "decode_timestep": None,
    }
    drop = ("prompt_embeds", "negative_prompt_embeds", *masks())
    parts = {"tokenizer": ByT5Tokenizer(), "text_encoder": built(T5EncoderModel, config=config)}
    return _ltx("LTXI2VLongMultiPromptPipeline", call, drop, **parts)


def ltx2_vae() -> Any:
    return built(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False, False, False, False),
        downsample_type=("spatial", "spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def _ltx2(cls: str, call: dict[str, Any], drop: tuple[str, ...] = (), **config: Any) -> Case:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = built(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=LAYERS,
        caption_channels=32,
        rope_double_precision=False,
        rope_type="split",
        **config,
    )
    connectors = built(
        LTX2TextConnectors,
        caption_channels=32,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    audio_vae = built(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = built(
        LTX2Vocoder,
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    common = {
        "num_frames": 9,
        "frame_rate": 25.0,
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        "spatio_temporal_guidance_blocks": [1],
    }
    return case(
        cls,
        transformer,
        common | masks() | call,
        drop,
        vae=ltx2_vae(),
        audio_vae=audio_vae,
        vocoder=vocoder,
        connectors=connectors,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def ltx2() -> Case:
    """Sound beside the picture, and two more guidance passes in every step."""
    return _ltx2("LTX2Pipeline", {})


def ltx2_plain() -> Case:
    """Without the extra passes, and the sound with a guidance of its own."""
    call = {"stg_scale": 0.0, "modality_scale": 1.0}
    call |= {"audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_scale": 7.0}
    return _ltx2("LTX2Pipeline", call)


def _uncompressed(function: Any, option: str) -> dict[str, int]:
    """Images as they are: newer versions send them through a video codec, which needs PyAV."""
    return {option: 0} if option in signature(function).parameters else {}


def ltx2_i2v() -> Case:
    """A timestep per token of the picture."""
    cls = diffusers.LTX2ImageToVideoPipeline
    call = {"image": image(32)} | _uncompressed(cls.__call__, "image_crf")
    return _ltx2(cls.__name__, call)


def ltx2_condition() -> Case:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    options = _uncompressed(LTX2VideoCondition, "crf")
    condition = LTX2VideoCondition(frames=image(32), strength=0.8, **options)
    return _ltx2("LTX2ConditionPipeline", {"conditions": condition})


def ltx2_in_context() -> Case:
    """Tokens of a reference clip stand behind those of the video."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    reference = LTX2ReferenceCondition(frames=video(9, 32), strength=1.0)
    return _ltx2("LTX2InContextPipeline", {"reference_conditions": reference})


def ltx2_hdr() -> Case:
    """Its sound is frozen."""
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    reference = LTX2HDRReferenceCondition(frames=video(9, 32), strength=1.0)
    return _ltx2("LTX2HDRPipeline", {"reference_conditions": reference})


# Of noise levels that the caller gives instead of a number of steps.
_SIGMAS = [1.0, 0.95, 0.9, 0.8, 0.6, 0.3]


def ltx2_dfr() -> Case:
    """Keyframes beside the frames; no guidance, and no name for its one branch."""
    call = {"sigmas": _SIGMAS}
    drop = (
        "num_inference_steps",
        "guidance_scale",
        "spatio_temporal_guidance_blocks",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    other = {"height": 32, "width": 64, "sigmas": _SIGMAS[2:]}
    found = _ltx2("LTX2DFRPipeline", call, drop, use_keyframes_abs_pos_embedding=True)
    return replace(found, other=other)


CASES = (
    ltx,
    ltx_i2v,
    ltx_condition,
    ltx_long,
    ltx2,
    ltx2_plain,
    ltx2_i2v,
    ltx2_condition,
    ltx2_in_context,
    ltx2_hdr,
    ltx2_dfr,
)
