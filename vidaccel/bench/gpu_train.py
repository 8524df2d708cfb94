"""The part "train": how long a training step of the embedded model takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.clips.embedded import embedded_model

# Batch, frames, height and width of the clips that assets/training/train.py trains on.
_CLIPS = {"small": (16, 9, 64, 64), "large": (2, 17, 96, 96)}


def items(sizes: Sizes) -> list[Item]:
    """List them: the transformer takes most of the training."""
    return [
        Item(f"{name}, {size}", partial(run, sizes, size), 15, repeats=size != "small")
        for name, run in (("transformer", _transformer), ("VAE", _vae))
        for size in _CLIPS
    ]


def _transformer(sizes: Sizes, size: str) -> dict[str, Any]:
    """Time a step of flow matching: forward, backward and optimiser, on random latents."""
    import diffusers

    library: Any = diffusers  # whose classes have no types
    config = library.WanTransformer3DModel.load_config(embedded_model() / "transformer")
    model = library.WanTransformer3DModel.from_config(config).to(sizes.device.name).train()
    batch, frames, height, width = _shape(sizes, size)
    vae = library.AutoencoderKLWan.load_config(embedded_model() / "vae")
    times, space = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
    latents = ((frames - 1) // times + 1, height // space, width // space)
    on: Any = {"device": sizes.device.name}
    clean, noise = (torch.randn(batch, config["in_channels"], *latents, **on) for _ in range(2))
    text = torch.randn(batch, 32, config["text_dim"], **on)
    sigma = torch.rand(batch, **on)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])

    def loss() -> Tensor:
        velocity: Tensor = model(noisy, 1000 * sigma, text, return_dict=False)[0]
        return (velocity.float() - (noise - clean)).square().mean()

    return _timed(sizes, model, loss) | {"clips": batch}


def _vae(sizes: Sizes, size: str) -> dict[str, Any]:
    """Time a step of the autoencoder on random clips."""
    import diffusers

    library: Any = diffusers
    config = library.AutoencoderKLWan.load_config(embedded_model() / "vae")
    model = library.AutoencoderKLWan.from_config(config).to(sizes.device.name).train()
    batch, frames, height, width = _shape(sizes, size)
    batch = max(batch // 4, 1)
    clips = torch.rand(batch, 3, frames, height, width, device=sizes.device.name) * 2 - 1

    def loss() -> Tensor:
        decoded: Tensor = model.decode(model.encode(clips).latent_dist.mode()).sample
        return (decoded.float() - clips).square().mean()

    return _timed(sizes, model, loss) | {"clips": batch}


def _shape(sizes: Sizes, size: str) -> tuple[int, int, int, int]:
    """Return batch, frames, height and width."""
    return _CLIPS[size] if not sizes.dry else (1, 5, 32, 32)


def _timed(sizes: Sizes, model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Time steps of AdamW in mixed precision, and the memory of one.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = sizes.device
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.on_gpu)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.name, torch.bfloat16):
            value = loss()
        torch.autograd.backward(value)
        optimiser.step()
        return value.detach()

    first = step().item()
    peak = device.peak_bytes(step)
    time = device.milliseconds(step, sizes.repeat_ms)
    last = step().item()
    if not (first < float("inf") and last < float("inf")):
        raise FloatingPointError(f"the loss went from {first} to {last}")
    return {"step_ms": time, "peak_bytes": peak, "loss_first": first, "loss_last": last}
