"""Tiny random pipelines of every supported family, built from a configuration, no download."""

from tiny import cogvideo, cosmos, hunyuan, images, ltx, others, wan
from tiny.base import LAYERS, STEPS, Build, Case, embeds, generator

__all__ = [
    "CASES",
    "CORE",
    "LAYERS",
    "NO_BATCH",
    "NO_OTHER_SCHEDULER",
    "SINCE",
    "STEPS",
    "WITHOUT_CASE",
    "Build",
    "Case",
    "embeds",
    "generator",
]

_MODULES = (wan, hunyuan, cogvideo, ltx, cosmos, others, images)

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
}

# What is up to Diffusers: pipelines that take no batch of prompts with a generator each ...
_IMAGE_EACH = "asks for an image per prompt"
_ONE_CLIP = "draws the noise of one clip"
NO_BATCH = {
    "wan_vace": "takes no list of generators",
    "lucy_edit": _ONE_CLIP,
    "skyreels_df": _ONE_CLIP,
    "skyreels_df_long": _ONE_CLIP,
    "skyreels_df_i2v": _ONE_CLIP,
    "skyreels_df_v2v": _ONE_CLIP,
    "hunyuan_i2v": _IMAGE_EACH,
    "hunyuan_i2v_token_replace": _IMAGE_EACH,
    "skyreels_v1": _IMAGE_EACH,
    "framepack": "keeps the history of one clip",
    "cogvideox_i2v": _IMAGE_EACH,
    "cogvideox_v2v": _IMAGE_EACH,
    "cogvideox_control": _ONE_CLIP,
    "consisid": _IMAGE_EACH,
    "ltx_i2v": _IMAGE_EACH,
    "ltx_condition": _ONE_CLIP,
    "ltx_long": "takes one prompt",
    "ltx2_i2v": _IMAGE_EACH,
    "ltx2_condition": "draws the noise of a batch as a whole in older versions of diffusers",
    "cosmos_v2w": _IMAGE_EACH,
    "cosmos2_v2w": _IMAGE_EACH,
    "cosmos25_i2w": _IMAGE_EACH,
    "cosmos3": "takes one prompt",
    "easyanimate_inpaint": _ONE_CLIP,
    "sana_wm": "takes one prompt",
    "kandinsky6_sr": "has no prompt",
    "motif_i2v": _IMAGE_EACH,
    "kandinsky5": "counts words over the whole batch",
    "kandinsky5_i2v": "counts words over the whole batch",
    "helios_pyramid": "draws the noise of its later stages for the batch as a whole",
}

# ... or that no other scheduler fits.
_TIMESTEPS = "hands its scheduler a table of its own"
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
