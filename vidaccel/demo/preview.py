"""Pictures of the latents of a running generation, drawn without decoding them.

A latent pixel is turned into a colour by one matrix. Where a clip of the model has been decoded
before, that is the least-squares map from its latents to its pixels, and the colours are right.
Before, it is the three main directions of the latents: shapes are right, colours are not.
"""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidaccel.clips.video import Clip

FRAMES = 5  # shown, evenly spaced
MIN_ROWS = 96  # of a picture; small latents are enlarged in whole steps


class Preview:
    """Draw latents.

    Args:
        channels: number of channels of the model's latents.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._map: torch.Tensor | None = None  # [C + 1, 3]
        self._axes: torch.Tensor | None = None  # [C, 3], of the last picture without a map

    def learn(self, latents: Any, frames: Clip) -> None:
        """Fit the map to the latents of a finished clip, uint8 [F, H, W, 3].

        Latents whose form is not known are passed over.
        """
        volume = self._volume(latents)
        if volume is None:
            return
        channels, depth, height, width = volume.shape
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
        small = torch.nn.functional.adaptive_avg_pool3d(
            pixels.float() / 255, (depth, height, width)
        )
        known = torch.cat([volume.reshape(channels, -1), torch.ones(1, depth * height * width)])
        wanted = small[0].reshape(3, -1)
        self._map = torch.linalg.lstsq(known.T, wanted.T, driver="gelsd").solution

    def frames(self, latents: Any) -> Clip | None:
        """Return up to 5 frames of latents, uint8 [n, h, w, 3]; None when their form is not known.

        The forms known are [B, C, F, h, w] and [B, F, C, h, w]; the first clip of a batch is shown.
        """
        volume = self._volume(latents)
        if volume is None:
            return None
        channels, depth, height, width = volume.shape
        chosen = np.linspace(0, depth - 1, min(depth, FRAMES)).round().astype(int)
        points = volume[:, chosen].reshape(channels, -1).T
        if self._map is not None:
            colours = points @ self._map[:-1] + self._map[-1]
        else:
            colours = self._main_directions(points)
        pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.reshape(len(chosen), height, width, 3).numpy()

    def _main_directions(self, points: torch.Tensor) -> torch.Tensor:
        """Return the three principal components of `points` [N, C], each scaled to 0..1: [N, 3]."""
        centred = points - points.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
        if axes.shape[1] < 3:
            axes = torch.nn.functional.pad(axes, (0, 3 - axes.shape[1]))
        if self._axes is not None:  # the sign of a direction is arbitrary: keep it over the steps
            signs = torch.where((axes * self._axes).sum(0) < 0, -1.0, 1.0)
            axes = axes * signs
        self._axes = axes
        values: torch.Tensor = centred @ axes
        deviation = values.std(0, correction=0).clamp_min(1e-6)
        return values / (4 * deviation) + 0.5

    def _volume(self, latents: Any) -> torch.Tensor | None:
        """Return the first clip as float32 [C, F, h, w] on the CPU; None for an unknown form."""
        if not isinstance(latents, torch.Tensor) or latents.ndim != 5:
            return None
        first = latents[0].detach().float().cpu()
        if first.shape[0] == self.channels:
            return first
        return first.transpose(0, 1) if first.shape[1] == self.channels else None


def data_uri(frames: Clip) -> str:
    """Return frames beside each other as a PNG in a data URI, for an <img>."""
    strip = np.concatenate(list(frames), axis=1)
    factor = -(-MIN_ROWS // strip.shape[0])
    strip = strip.repeat(factor, axis=0).repeat(factor, axis=1)
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
