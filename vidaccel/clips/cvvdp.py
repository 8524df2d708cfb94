"""ColorVideoVDP of a clip to another one: how far apart a viewer of a given screen sees them."""

import logging
import sys
from functools import cache
from typing import Any

import numpy as np

from vidaccel.clips.metrics import INSTALL
from vidaccel.clips.video import Clip, as_pair
from vidaccel.errors import MetricUnavailable

# A 24-inch Full HD monitor of 200 cd/m2 in an office, seen from two of its heights, which shows a
# clip in its own pixels. Enlarged to fill the screen, damage to small clips would be seen less.
DISPLAY = "standard_fhd"
GPU_GIB = 4.0  # of memory at a time, so that a pipeline beside it keeps its own
# Pixels of all frames together; 6.8 million took one thread of a busy CPU 264 s.
MOST_ON_CPU = 2_000_000


def cvvdp(reference: Any, clip: Any, *, fps: float = 16.0) -> tuple[float, list[float]]:
    """Return the quality of a clip in JOD: 10 for equal clips, 1 less for each step that is seen.

    At a distance of 1 JOD (just objectionable difference) 75 % of viewers choose the reference.
    The metric is ColorVideoVDP (Mantiuk et al., "ColorVideoVDP: A visual difference predictor for
    image, video and display distortions", SIGGRAPH 2024, arXiv:2401.11485), which looks at
    brightness, colour and change over time. It runs on the GPU where there is one.

    Args:
        reference, clip: as `vidaccel.clips.video.as_uint8` takes them, of one shape. One frame is
            looked at as a still picture.
        fps: frames per second at which they are shown.

    Returns:
        The value of the whole clip, which weighs bad frames more than a mean would, and one value
        per frame.

    Raises:
        VideoError: the clips differ in shape.
        MetricUnavailable: the package cvvdp is missing or does not work here, or a clip is too
            large for a CPU.
    """
    import torch

    first, second = as_pair(reference, clip)
    package = load_cvvdp()
    if torch.cuda.is_available():
        try:
            return _measured(package, first, second, fps, torch.device("cuda"))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # beside a large model; the CPU has room
    if first.size // 3 > MOST_ON_CPU:
        raise MetricUnavailable("a clip of this size would take it many minutes on a CPU")
    return _measured(package, first, second, fps, torch.device("cpu"))


def _measured(
    package: Any, first: Clip, second: Clip, fps: float, device: Any
) -> tuple[float, list[float]]:
    import torch

    metric = package.cvvdp(display_name=DISPLAY, device=device, quiet=True, gpu_mem=GPU_GIB)
    with torch.inference_mode():
        jod, found = metric.predict(
            np.ascontiguousarray(second),
            np.ascontiguousarray(first),
            dim_order="FHWC",
            frames_per_second=fps,
        )
        if len(first) == 1:
            return float(jod), [float(jod)]
        channels = torch.as_tensor(found["Q_per_ch"], device=device)  # [1, channel, frame, band]
        # Twice the same frame: of one alone the metric takes it that it is a still picture.
        each = [metric.do_pooling_and_jods(channels[:, :, [i, i]]) for i in range(len(first))]
    return float(jod), [float(value) for value in each]


@cache
def load_cvvdp() -> Any:
    """Return the package of ColorVideoVDP.

    Raises:
        MetricUnavailable: it is not installed, or does not work here.
    """
    # Its import adds folders to the path and lets torch warn of a CUDA that is not there.
    path, disabled = list(sys.path), logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        import pycvvdp

        return pycvvdp
    except ImportError as error:
        raise MetricUnavailable(f"it needs the package cvvdp ({error}); {INSTALL}") from error
    # A package that was built for another version of the next raises what it likes.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise MetricUnavailable(f"the package cvvdp does not work here ({reason})") from error
    finally:
        sys.path[:] = path
        logging.disable(disabled)
