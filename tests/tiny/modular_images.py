"""Modular pipelines for images, made of the parts of whole ones."""

from typing import Any

import diffusers
import torch

from tiny import cosmos, images, more_images, new_images
from tiny.base import Case, built, embeds
from tiny.modular import ModularCase, modular_case, noise


def _modular(pipeline: str, whole: Case, **call: Any) -> ModularCase:
    """The denoising of a pipeline, with the parts and the call of a whole one, and more of them."""
    return _denoising(pipeline, whole.pipe.components, whole.kwargs | call)


def _denoising(pipeline: str, parts: dict[str, Any], call: dict[str, Any]) -> ModularCase:
    """The denoising of a pipeline, called with what its blocks name.

    It makes larger pictures: without a decoder, a latent is taken for as many pixels as usual.
    """
    blocks = getattr(diffusers, getattr(diffusers, pipeline).default_blocks_name)()
    for name in [name for name in blocks.sub_blocks if name != "denoise"]:
        del blocks.sub_blocks[name]
    call |= {"height": 64, "width": 64}
    call = {name: value for name, value in call.items() if name in blocks.input_names}
    other = {"height": 64, "width": 128, "num_inference_steps": 4}
    return modular_case(pipeline, blocks, parts, call, other=other)


def flux_modular() -> Case:
    return _modular("FluxModularPipeline", images.flux())


def flux_kontext_modular() -> Case:
    """The picture to edit after the one that is made."""
    call = {"image_latents": noise(3, 1, 1, 8, 8), "max_area": 64 * 64}
    found = _modular("FluxKontextModularPipeline", images.flux(), **call)
    found.other |= {"max_area": 64 * 128}
    return found


def flux2_modular() -> Case:
    return _modular("Flux2ModularPipeline", images.flux2())


def flux2_klein_modular() -> Case:
    """With a guider."""
    whole = images.flux2()
    return _modular("Flux2KleinBaseModularPipeline", whole, negative_prompt_embeds=embeds(2))


def sd3_modular() -> Case:
    return _modular("StableDiffusion3ModularPipeline", images.sd3())


def qwen_image_modular() -> Case:
    return _modular("QwenImageModularPipeline", images.qwen_image())


def qwen_image_edit_modular() -> Case:
    """The picture to edit after the one that is made."""
    latents = noise(3, 1, 4, 1, 8, 8)
    return _modular("QwenImageEditModularPipeline", images.qwen_image(), image_latents=latents)


def qwen_image_edit_plus_modular() -> Case:
    """Pictures of several sizes after the one that is made."""
    latents = [noise(3, 1, 4, 1, 8, 8), noise(4, 1, 4, 1, 8, 16)]
    return _modular("QwenImageEditPlusModularPipeline", images.qwen_image(), image_latents=latents)


def qwen_image_layered_modular() -> Case:
    """Pictures of which the last is the one to take apart."""
    whole = images.qwen_image(use_additional_t_cond=True, use_layer3d_rope=True)
    call = {"image_latents": noise(3, 1, 1, 4, 8, 8), "layers": 2}
    found = _modular("QwenImageLayeredModularPipeline", whole, **call)
    found.other = {"layers": 3, "num_inference_steps": 4}
    return found


def z_image_modular() -> Case:
    found = _modular("ZImageModularPipeline", images.z_image())
    found.pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
    return found


def krea2_modular() -> Case:
    return _modular("Krea2ModularPipeline", new_images.krea2())


def ernie_image_modular() -> Case:
    return _modular("ErnieImageModularPipeline", new_images.ernie_image())


def qwen_image21_modular() -> Case:
    """A first step that fills a cache of the text, and later ones on the picture alone."""
    whole = more_images.qwen_image21()
    call = {
        f"{prefix}{name}": torch.full((1, 16), filled)
        for prefix in ("", "negative_")
        for name, filled in (("prompt_embeds_mask", True), ("image_pad_mask", False))
    }
    found = _modular("QwenImage21ModularPipeline", whole, **call)
    found.pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
    found.first, found.aside = whole.first, whole.aside
    return found


def anima_modular() -> Case:
    """The transformer of Cosmos on pictures; its text encoder reads that of two others."""
    transformer = cosmos.cosmos_transformer(
        in_channels=16, out_channels=16, extra_pos_embed_type=None, text_embed_dim=32
    )
    parts = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_conditioner": built(
            "AnimaTextConditioner",
            source_dim=32,
            target_dim=32,
            model_dim=32,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=32,
            min_sequence_length=16,
        ),
    }
    call: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_"), 1):
        call[f"{prefix}qwen_prompt_embeds"] = embeds(seed)
        call[f"{prefix}qwen_attention_mask"] = torch.ones(1, 16)
        call[f"{prefix}t5_input_ids"] = torch.arange(16)[None] + seed
        call[f"{prefix}t5_attention_mask"] = torch.ones(1, 16)
    return _denoising("AnimaModularPipeline", parts, call)


CASES = (
    flux_modular,
    flux_kontext_modular,
    flux2_modular,
    flux2_klein_modular,
    sd3_modular,
    qwen_image_modular,
    qwen_image_edit_modular,
    qwen_image_edit_plus_modular,
    qwen_image_layered_modular,
    z_image_modular,
    krea2_modular,
    ernie_image_modular,
    qwen_image21_modular,
    anima_modular,
)
