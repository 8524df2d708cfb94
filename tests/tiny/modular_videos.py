"""Modular pipelines for video with parts of their own, made of the parts of whole ones."""

from typing import Any

import diffusers

from tiny import cosmos, ltx, others, wan
from tiny.base import Case, embeds
from tiny.modular import modular_case, noise


def _denoising(pipeline: str, *more: str) -> Any:
    """The blocks of a pipeline that denoise, and `more` of them."""
    blocks = getattr(diffusers, getattr(diffusers, pipeline).default_blocks_name)()
    for name in [name for name in blocks.sub_blocks if name not in ("denoise", *more)]:
        del blocks.sub_blocks[name]
    return blocks


def wan_i2v_modular() -> Case:
    """The features of the picture beside the text, as Wan 2.1 takes them."""
    name = "WanImage2VideoModularPipeline"
    parts = wan.wan_i2v().pipe.components
    parts["transformer"] = wan.wan_transformer(in_channels=36, image_dim=32)
    call = {
        "num_frames": 9,
        "image_condition_latents": noise(3, 1, 20, 3, 2, 2),
        "image_embeds": embeds(4),
    }
    settings = {"other": {"num_inference_steps": 4}}
    return modular_case(name, _denoising(name), parts, call, **settings)


class _Tokenizer:
    padding_side = "left"


def _encoded() -> Any:
    """A block that says about given embeddings what the text encoder says about its own."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

    class Encoded(ModularPipelineBlocks):
        model_name = "ltx2"
        description = "counts prompts"
        inputs = (InputParam("prompt_embeds", required=True),)
        intermediate_outputs = (OutputParam("batch_size"), OutputParam("dtype"))

        def __call__(self, components: Any, state: Any) -> Any:
            block_state = self.get_block_state(state)
            block_state.batch_size = len(block_state.prompt_embeds)
            block_state.dtype = block_state.prompt_embeds.dtype
            self.set_block_state(state, block_state)
            return components, state

    return Encoded()


def _ltx2(name: str) -> Case:
    blocks = _denoising(name, "text_encoder")
    blocks.sub_blocks["text_encoder"].sub_blocks["text_encoder"] = _encoded()
    whole = ltx.ltx2()
    parts = whole.pipe.components | {
        "tokenizer": _Tokenizer(),
        "guider": diffusers.LTX2Guidance(
            guidance_scale=3.0,
            stg_scale=1.0,
            modality_scale=3.0,
            guidance_rescale=0.7,
            spatio_temporal_guidance_blocks=[1],
        ),
    }
    call = {name: value for name, value in whole.kwargs.items() if name in blocks.input_names}
    return modular_case(name, blocks, parts, call, outputs=("latents", "audio_latents"))


def ltx2_modular() -> Case:
    """A guider for the picture and one for the sound, which share the calls of a step."""
    return _ltx2("LTX2ModularPipeline")


def ltx25_modular() -> Case:
    return _ltx2("LTX25ModularPipeline")


def helios_modular() -> Case:
    name = "HeliosModularPipeline"
    whole = others.helios()
    call = {"num_frames": 33, "num_latent_frames_per_chunk": 5}
    settings = {"outputs": ("latent_chunks",)}
    return modular_case(name, _denoising(name), whole.pipe.components, call, **settings)


def helios_pyramid_modular() -> Case:
    name = "HeliosPyramidModularPipeline"
    whole = others.helios_pyramid()
    names = ("num_frames", "num_latent_frames_per_chunk", "height", "width")
    call = {name: whole.kwargs[name] for name in (*names, "pyramid_num_inference_steps_list")}
    settings = {"outputs": ("latent_chunks",), "other": whole.other}
    return modular_case(name, _denoising(name), whole.pipe.components, call, **settings)


def cosmos3_modular() -> Case:
    name = "Cosmos3OmniModularPipeline"
    call = {
        "cond_input_ids": [3, 4, 5],
        "uncond_input_ids": [6, 4, 5],
        "num_frames": 5,
        "guidance_scale": 3.0,
    }
    return modular_case(name, _denoising(name), cosmos.cosmos3().pipe.components, call)


CASES = (
    wan_i2v_modular,
    ltx2_modular,
    ltx25_modular,
    helios_modular,
    helios_pyramid_modular,
    cosmos3_modular,
)
