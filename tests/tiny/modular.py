"""Modular pipelines, made of the parts of whole ones: blocks without text encoders and decoders."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from tiny import hunyuan, ltx, wan
from tiny.base import LAYERS, STEPS, Case, built, embeds, generator, image, tensors_in
from vidaccel.engine import compat


@dataclass
class ModularCase(Case):
    """A tiny modular pipeline.

    Attributes:
        outputs: the values of its state that make up the result.
        stance: what `torch.compile` does in a run: some models compile a part of themselves.
    """

    outputs: tuple[str, ...] = ("latents",)
    stance: str = "default"
    other: dict[str, Any] = field(
        default_factory=lambda: {"height": 32, "width": 64, "num_inference_steps": 4}
    )

    def run(self, seed: int = 0, **overrides: Any) -> torch.Tensor:
        call = {"generator": generator(seed), **self.kwargs, **overrides}
        with torch.compiler.set_stance(self.stance):
            found = self.pipe(**call, output=list(self.outputs))
        parts = [tensor for name in self.outputs for tensor in tensors_in(found[name])]
        rows = len(parts[0])
        return parts[0] if len(parts) == 1 else torch.cat([p.reshape(rows, -1) for p in parts], 1)


def modular_case(
    pipeline: str, blocks: Any, parts: dict[str, Any], call: dict[str, Any], **settings: Any
) -> ModularCase:
    """A pipeline of `blocks` with those of `parts` that they want, called with embeddings.

    Args:
        pipeline: the name of its class.
        blocks: its blocks, or the names of those to leave out of the ones that the class has.
        parts: components.
        call: arguments of a call besides the common ones.
        settings: further ones of the case.
    """
    cls = getattr(diffusers, pipeline)
    if isinstance(blocks, tuple):
        dropped, blocks = blocks, getattr(diffusers, cls.default_blocks_name)()
        for name in dropped:
            del blocks.sub_blocks[name]
    pipe = cls(blocks)
    pipe.update_components(
        **{name: part for name, part in parts.items() if name in pipe.component_names}
    )
    for part in compat.owners_of_loops(pipe):
        part.set_progress_bar_config(disable=True)
    wanted = {
        "prompt_embeds": embeds(1),
        "negative_prompt_embeds": embeds(2),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
    } | call
    known = pipe.blocks.input_names
    # What the blocks do not name is passed on to the denoiser.
    kwargs = {name: value for name, value in wanted.items() if name in known or name in call}
    return ModularCase(pipe, kwargs, **settings)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


_TEXT = ("text_encoder", "decode")


def wan_modular() -> Case:
    """Without a cache context: the guider tells the branch."""
    parts = wan.wan().pipe.components
    return modular_case("WanModularPipeline", _TEXT, parts, {"num_frames": 9})


def wan22_modular() -> Case:
    """Two transformers, and a guider for each."""
    parts = wan.wan22().pipe.components
    found = modular_case("Wan22ModularPipeline", _TEXT, parts, {"num_frames": 9})
    found.pipe.update_components(boundary_ratio=0.875)
    return found


def wan22_vace_modular() -> Case:
    """Control that a block of its own prepares."""
    parts = wan.wan_vace().pipe.components
    parts |= {"transformer_2": wan.wan_vace().pipe.transformer}
    call = {"num_frames": 9}
    found = modular_case("Wan22VaceModularPipeline", _TEXT, parts, call)
    found.pipe.update_components(boundary_ratio=0.875)
    return found


def wan22_i2v_modular() -> Case:
    parts = wan.wan22_i2v().pipe.components
    call = {"num_frames": 9, "image": image()}
    found = modular_case("Wan22Image2VideoModularPipeline", _TEXT, parts, call)
    found.pipe.update_components(boundary_ratio=0.875)
    return found


def ltx_modular() -> Case:
    parts = ltx.ltx().pipe.components
    call = {"num_frames": 9} | {
        f"{prefix}prompt_attention_mask": torch.ones(1, 16) for prefix in ("", "negative_")
    }
    return modular_case("LTXModularPipeline", _TEXT, parts, call)


def hunyuan15_modular() -> Case:
    whole = hunyuan.hunyuan15()
    dropped = (*_TEXT, "image_encoder")
    parts = whole.pipe.components
    return modular_case("HunyuanVideo15ModularPipeline", dropped, parts, whole.kwargs)


def wan_animate_2() -> Case:
    """A call that fills a cache before the first step; a block that the second branch leaves out.

    Without its decoder, which would empty the cache after a segment.
    """
    from diffusers.modular_pipelines.wan_animate_2 import modular_blocks_wan_animate_2

    # A copy: the blocks inside are the library's own, shared by all pipelines.
    blocks = deepcopy(modular_blocks_wan_animate_2.WanAnimate2CoreDenoiseStep())
    del blocks.sub_blocks["denoise"].sub_blocks["decode"]
    transformer = built(
        "WanAnimate2Transformer3DModel",
        text_len=16,
        dim=24,
        ffn_dim=32,
        freq_dim=32,
        text_dim=32,
        num_heads=2,
        num_layers=11,
    )
    parts = {"transformer": transformer, "vae": wan.wan_vae()}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    call = {
        "driving_video_pixels": noise(3, 1, 3, 5, 16, 16),
        "reference_image_latents": noise(4, 20, 1, 2, 2),
        "prompt_ref_embeds": embeds(5),
        "condition_clip_context": noise(6, 1, 257, 1280),
        "denoiser_input_fields": {"encoder_hidden_states_image": noise(7, 1, 257, 1280)},
        "segment_frame_length": 5,
        "effective_segment": 4,
        "num_segments": 1,
    }
    settings = {"other": {"num_inference_steps": 4}, "stance": "force_eager", "aside": 11}
    return modular_case("WanAnimate2ModularPipeline", blocks, parts, call, **settings)


def _minimax_h3(seed: int) -> Any:
    return built(
        "MiniMaxH3Transformer3DModel",
        seed,
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=LAYERS,
        num_refiner_layers=1,
        ffn_dim=32,
        text_dim=32,
        freq_dim=32,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def minimax_h3_parts() -> dict[str, Any]:
    """The components of both of its workflows."""
    return {
        "transformer": _minimax_h3(0),
        "transformer_ref": _minimax_h3(1),
        "scheduler": diffusers.MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0),
    }


def minimax_h3_call() -> dict[str, Any]:
    """What every workflow is called with."""
    return {
        "text_token_tags": torch.ones(16, dtype=torch.long),
        "height": 32,
        "width": 32,
        "num_frames": 124,
        # The end of the last step counts as one.
        "num_inference_steps": STEPS + 1,
    }


def minimax_h3_blocks() -> Any:
    """The blocks of all workflows, without encoders and decoders."""
    blocks = getattr(diffusers, diffusers.MiniMaxH3ModularPipeline.default_blocks_name)()
    for name in ("text_encoder", "vae_encoder", "decode"):
        del blocks.sub_blocks[name]
    return blocks


def references() -> dict[str, Any]:
    """What the workflow of references is called with besides: one picture."""
    from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference

    return {"references": [MiniMaxH3ImageReference(image(32))]} | encoded_references()


def encoded_references() -> dict[str, Any]:
    """What the encoders of that workflow make of it."""
    return {"condition_latents": [noise(8, 1, 24, 1, 2, 2)], "audio_condition_latents": []}


def _minimax_h3_case(name: str, call: dict[str, Any], **settings: Any) -> Case:
    from diffusers.modular_pipelines.minimax_h3 import modular_blocks_minimax_h3

    return modular_case(
        "MiniMaxH3ModularPipeline",
        getattr(modular_blocks_minimax_h3, f"MiniMaxH3{name}CoreDenoiseStep")(),
        minimax_h3_parts(),
        minimax_h3_call() | call,
        outputs=("latents", "audio_latents"),
        # The canvas is that of a keyframe, which is encoded already.
        other={"num_frames": 141, "num_inference_steps": 5},
        **settings,
    )


def minimax_h3() -> Case:
    """One packed sequence of text, sound and video, at noise levels of their own."""
    return _minimax_h3_case("", {})


def minimax_h3_keyframe() -> Case:
    """A first frame before the sound, at a level of its own."""
    keyframe = {"keyframe_anchors": ("first",), "condition_latents": [noise(8, 1, 24, 1, 2, 2)]}
    return _minimax_h3_case("FL2VA", keyframe)


def minimax_h3_references() -> Case:
    from diffusers.modular_pipelines.minimax_h3.references import MiniMaxH3ImageReference

    found = {"normalized_references": [MiniMaxH3ImageReference(image(32))]}
    call = found | encoded_references()
    return _minimax_h3_case("Ref2VA", call, component="transformer_ref")


CASES = (
    wan_modular,
    wan22_modular,
    wan22_vace_modular,
    wan22_i2v_modular,
    ltx_modular,
    hunyuan15_modular,
    wan_animate_2,
    minimax_h3,
    minimax_h3_keyframe,
    minimax_h3_references,
)
