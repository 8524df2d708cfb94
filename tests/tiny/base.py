"""What the tiny pipelines of all families share. Random weights, no download, one thread."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

torch.set_num_threads(1)

STEPS = 6
LAYERS = 3


@dataclass
class Case:
    """A tiny pipeline with the arguments of a call.

    Attributes:
        pipe, kwargs: the pipeline, and what it is called with.
        other: what else a call may ask for: another shape and number of steps.
        first: the step that the run starts with: video-to-video runs start inside the schedule.
        unplanned: steps that are computed whatever the plan says, because the pipeline changes the
            latents there.
        batch, scheduler: why the pipeline takes no batch of prompts, or no other scheduler.
        aside: blocks that run in calls of the transformer beside those of the steps.
        component: the name of the transformer that runs, of that with the first step.
        side_by_side: its transformers run in every step, and do not take turns.
        per_prompt: the argument with a picture, clip or text, if there has to be one per prompt.
    """

    pipe: Any
    kwargs: dict[str, Any]
    other: dict[str, Any] = field(
        default_factory=lambda: {"height": 32, "width": 64, "num_inference_steps": 4}
    )
    first: int = 0
    unplanned: tuple[int, ...] = ()
    batch: str = ""
    scheduler: str = ""
    aside: int = 0
    component: str = "transformer"
    side_by_side: bool = False
    per_prompt: str = ""

    def run(self, seed: int = 0, **overrides: Any) -> torch.Tensor:
        """The latents of one generation, [B, ...]; with sound, picture and sound in a row each."""
        defaults = {"output_type": "latent", "generator": generator(seed)}
        result = self.pipe(**{**defaults, **self.kwargs, **overrides})
        names = ("frames", "images", "image", "video", "audio", "sound")
        parts = [tensor for name in names for tensor in tensors_in(getattr(result, name, None))]
        return parts[0] if len(parts) == 1 else torch.cat([p.flatten(1) for p in parts], dim=1)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a value that may be a list of lists of them, or an array."""
    if value is None:
        return []
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def embeds(seed: int, batch: int = 1, width: int = 32) -> torch.Tensor:
    """Prompt embeddings [B, 16, width]."""
    return torch.randn(batch, 16, width, generator=generator(seed))


def masks(dtype: torch.dtype = torch.bool) -> dict[str, torch.Tensor]:
    """Attention masks of the prompts that leave out nothing."""
    mask = torch.ones(1, 16, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


def image(size: int = 16) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), 90, np.uint8))


def video(frames: int, size: int = 16) -> list[Image.Image]:
    """A clip of noise, the same every time."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)) for _ in range(frames)]


def built(cls: str | type, seed: int = 0, **config: Any) -> Any:
    """A model with random weights that depend on the seed alone.

    Args:
        cls: the class, or its name in diffusers.
    """
    torch.manual_seed(seed)
    with _uninitialised_as_nan():
        model = (getattr(diffusers, cls) if isinstance(cls, str) else cls)(**config).eval()
    # Some classes leave parameters to the checkpoint: what torch.empty found in memory, NaN too.
    for parameter in model.parameters():
        if parameter.isnan().any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@contextlib.contextmanager
def _uninitialised_as_nan() -> Iterator[None]:
    """Let torch.empty fill what it gives with NaN, so that it can be told from what was set."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def case(
    cls: str | type,
    transformer: Any,
    call: dict[str, Any],
    drop: tuple[str, ...] = (),
    **components: Any,
) -> Case:
    """A pipeline without text encoders, given embeddings of width 32 instead.

    Args:
        cls: the pipeline class, or its name in diffusers.
        transformer: its transformer.
        call: arguments of a call besides the common ones.
        drop: common ones that this pipeline does not take.
        components: further components and options of the constructor.
    """
    parts = {"tokenizer": None, "text_encoder": None, "transformer": transformer}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipeline = getattr(diffusers, cls) if isinstance(cls, str) else cls
    taken = signature(pipeline.__init__).parameters
    parts = {name: part for name, part in parts.items() if name in taken}
    pipe = pipeline(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    kwargs = {
        "prompt_embeds": embeds(1),
        "negative_prompt_embeds": embeds(2),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
    } | call
    return Case(pipe, {name: value for name, value in kwargs.items() if name not in drop})


def unipc(**config: Any) -> Any:
    defaults = {"prediction_type": "flow_prediction", "flow_shift": 3.0, "use_flow_sigmas": True}
    return diffusers.UniPCMultistepScheduler(**(defaults | config))


Build = Callable[[], Case]
