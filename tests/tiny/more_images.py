"""Image models whose blocks take the text anew, or that edit pictures."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from tiny.base import LAYERS, STEPS, Case, built, case, embeds, image, masks
from tiny.images import flux2_vae, image_vae, pooled
from tiny.modular import modular_case, noise
from tiny.new_images import alive
from tiny.wan import wan_vae


def _flux3(call: dict[str, Any]) -> Case:
    transformer = built(
        "Flux3Transformer2DModel",
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    parts = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=6.93),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.5),
    }
    dropped = ("prompt_upsampler", "text_encoder", "vae_encoder", "decode")
    settings = {"other": {"height": 64, "width": 128, "num_inference_steps": 4}}
    call |= {"height": 64, "width": 64}
    return modular_case("Flux3ModularPipeline", dropped, parts, call, **settings)


def flux3() -> Case:
    return _flux3({})


def flux3_edit() -> Case:
    """Pictures to edit after the one that is made."""
    return _flux3({"image_cond_latents": [noise(3, 1, 4, 2, 2), noise(4, 1, 4, 3, 2)]})


def hidream() -> Case:
    """Another layer of the text encoder after the text of each block; mixtures of experts."""
    transformer = built(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 32],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 0],
    )
    layers = {
        f"{prefix}prompt_embeds_llama3": torch.stack([embeds(seed), embeds(seed + 7)], dim=1)
        for seed, prefix in enumerate(("", "negative_"), 3)
    }
    first = {"prompt_embeds_t5": embeds(1), "negative_prompt_embeds_t5": embeds(2)}
    names = [f"{part}_{i}" for part in ("text_encoder", "tokenizer") for i in (2, 3, 4)]
    parts = dict.fromkeys(names) | {"vae": image_vae(4, shift_factor=0.06)}
    drop = ("prompt_embeds", "negative_prompt_embeds")
    call = first | layers | pooled(8)
    found = case("HiDreamImagePipeline", transformer, call, drop, **parts)
    # It makes every picture as large as this one, of another shape at most.
    found.pipe.default_sample_size = 16
    encode_prompt = found.pipe.encode_prompt

    def layers_first(**given: Any) -> Any:
        return encode_prompt(**given | {name: given[name].transpose(0, 1) for name in layers})

    found.pipe.encode_prompt = layers_first
    return found


def _pixart(cls: str) -> Case:
    transformer = built(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=LAYERS,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
    )
    call = masks() | {"use_resolution_binning": False, "negative_prompt": None}
    parts = {"vae": image_vae(4), "scheduler": diffusers.DPMSolverMultistepScheduler()}
    return case(cls, transformer, call, **parts)


def pixart_alpha() -> Case:
    return _pixart("PixArtAlphaPipeline")


def pixart_sigma() -> Case:
    return _pixart("PixArtSigmaPipeline")


def cogview3() -> Case:
    transformer = built(
        "CogView3PlusTransformer2DModel",
        in_channels=4,
        num_layers=LAYERS,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=4.0, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    return case("CogView3PlusPipeline", transformer, {}, vae=image_vae(4), scheduler=scheduler)


def _joyimage(cls: str) -> Any:
    return built(
        cls,
        in_channels=16,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=32,
        mlp_width_ratio=2.0,
        num_layers=LAYERS,
        rope_dim_list=[4, 6, 6],
    )


def joyimage_edit() -> Case:
    """The picture to edit as a frame before the one that is made."""
    masks = {
        f"{prefix}prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long)
        for prefix in ("", "negative_")
    }
    vae = wan_vae()
    encode = vae.encode
    parts = {"vae": vae, "processor": None}
    transformer = _joyimage("JoyImageEditTransformer3DModel")
    found = case("JoyImageEditPipeline", transformer, masks | {"image": image()}, **parts)
    # It draws the encoding of a picture from the generator of the process ...
    found.pipe.vae.encode = lambda x: SimpleNamespace(
        latent_dist=SimpleNamespace(sample=encode(x).latent_dist.mode)
    )
    # ... and has buckets of large sizes alone.
    sizes = found.pipe.vae_image_processor
    sizes.get_default_height_width = lambda image, height, width: (height, width)
    return found


def bria_fibo() -> Case:
    """Another layer of the text encoder in half of the text's channels, in every block."""
    transformer = built(
        "BriaFiboTransformer2DModel",
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=[4, 4, 8],
        text_encoder_dim=32,
    )
    call = {"prompt": [embeds(1)[0]], "negative_prompt": [embeds(2)[0]]}
    drop = ("prompt_embeds", "negative_prompt_embeds")
    large = {"height": 64, "width": 64}
    found = case("BriaFiboPipeline", transformer, call | large, drop, vae=None)
    found.other = {"height": 64, "width": 128, "num_inference_steps": 4}
    found.pipe.encode_prompt = _encoded
    return found


def _encoded(prompt: list[torch.Tensor], negative_prompt: list[torch.Tensor], **_: Any) -> Any:
    """Embeddings as prompts: of each one with three layers."""
    given = [torch.stack(prompt), torch.stack(negative_prompt)]
    wide = [torch.cat([text, 2 * text], dim=-1) for text in given]
    layers = [[text, text.roll(1, dims=1), text.roll(2, dims=1)] for text in given]
    mask = torch.ones(len(prompt), 16)
    return *wide, torch.zeros(len(prompt), 16, 3), mask, mask, *layers


def bria_fibo2() -> Case:
    """A few tokens that stand for the text, before those of the picture."""
    transformer = built(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=24,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=32,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 64, 64),
    )
    call: dict[str, Any] = {
        f"{prefix}prompt_embeds": torch.stack([embeds(seed), embeds(seed + 7)], dim=1)
        for seed, prefix in enumerate(("", "negative_"), 1)
    }
    call |= {"guidance_scale": 2.0}
    return case("BriaFibo2Pipeline", alive(transformer), call, vae=flux2_vae(), processor=None)


def joyimage_edit_plus() -> Case:
    """Pictures to edit in the same sequence, and a prompt as text alone."""
    transformer = _joyimage("JoyImageEditPlusTransformer3DModel")
    call = {"prompt": "a", "negative_prompt": "bb", "images": [image(), image(32)]}
    drop = ("prompt_embeds", "negative_prompt_embeds")
    parts = {"vae": wan_vae(), "processor": None}
    found = case("JoyImageEditPlusPipeline", transformer, call, drop, **parts)
    sizes = found.pipe.image_processor
    sizes.get_default_height_width = lambda image, *_: image.size[::-1]
    found.pipe.encode_prompt_multiple_images = _encoded_texts
    return found


def _encoded_texts(prompt: list[str], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ones = torch.ones(len(prompt), 16, dtype=torch.long)
    return torch.cat([embeds(len(text)) for text in prompt]), ones


class _Processor:
    """Counts no tokens in the message of its own that a pipeline asks about when it is made."""

    tokenizer = SimpleNamespace(encode=lambda _: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[]]


def _qwen_image21(call: dict[str, Any]) -> Case:
    transformer = built(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    call |= {"true_cfg_scale": 3.0, "height": 64, "width": 64}
    drop = ("guidance_scale",)
    parts = {"vae": None, "processor": _Processor()}
    found = case("QwenImage21Pipeline", transformer, call, drop, **parts)
    found.other = {"height": 64, "width": 128, "num_inference_steps": 4}
    return found


def qwen_image21() -> Case:
    """A first step that fills a cache of the text, and later ones on the picture alone."""
    found = _qwen_image21({})
    found.first, found.aside = 1, 2 * LAYERS
    return found


def qwen_image21_whole() -> Case:
    """Text and picture in every step."""
    return _qwen_image21({"use_kv_cache": False})


def _glm_image(call: dict[str, Any]) -> Case:
    transformer = built(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=8,
    )
    vae = image_vae(4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    parts = {"vae": vae, "processor": None, "vision_language_encoder": None}
    call |= {"prior_token_ids": _tokens(64)[None]}
    found = case("GlmImagePipeline", transformer, call, **parts)
    found.other |= {"prior_token_ids": _tokens(512)[None]}
    return found


def _tokens(count: int) -> torch.Tensor:
    return torch.arange(count) % 7


def glm_image() -> Case:
    """The time less one; tokens of a language model added to those of the picture."""
    return _glm_image({})


def glm_image_edit() -> Case:
    """Calls that fill a cache of the pictures to edit before the first step."""
    call = {
        "image": [image()],
        "prior_token_image_ids": [_tokens(64)],
        "source_image_grid_thw": [torch.tensor([[1, 8, 8]])],
    }
    found = _glm_image(call)
    found.aside = LAYERS
    return found


def _ideogram4(seed: int) -> Any:
    return built(
        "Ideogram4Transformer2DModel",
        seed,
        in_channels=4,
        num_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=32,
        mrope_section=(4, 2, 2),
    )


def ideogram4() -> Case:
    """Two transformers in every step, one for each branch, that of the second without the text."""
    parts = {"unconditional_transformer": _ideogram4(1), "vae": flux2_vae()}
    call = {"prompt": "a", "guidance_schedule": None, "max_sequence_length": 16}
    drop = ("prompt_embeds", "negative_prompt_embeds")
    found = case("Ideogram4Pipeline", _ideogram4(0), call, drop, **parts)

    def encoded(prompt: Any, grid_h: int, grid_w: int, longest: int, device: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        ids = found.pipe._prepare_ids([16] * len(prompts), grid_h, grid_w, longest, device)
        text = torch.cat([embeds(len(words)) for words in prompts])
        return torch.nn.functional.pad(text, (0, 0, 0, grid_h * grid_w)), *ids

    found.pipe.encode_prompt = lambda max_sequence_length, **call: encoded(
        longest=max_sequence_length, **call
    )
    found.side_by_side = True
    return found


def ideogram4_modular() -> Case:
    from diffusers.modular_pipelines.ideogram4 import modular_blocks_ideogram4

    blocks = deepcopy(modular_blocks_ideogram4.Ideogram4CoreDenoiseStep())
    del blocks.sub_blocks["after_denoise"]
    whole = ideogram4()
    call = {"text_features": embeds(1), "text_lengths": [16], "guidance_schedule": [5.0] * STEPS}
    parts = whole.pipe.components
    call |= {"height": 64, "width": 64}
    found = modular_case("Ideogram4ModularPipeline", blocks, parts, call, side_by_side=True)
    found.other |= {"guidance_schedule": [5.0] * 4, "width": 128}
    return found


CASES = (
    flux3,
    flux3_edit,
    hidream,
    pixart_alpha,
    pixart_sigma,
    cogview3,
    joyimage_edit,
    bria_fibo,
    bria_fibo2,
    joyimage_edit_plus,
    qwen_image21,
    qwen_image21_whole,
    glm_image,
    glm_image_edit,
    ideogram4,
    ideogram4_modular,
)
