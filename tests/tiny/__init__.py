"""Tiny random pipelines of every supported family, built from a configuration, no download."""

from tiny import (
    cogvideo,
    cosmos,
    hunyuan,
    images,
    ltx,
    modular,
    modular_images,
    modular_videos,
    more_images,
    new_images,
    older_images,
    others,
    wan,
)
from tiny.base import LAYERS, STEPS, Build, Case, embeds, generator

__all__ = [
    "BATCH_SINCE",
    "CASES",
    "CORE",
    "LAYERS",
    "NO_BATCH",
    "NO_OTHER_SCHEDULER",
    "PER_PROMPT",
    "SINCE",
    "STEPS",
    "WITHOUT_CASE",
    "Build",
    "Case",
    "embeds",
    "generator",
]

_IMAGES = (images, new_images, more_images, older_images)
_MODULAR = (modular, modular_images, modular_videos)
_MODULES = (wan, hunyuan, cogvideo, ltx, cosmos, others, *_IMAGES, *_MODULAR)

CASES: dict[str, Build] = {build.__name__: build for module in _MODULES for build in module.CASES}

# One of each kind, for what does not need every family.
CORE = (
    "wan",
    "wan_unipc",
    "wan_expand_timesteps",
    "wan22",
    "wan_v2v",
    "wan_vace",
    "hunyuan",
    "hunyuan_true_cfg",
    "hunyuan15",
    "cogvideox",
    "ltx",
    "mochi",
    "wan_modular",
    "minimax_h3",
)

# Families that need a later diffusers than the oldest supported one: name of the case -> version.
SINCE = {
    "cosmos3": "0.39",
    "motif": "0.39",
    "motif_decoder": "0.39",
    "anyflow": "0.39",
    "kandinsky6": "0.42",
    "kandinsky6_silent": "0.42",
    "kandinsky6_sr": "0.42",
    "motif_i2v": "0.39",
    "sana_wm": "0.42",
    "ltx2_in_context": "0.39",
    "ltx2_hdr": "0.39",
    "ltx2_dfr": "0.42",
    "krea2": "0.39",
    "ernie_image": "0.39",
    "flux3": "0.42",
    "flux3_edit": "0.42",
    "ideogram4": "0.39",
    "ideogram4_modular": "0.39",
    "joyimage_edit": "0.39",
    "joyimage_edit_plus": "0.40",
    "qwen_image21": "0.41",
    "qwen_image21_whole": "0.41",
    "bria_fibo2": "0.42",
    "wan22_vace_modular": "0.42",
    "wan_animate_2": "0.40",
    "minimax_h3": "0.40",
    "minimax_h3_keyframe": "0.40",
    "minimax_h3_references": "0.40",
    "sd3_modular": "0.39",
    "krea2_modular": "0.42",
    "ernie_image_modular": "0.42",
    "qwen_image21_modular": "0.42",
    "anima_modular": "0.39",
    "ltx2_modular": "0.42",
    "ltx25_modular": "0.42",
    "cosmos3_modular": "0.42",
}

# Pipelines that are given a picture or a clip for each prompt: name of the case -> the argument.
PER_PROMPT = {
    "hunyuan_i2v": "image",
    "hunyuan_i2v_token_replace": "image",
    "skyreels_v1": "image",
    "cogvideox_i2v": "image",
    "cogvideox_v2v": "video",
    "ltx_i2v": "image",
    "ltx2_i2v": "image",
    "cosmos_v2w": "image",
    "cosmos2_v2w": "image",
    "ideogram4": "prompt",
}

# What is up to Diffusers: pipelines that take no batch of prompts with a generator each ...
_ONE_CLIP = "draws the noise of one clip"
_STAGES = "draws the noise of its later stages for the batch as a whole"
NO_BATCH = {
    "wan_vace": "takes no list of generators",
    "lucy_edit": _ONE_CLIP,
    "skyreels_df": _ONE_CLIP,
    "skyreels_df_long": _ONE_CLIP,
    "skyreels_df_i2v": _ONE_CLIP,
    "skyreels_df_v2v": _ONE_CLIP,
    "framepack": "keeps the history of one clip",
    "cogvideox_control": _ONE_CLIP,
    "consisid": "takes the features of one face",
    "ltx_condition": _ONE_CLIP,
    "ltx_long": "takes one prompt",
    "cosmos25_i2w": "takes one image",
    "cosmos3": "takes one prompt",
    "easyanimate_inpaint": _ONE_CLIP,
    "sana_wm": "takes one prompt",
    "kandinsky6_sr": "has no prompt",
    "motif_i2v": "takes one image",
    "kandinsky5_i2v": "draws one encoding of the image",
    "wan_animate_2": "takes one prompt",
    "prx": "counts its prompts by their texts",
    "wan22_vace_modular": "takes no list of generators",
    "wan22_i2v_modular": "takes one image",
    "longcat_image": "takes embeddings of its own text encoder alone",
    "joyimage_edit_plus": "takes embeddings of its own text encoder alone",
    "ideogram4_modular": "takes embeddings of its own text encoder alone",
    "glm_image_edit": "takes a list of pictures for each prompt",
    "minimax_h3": "takes one prompt",
    "minimax_h3_keyframe": "takes one prompt",
    "minimax_h3_references": "takes one prompt",
    "helios_pyramid": _STAGES,
    "helios_pyramid_modular": _STAGES,
    "flux_kontext_modular": "takes a picture for each prompt",
    "wan_i2v_modular": "takes one image",
    "qwen_image21_modular": "takes a mask of its own text encoder for each prompt",
    "cosmos3_modular": "takes one prompt",
}

# ... or only from a later diffusers on ...
BATCH_SINCE = {"ltx2_condition": "0.42"}

# ... or that no other scheduler fits.
_H3 = "has times and a direction of its own"
_TIMESTEPS = "hands its scheduler a table of its own"
_SHIFT = "reads its shift from the config of FlowMatchEulerDiscreteScheduler"
NO_OTHER_SCHEDULER = {
    "chrono_edit": "reaches into UniPCMultistepScheduler",
    "skyreels_df": "steps every frame with UniPCMultistepScheduler",
    "skyreels_df_long": "steps every frame with UniPCMultistepScheduler",
    "skyreels_df_i2v": "steps every frame with UniPCMultistepScheduler",
    "skyreels_df_v2v": "steps every frame with UniPCMultistepScheduler",
    "cogvideox_control": "calls the step of CogVideoXDDIMScheduler",
    "ltx_condition": _TIMESTEPS,
    "ltx_long": "hands its scheduler a generator",
    "ltx2_dfr": _TIMESTEPS,
    "sana_wm": "hands its scheduler a time per token",
    "cosmos2_t2i": _TIMESTEPS,
    "cosmos2_v2w": _TIMESTEPS,
    "cogview4": _TIMESTEPS,
    "z_image": _TIMESTEPS,
    "z_image_modular": _TIMESTEPS,
    "ernie_image": _TIMESTEPS,
    "ernie_image_modular": _TIMESTEPS,
    "glm_image": _TIMESTEPS,
    "glm_image_edit": _TIMESTEPS,
    "ideogram4": _TIMESTEPS,
    "ideogram4_modular": _TIMESTEPS,
    "bria_fibo": _SHIFT,
    "bria_fibo2": _SHIFT,
    "wan_animate_2": "hands its scheduler a generator",
    "minimax_h3": _H3,
    "minimax_h3_keyframe": _H3,
    "minimax_h3_references": _H3,
}

# Pipelines for video that no case runs, besides those that a row of the table leaves out.
_UNET = "has a UNet, not a transformer"
_ENLARGES = "enlarges latents in one call of a network, without denoising"
WITHOUT_CASE = {
    "AnimateDiffControlNetPipeline": _UNET,
    "AnimateDiffPAGPipeline": _UNET,
    "AnimateDiffPipeline": _UNET,
    "AnimateDiffSDXLPipeline": _UNET,
    "AnimateDiffSparseControlNetPipeline": _UNET,
    "AnimateDiffVideoToVideoControlNetPipeline": _UNET,
    "AnimateDiffVideoToVideoPipeline": _UNET,
    "I2VGenXLPipeline": _UNET,
    "LTX2LatentUpsamplePipeline": _ENLARGES,
    "LTXLatentUpsamplePipeline": _ENLARGES,
    "PIAPipeline": _UNET,
    "StableVideoDiffusionPipeline": _UNET,
    "TextToVideoSDPipeline": _UNET,
    "TextToVideoZeroPipeline": _UNET,
    "TextToVideoZeroSDXLPipeline": _UNET,
    "VideoToVideoSDPipeline": _UNET,
}
