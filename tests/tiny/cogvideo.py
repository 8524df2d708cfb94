"""CogVideoX and ConsisID."""

from dataclasses import replace
from typing import Any

import diffusers
import torch

from tiny.base import LAYERS, Case, built, case, image, video


def _config(**config: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 32,
        "num_layers": LAYERS,
        "sample_width": 2,
        "sample_height": 2,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
    } | config


def _vae() -> Any:
    return built(
        "AutoencoderKLCogVideoX",
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _cogvideox(
    call: dict[str, Any],
    cls: str = "CogVideoXPipeline",
    scheduler: str = "CogVideoXDDIMScheduler",
    drop: tuple[str, ...] = (),
    **config: Any,
) -> Case:
    transformer = built("CogVideoXTransformer3DModel", **_config(**config))
    parts = {"vae": _vae(), "scheduler": getattr(diffusers, scheduler)()}
    return case(cls, transformer, {"num_frames": 8} | call, drop, **parts)


def cogvideox() -> Case:
    """Guidance in one batched call, a scheduler that does not count its steps."""
    return _cogvideox({})


def cogvideox_rotary() -> Case:
    return _cogvideox({}, use_rotary_positional_embeddings=True)


def cogvideox_dpm() -> Case:
    """A scheduler that adds noise in every step, and guidance that changes from step to step."""
    return _cogvideox({"use_dynamic_cfg": True}, scheduler="CogVideoXDPMScheduler")


def cogvideox_i2v() -> Case:
    return _cogvideox(
        {"image": image()},
        "CogVideoXImageToVideoPipeline",
        in_channels=8,
        use_rotary_positional_embeddings=True,
    )


def cogvideox_v2v() -> Case:
    call = {"video": video(8), "strength": 0.7}
    cls = "CogVideoXVideoToVideoPipeline"
    return replace(_cogvideox(call, cls, drop=("num_frames",)), first=2)


def cogvideox_control() -> Case:
    call = {"control_video": video(8)}
    cls = "CogVideoXFunControlPipeline"
    return _cogvideox(call, cls, drop=("num_frames",), in_channels=8)


def consisid() -> Case:
    """Adds face features between the blocks; names no guidance branches."""
    # Its module works without OpenCV, which the package insists on.
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    transformer = built(
        "ConsisIDTransformer3DModel",
        **_config(in_channels=8),
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
        cross_attn_interval=1,
        is_train_face=True,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    call = {
        "image": image(),
        "num_frames": 8,
        "id_vit_hidden": [torch.ones(1, 2, 2)],
        "id_cond": torch.ones(1, 2),
    }
    parts = {"vae": _vae(), "scheduler": diffusers.CogVideoXDDIMScheduler()}
    other = {"num_inference_steps": 4}  # learned positions: one size only
    return replace(case(ConsisIDPipeline, transformer, call, **parts), other=other)


CASES = (
    cogvideox,
    cogvideox_rotary,
    cogvideox_dpm,
    cogvideox_i2v,
    cogvideox_v2v,
    cogvideox_control,
    consisid,
)
