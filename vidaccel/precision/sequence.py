"""The mix of tokens along the sequence before they are rounded (STaMP, arXiv 2510.26771).

y = L⁻¹ (Q(L x) Wᵀ) with an orthogonal L over tokens: after a Haar transform over frames, height and
width a few tokens hold most of the energy, and those get more bits. What is added here to the paper
is a video's third dimension, odd lengths, and text: its tokens stay out of L and in 8 bits.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from vidaccel.engine.block_proxies import Argument
from vidaccel.engine.compat import parallel_config
from vidaccel.errors import PrecisionError
from vidaccel.hosts.registry import config_of
from vidaccel.hosts.spec import HostSpec

Grid = tuple[int, int, int]
# Arguments of a forward that tell the grid of a sequence that is packed already.
_TOLD = ("num_frames", "height", "width")


@dataclass
class Sequence:
    """The tokens of the running call of a transformer, for all of its layers.

    Attributes:
        video_last: the video comes behind the text where both are in one sequence.
        grid: frames, height and width of the video in tokens; None before the first call.
    """

    video_last: bool = False
    grid: Grid | None = None

    def video(self, tokens: int) -> tuple[int, int] | None:
        """Return the first and last + 1 of the video tokens among so many; None: there are none."""
        if self.grid is None or tokens < (video := prod(self.grid)):
            return None
        start = tokens - video if self.video_last else 0
        return start, start + video


class GridFinder:
    """Finds the grid of video tokens in the calls of a transformer, as a forward pre-hook.

    Args:
        transformer: the transformer.
        host: its row of the table.

    Raises:
        PrecisionError: its calls do not tell.
    """

    def __init__(self, transformer: nn.Module, host: HostSpec) -> None:
        name = type(transformer).__name__
        self._name = name
        config = config_of(transformer)
        self._patch, self._channels = _patch_of(config), config.get("in_channels")
        self._sample = Argument.of_forward(type(transformer), host.sample)
        found = [Argument.find(type(transformer), told) for told in _TOLD]
        self._told = [argument for argument in found if argument is not None]
        if self._patch is None and len(self._told) < len(_TOLD):
            raise PrecisionError(
                f"{name} does not tell its grid of tokens, which sequence='haar' needs: pass "
                "LowPrecision(sequence=None)"
            )
        kinds = [kind for kind in host.tokens if kind == "video" or len(host.tokens) > 1]
        self.sequence = Sequence(video_last=len(kinds) > 1 and kinds[-1] == "video")

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the grid of a call that begins; raises PrecisionError when it cannot be told."""
        if parallel_config(model) is not None:
            raise PrecisionError(
                "sequence='haar' mixes the tokens of a whole video, and in context parallel a rank "
                "holds a part of them: accelerate with LowPrecision(sequence=None)"
            )
        self.sequence.grid = self._grid(args, kwargs)

    def _grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        sample = self._sample.value(args, kwargs)
        told = [argument.value(args, kwargs) for argument in self._told]
        if len(told) == len(_TOLD) and all(isinstance(size, int) for size in told):
            return told[0], told[1], told[2]
        if self._patch is not None and isinstance(sample, torch.Tensor) and sample.dim() == 5:
            sizes = list(sample.shape[1:])
            del sizes[1 if sizes[1] == self._channels != sizes[0] else 0]  # [B, F, C, H, W]
            frames, height, width = (
                size // patch for size, patch in zip(sizes, self._patch, strict=True)
            )
            return frames, height, width
        raise PrecisionError(
            f"a call of {self._name} does not tell its grid of video tokens, which "
            "sequence='haar' needs: accelerate with LowPrecision(sequence=None)"
        )


def _patch_of(config: dict[str, Any]) -> Grid | None:
    """Return the latents that a token stands for, over frames, height and width."""
    patch, frames = config.get("patch_size"), config.get("patch_size_t") or 1
    if isinstance(patch, int):
        return frames, patch, patch
    if isinstance(patch, list | tuple) and len(patch) == 3:
        return patch[0], patch[1], patch[2]
    return None
