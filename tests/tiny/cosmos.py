"""The Cosmos families."""

from typing import Any

import diffusers
from transformers import BatchEncoding

from tiny.base import LAYERS, STEPS, Case, built, case, image, unipc, video
from tiny.wan import wan_vae


class _Unchecked:
    """Stands in for the safety checker, whose model is large."""

    def to(self, *args: Any) -> "_Unchecked":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


class _Words:
    """A tokenizer of two words that fills in for Qwen's."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        text = conversation[-1]["content"]
        return BatchEncoding({"input_ids": [3 + len(text) % 5, 4, 5]})


def cosmos_transformer(**config: Any) -> Any:
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": LAYERS,
        "mlp_ratio": 2,
        "text_embed_dim": 32,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": True,
    }
    return built("CosmosTransformer3DModel", **(defaults | config))


def _cosmos1(cls: str, call: dict[str, Any], **config: Any) -> Case:
    vae = built(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        final_sigmas_type="sigma_min",
    )
    common = {"height": 32, "width": 32, "num_frames": 9}
    parts = {"vae": vae, "scheduler": scheduler, "safety_checker": _Unchecked()}
    transformer = cosmos_transformer(extra_pos_embed_type="learnable", **config)
    return case(cls, transformer, common | call, **parts)


def cosmos() -> Case:
    """Times are logarithms of the noise level."""
    return _cosmos1("CosmosTextToWorldPipeline", {})


def cosmos_v2w() -> Case:
    call = {"image": image(32)}
    return _cosmos1("CosmosVideoToWorldPipeline", call, in_channels=5)


def _later(cls: str, call: dict[str, Any], scheduler: Any, **parts: Any) -> Case:
    config = parts.pop("config", {})
    transformer = cosmos_transformer(**({"extra_pos_embed_type": None} | config))
    parts = {"vae": wan_vae(), "safety_checker": _Unchecked()} | parts
    return case(cls, transformer, call, scheduler=scheduler, **parts)


def cosmos2_t2i() -> Case:
    """Gives its transformer sigma / (sigma + 1), which is in no table of the scheduler."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    config = {"in_channels": 16, "out_channels": 16}
    return _later("Cosmos2TextToImagePipeline", {}, scheduler, config=config)


def cosmos2_v2w() -> Case:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    config = {"in_channels": 17, "out_channels": 16}
    call = {"image": image(), "num_frames": 9}
    return _later("Cosmos2VideoToWorldPipeline", call, scheduler, config=config)


def cosmos25() -> Case:
    """Gives its transformer the noise level itself."""
    scheduler = unipc(use_karras_sigmas=True, use_flow_sigmas=True, flow_shift=1.0)
    config = {"in_channels": 17, "out_channels": 16}
    return _later("Cosmos2_5_PredictBasePipeline", {"num_frames": 9}, scheduler, config=config)


def cosmos25_i2w() -> Case:
    """Conditioning frames whose noise level is above that of the others in the last steps."""
    scheduler = unipc(use_karras_sigmas=True, use_flow_sigmas=True, flow_shift=1.0)
    config = {"in_channels": 17, "out_channels": 16}
    call = {"image": image(), "num_frames": 9, "conditional_frame_timestep": 0.4}
    return _later("Cosmos2_5_PredictBasePipeline", call, scheduler, config=config)


def cosmos25_transfer() -> Case:
    """Residuals of a ControlNet inside the blocks."""
    config = {
        "in_channels": 17,
        "out_channels": 16,
        "controlnet_block_every_n": 1,
        "img_context_dim_in": 32,
        "img_context_num_tokens": 4,
        "img_context_dim_out": 32,
    }
    controlnet = built(
        "CosmosControlNetModel",
        n_controlnet_blocks=LAYERS,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        patch_size=(1, 2, 2),
        max_size=(4, 32, 32),
        rope_scale=(2.0, 1.0, 1.0),
        extra_pos_embed_type=None,
        img_context_dim_in=32,
        img_context_dim_out=32,
        use_crossattn_projection=False,
    )
    call = {"controls": video(9), "num_frames": 9, "num_frames_per_chunk": 9}
    scheduler = unipc(use_karras_sigmas=True, use_flow_sigmas=True, flow_shift=1.0)
    parts = {"config": config, "controlnet": controlnet}
    return _later("Cosmos2_5_TransferPipeline", call, scheduler, **parts)


def cosmos3() -> Case:
    """One packed sequence without a batch dimension; a list of latents."""
    transformer = built(
        "Cosmos3OmniTransformer",
        head_dim=6,
        hidden_act="relu2",
        hidden_size=6,
        intermediate_size=12,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=1,
        num_hidden_layers=LAYERS,
        num_key_value_heads=1,
        patch_latent_dim=16,
        qk_norm_for_text=False,
        rms_norm_eps=1e-5,
        rope_axes_dim=[1, 1, 1],
        vocab_size=16,
    )
    call = {
        "prompt": "a dog",
        "negative_prompt": "bad",
        "num_frames": 5,
        "use_system_prompt": False,
        "add_resolution_template": False,
        "add_duration_template": False,
    }
    pipe = diffusers.Cosmos3OmniPipeline(
        transformer=transformer,
        text_tokenizer=_Words(),
        vae=wan_vae(),
        scheduler=unipc(),
        enable_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    common = {"height": 16, "width": 16, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return Case(pipe, common | call)


CASES = (
    cosmos,
    cosmos_v2w,
    cosmos2_t2i,
    cosmos2_v2w,
    cosmos25,
    cosmos25_i2w,
    cosmos25_transfer,
    cosmos3,
)
