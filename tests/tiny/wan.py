"""Wan and what is built like it."""

from dataclasses import replace
from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny.base import LAYERS, Case, built, case, image, unipc, video


def like_wan(cls: str, seed: int = 0, **config: Any) -> Any:
    """A transformer of one of the classes that are configured as Wan's is."""
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
    }
    return built(cls, seed, **(defaults | config))


def wan_transformer(cls: str = "WanTransformer3DModel", seed: int = 0, **config: Any) -> Any:
    return like_wan(cls, seed, **({"rope_max_seq_len": 32} | config))


def wan_vae() -> Any:
    return built(
        "AutoencoderKLWan",
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _case(cls: str, transformer: Any, call: dict[str, Any], **components: Any) -> Case:
    return case(cls, transformer, {"num_frames": 9} | call, **({"vae": wan_vae()} | components))


def _image_encoder() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    return {
        "image_encoder": built(CLIPVisionModelWithProjection, config=config),
        "image_processor": CLIPImageProcessor(crop_size=4, size=4),
    }


def wan() -> Case:
    return _case("WanPipeline", wan_transformer(), {})


def wan_unipc() -> Case:
    return _case("WanPipeline", wan_transformer(), {}, scheduler=unipc())


def wan_expand_timesteps() -> Case:
    """Wan 2.2 5B: a timestep per token."""
    return _case("WanPipeline", wan_transformer(), {}, expand_timesteps=True)


def wan22() -> Case:
    """Two transformers: the first for high noise, the second for low noise."""
    return _case(
        "WanPipeline",
        wan_transformer(),
        {},
        transformer_2=wan_transformer(seed=1),
        boundary_ratio=0.875,
    )


def wan_i2v() -> Case:
    return _case(
        "WanImageToVideoPipeline",
        wan_transformer(in_channels=36),
        {"image": image()},
        image_encoder=None,
        image_processor=None,
    )


def wan22_i2v() -> Case:
    """Two transformers for images."""
    return _case(
        "WanImageToVideoPipeline",
        wan_transformer(in_channels=36),
        {"image": image()},
        image_encoder=None,
        image_processor=None,
        transformer_2=wan_transformer(seed=1, in_channels=36),
        boundary_ratio=0.875,
    )


def wan_v2v() -> Case:
    """Names no guidance branches and starts inside the schedule."""
    call = {"video": video(9), "strength": 0.7}
    drop = ("num_frames",)
    return replace(_case("WanVideoToVideoPipeline", wan_transformer(), call, drop=drop), first=2)


def wan_vace() -> Case:
    """Adds hints between the blocks, also after the last one."""
    transformer = wan_transformer(
        "WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=96
    )
    return _case("WanVACEPipeline", transformer, {})


def wan_animate() -> Case:
    """Adds face features between the blocks; two segments, each a generation of its own."""
    transformer = wan_transformer(
        "WanAnimateTransformer3DModel",
        in_channels=36,
        image_dim=4,
        inject_face_latents_blocks=2,
        num_layers=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
    )
    call = {
        "image": image(),
        "pose_video": video(9),
        "face_video": video(9),
        "segment_frame_length": 5,
    }
    parts = {"scheduler": unipc(), "drop": ("num_frames",)} | _image_encoder()
    return _case("WanAnimatePipeline", transformer, call, **parts)


def lucy_edit() -> Case:
    transformer = wan_transformer(in_channels=32)
    return _case("LucyEditPipeline", transformer, {"video": video(9)})


def chrono_edit() -> Case:
    """Names no guidance branches; drops all frames but the ends in mid-run."""
    transformer = wan_transformer("ChronoEditTransformer3DModel", in_channels=36, image_dim=4)
    call = {
        "image": image(),
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": 3,
    }
    parts = {"scheduler": unipc()} | _image_encoder()
    return replace(_case("ChronoEditPipeline", transformer, call, **parts), unplanned=(3,))


def _skyreels(cls: str, call: dict[str, Any], config: dict[str, Any], **components: Any) -> Case:
    transformer = wan_transformer("SkyReelsV2Transformer3DModel", freq_dim=256, **config)
    return _case(cls, transformer, call, scheduler=unipc(flow_shift=8.0), **components)


def skyreels() -> Case:
    return _skyreels("SkyReelsV2Pipeline", {}, {})


def skyreels_i2v() -> Case:
    config = {"in_channels": 36, "image_dim": 4}
    call = {"image": image()}
    return _skyreels("SkyReelsV2ImageToVideoPipeline", call, config, **_image_encoder())


_FORCING = {"inject_sample_info": True}


def skyreels_df() -> Case:
    """A timestep per frame, the same for all."""
    return _skyreels("SkyReelsV2DiffusionForcingPipeline", {"prompt": None}, _FORCING)


def skyreels_df_long() -> Case:
    """Two windows, each a generation of its own; the second starts with clean frames."""
    call = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "prompt": None}
    return _skyreels("SkyReelsV2DiffusionForcingPipeline", call, _FORCING)


def skyreels_df_i2v() -> Case:
    call = {"image": image()}
    return _skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline", call, _FORCING)


def skyreels_df_v2v() -> Case:
    call = {"video": video(9), "num_frames": 17, "base_num_frames": 9, "overlap_history": 5}
    return _skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline", call, _FORCING)


CASES = (
    wan,
    wan_unipc,
    wan_expand_timesteps,
    wan22,
    wan_i2v,
    wan22_i2v,
    wan_v2v,
    wan_vace,
    wan_animate,
    lucy_edit,
    chrono_edit,
    skyreels,
    skyreels_i2v,
    skyreels_df,
    skyreels_df_long,
    skyreels_df_i2v,
    skyreels_df_v2v,
)
