"""The pictures of latents."""

import numpy as np
import torch

from vidaccel.demo.preview import Preview, data_uri


def test_preview_learns_the_colours_of_a_model():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 6, 5, generator=generator)
    mix = torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1], [0.02, 0.02, 0.02]])
    colours = (latents[0].permute(1, 2, 3, 0) @ mix + 0.5).clamp(0, 1)
    frames = (colours.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy() * 255).round()
    frames = frames.astype(np.uint8)
    preview = Preview(4)
    before = preview.frames(latents)
    assert before.shape == (3, 6, 5, 3) and before.dtype == np.uint8 and before.std() > 20
    preview.learn(latents, frames)
    assert np.abs(preview.frames(latents).astype(int) - frames[:, ::8, ::8]).max() <= 2
    # CogVideoX has frames before channels; packed latents cannot be drawn.
    swapped = preview.frames(latents.transpose(1, 2))
    assert np.array_equal(swapped, preview.frames(latents))
    assert preview.frames(torch.zeros(1, 90, 4)) is None and preview.frames(None) is None
    assert preview.frames(torch.zeros(1, 7, 3, 6, 5)) is None
    assert data_uri(before).startswith("data:image/png;base64,")


def test_main_directions_keep_their_colours_from_step_to_step():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 8, 3, 6, 6, generator=generator) * torch.arange(1, 9).view(8, 1, 1, 1)
    preview = Preview(8)
    first = preview.frames(latents).astype(int)
    for _ in range(3):
        latents = latents + 0.01 * torch.randn(latents.shape, generator=generator)
        assert np.abs(preview.frames(latents) - first).mean() < 12
