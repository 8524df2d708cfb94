"""Fidelity of a clip to another one, in numbers of single pictures: PSNR, SSIM, LPIPS, flicker.

Every function takes clips in any form that `clips.video.as_uint8` takes, the reference first,
and compares them as 8-bit pictures: what a viewer gets. Two clips must have the same shape
`[F, H, W, 3]`, otherwise VideoError is raised. SSIM and LPIPS need the extra `metrics`.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.clips.video import Clip, as_pair, as_uint8
from vidaccel.errors import MetricUnavailable, VideoError

HIGHER_IS_BETTER = {
    "psnr": True,
    "ssim": True,
    "lpips": False,
    "vmaf": True,
    "cvvdp": True,
    "flicker": False,
}

LPIPS_BACKBONES = {
    "alex": "AlexNet_Weights.IMAGENET1K_V1",
    "vgg": "VGG16_Weights.IMAGENET1K_V1",
    "squeeze": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}
LPIPS_SMALLEST = 64  # pixels; below this the last layers of the networks see almost nothing
LPIPS_PIXELS = 2**20  # at a time, which keeps the networks' activations within about 2 GiB
PROBE_SECONDS = 5.0

INSTALL = 'install it with `pip install "vidaccel[metrics]"`'


def psnr(reference: Any, clip: Any) -> float:
    """Return the peak signal-to-noise ratio over all pixels, in dB; infinite for equal clips."""
    first, second = as_pair(reference, clip)
    squares = sum(
        float(np.square(a.astype(np.int32) - b).sum()) for a, b in zip(first, second, strict=True)
    )
    return 10 * math.log10(255**2 * first.size / squares) if squares else math.inf


def ssim(reference: Any, clip: Any) -> float:
    """Return the structural similarity, the mean over frames; 1 for equal clips.

    The window is 7 pixels square, less for smaller frames. Frames need 3 pixels a side.

    Raises MetricUnavailable without scikit-image.
    """
    first, second = as_pair(reference, clip)
    side = min(first.shape[1:3])
    if side < 3:
        raise VideoError(f"SSIM needs frames of 3 pixels a side, found {list(first.shape)}")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MetricUnavailable(f"SSIM needs scikit-image; {INSTALL}") from error
    window = min(7, side - 1 + side % 2)
    measure: Callable[..., float] = structural_similarity
    values = [
        measure(a, b, win_size=window, channel_axis=-1, data_range=255)
        for a, b in zip(first, second, strict=True)
    ]
    return float(np.mean(values))


@cache
def load_lpips(net: str = "alex", pretrained: bool = True) -> Any:
    """Return the LPIPS network over the backbone `net` ("alex", "vgg" or "squeeze") for `lpips`.

    The first use of a backbone downloads its ImageNet weights (alex 233 MB, vgg 528 MB, squeeze
    5 MB) into the cache of torch.hub. With `pretrained` False its weights are random and nothing
    is downloaded: good for trying out code, not for figures. Later calls return the same object.

    Raises MetricUnavailable without the package lpips, or if the weights cannot be had.
    """
    if net not in LPIPS_BACKBONES:
        raise MetricUnavailable(f"LPIPS has the backbones {list(LPIPS_BACKBONES)}, found {net!r}")
    try:
        import lpips as package
        import torch
    except (ImportError, RuntimeError) as error:  # torchvision for another torch: RuntimeError
        raise MetricUnavailable(
            f"LPIPS needs lpips and torchvision ({error}); {INSTALL}"
        ) from error
    if pretrained:
        _require_weights(net)
    # Filling the layers draws random numbers, which must not change what the user generates next.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", module="torchvision")
        try:
            return package.LPIPS(net=net, pnet_rand=not pretrained, verbose=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise MetricUnavailable(
                f"the {net} weights for LPIPS did not load ({error}); "
                f"remove them from {torch.hub.get_dir()}/checkpoints and try again"
            ) from error


def lpips(reference: Any, clip: Any, *, model: Any = None) -> float:
    """Return the learned perceptual distance, the mean over frames; 0 for equal clips.

    `model` comes from `load_lpips`, may be on any device, and is the AlexNet one by default. Frames
    below 64 pixels a side are enlarged, since the networks shrink them 16 times and more.

    Raises MetricUnavailable if there is no model and none can be loaded.
    """
    first, second = as_pair(reference, clip)
    model = load_lpips() if model is None else model
    import torch

    device = next(model.parameters()).device
    scale = max(1, math.ceil(LPIPS_SMALLEST / min(first.shape[1:3])))

    def tensor(frames: Clip) -> torch.Tensor:  # [n, 3, H, W] in -1..1
        pixels = torch.from_numpy(frames.copy()).to(device).permute(0, 3, 1, 2).float()
        return torch.nn.functional.interpolate(pixels / 127.5 - 1, scale_factor=scale)

    batch = max(1, LPIPS_PIXELS // (first.shape[1] * first.shape[2] * scale**2))
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(first), batch):
            part = slice(start, start + batch)
            total += float(model(tensor(first[part]), tensor(second[part])).sum())
    return total / len(first)


def flicker(clip: Any) -> float:
    """Return the mean change of a pixel from one frame to the next, in grey levels of 0..255.

    This is the temporal flickering measure of VBench (Huang et al., CVPR 2024, arXiv:2311.17982),
    which reports 1 minus it over 255. It counts motion as well, so one value says little: compare a
    clip with its reference, which has the same motion, as `fidelity` does. One frame gives 0.
    """
    frames = as_uint8(clip)
    changes = [
        float(np.abs(after.astype(np.int16) - before).mean()) for before, after in pairwise(frames)
    ]
    return float(np.mean(changes)) if changes else 0.0


def worst(metric: str, values: Sequence[float]) -> tuple[int, float]:
    """Return the index and the value of the worst of `values`, one per prompt, of `metric`.

    `metric` is a key of HIGHER_IS_BETTER, which knows which end of the scale is the bad one.
    """
    pick = min if HIGHER_IS_BETTER[metric] else max
    index = pick(range(len(values)), key=values.__getitem__)
    return index, values[index]


def lpips_weights(net: str = "alex") -> tuple[str, Path]:
    """Return the address of a backbone's weights, and the file that they are kept in."""
    import torch
    from torchvision.models import get_weight

    url: str = get_weight(LPIPS_BACKBONES[net]).url
    return url, Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def _require_weights(net: str) -> None:
    """Raise MetricUnavailable unless the backbone's weights are cached or can be downloaded."""
    from urllib.request import Request, urlopen

    url, file = lpips_weights(net)
    if file.is_file():
        return
    try:
        # The download itself has no time limit, so look first whether the server answers.
        urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise MetricUnavailable(
            f"the {net} weights for LPIPS are not in {_short(file.parent)} and cannot be "
            f"downloaded ({error}); get {url} on a machine with a network and put it there"
        ) from error


def _short(path: Path) -> str:
    """Return a path with ~ for the home folder, which reports that are passed on need not name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
