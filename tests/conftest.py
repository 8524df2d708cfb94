"""Tiny random pipelines that need no download, and how to run them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

torch.set_num_threads(1)

STEPS = 6
LAYERS = 3


@dataclass
class Case:
    """A tiny pipeline with the arguments of a call."""

    pipe: Any
    kwargs: dict[str, Any]

    def run(self, seed: int = 0, **overrides: Any) -> torch.Tensor:
        """The latents of one generation."""
        kwargs = {"output_type": "latent", **self.kwargs, **overrides}
        return self.pipe(generator=generator(seed), **kwargs).frames


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def embeds(seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, 32, generator=generator(seed))


def _transformer(cls: type = WanTransformer3DModel, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
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
        "rope_max_seq_len": 32,
    }
    return cls(**(defaults | config)).eval()


def _vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def _case(cls: type, transformer: Any, call: dict[str, Any], **components: Any) -> Case:
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "transformer": transformer,
    }
    pipe = cls(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {
        "prompt_embeds": embeds(1),
        "negative_prompt_embeds": embeds(2),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
    }
    return Case(pipe, kwargs | call)


def wan() -> Case:
    return _case(WanPipeline, _transformer(), {"num_frames": 9})


def wan_unipc() -> Case:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=3.0, use_flow_sigmas=True
    )
    return _case(WanPipeline, _transformer(), {"num_frames": 9}, scheduler=scheduler)


def wan_expand_timesteps() -> Case:
    """Wan 2.2 5B: a timestep per token."""
    return _case(WanPipeline, _transformer(), {"num_frames": 9}, expand_timesteps=True)


def wan22() -> Case:
    """Two transformers: the first for high noise, the second for low noise."""
    return _case(
        WanPipeline,
        _transformer(),
        {"num_frames": 9},
        transformer_2=_transformer(seed=1),
        boundary_ratio=0.875,
    )


def wan_i2v() -> Case:
    image = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    return _case(
        WanImageToVideoPipeline,
        _transformer(in_channels=36),
        {"num_frames": 9, "image": image},
        image_encoder=None,
        image_processor=None,
    )


def wan_v2v() -> Case:
    """Names no guidance branches and starts inside the schedule."""
    rng = np.random.default_rng(0)
    video = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(9)]
    return _case(WanVideoToVideoPipeline, _transformer(), {"video": video, "strength": 0.7})


def wan_vace() -> Case:
    """Adds hints between the blocks, also after the last one."""
    return _case(
        WanVACEPipeline,
        _transformer(WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=96),
        {"num_frames": 9},
    )


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f for f in (wan, wan_unipc, wan_expand_timesteps, wan22, wan_i2v, wan_v2v, wan_vace)
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def transformers_of(pipe: Any) -> dict[str, Any]:
    names = ("transformer", "transformer_2")
    return {name: pipe.components[name] for name in names if pipe.components.get(name) is not None}


def count_blocks(pipe: Any) -> dict[str, int]:
    """Counts the calls of every real block with hooks of its own; the dict is live."""
    counts = {"blocks": 0}

    def count(module: Any, args: Any) -> None:
        counts["blocks"] += 1

    for transformer in transformers_of(pipe).values():
        for name, module in transformer.named_modules():
            if "blocks." in name and name.rsplit(".", 1)[1].isdigit() and name.count(".") == 1:
                module.register_forward_pre_hook(count)
    return counts
