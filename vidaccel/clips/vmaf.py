"""VMAF of a clip to another one, by the ffmpeg that imageio brings along."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vidaccel.clips.video import as_pair
from vidaccel.errors import MetricUnavailable

# The model has learned from video that fills a screen of so many rows: smaller frames are enlarged
# by a whole number to come near it, as a player that fills the screen would. Not more than so many
# times, since the model sees no detail of over 16 pixels: blown up further, damage goes unseen.
SCREEN_ROWS, MOST_TIMES = 1080, 4


def vmaf(reference: Any, clip: Any) -> float:
    """Return VMAF (0 to 100), the mean over the frames, as `vmaf_of_frames` measures it."""
    return fmean(vmaf_of_frames(reference, clip))


def vmaf_of_frames(reference: Any, clip: Any) -> list[float]:
    """Return VMAF of each frame, 0 to 100; a little below 100 for equal clips.

    The model is vmaf_v0.6.1 (Li et al., "Toward a practical perceptual video quality metric",
    2016), which is built into libvmaf. Frames of fewer than `SCREEN_ROWS` are enlarged by a whole
    number to come near it, at most `MOST_TIMES`.

    Args:
        reference, clip: as `vidaccel.clips.video.as_uint8` takes them, of one shape.

    Raises:
        VideoError: the clips differ in shape.
        MetricUnavailable: there is no ffmpeg here, or one without libvmaf, or it fails.
    """
    first, second = as_pair(reference, clip)
    missing = why_no_vmaf()
    if missing:
        raise MetricUnavailable(missing)
    frames, height, width, _ = first.shape
    times = min(MOST_TIMES, max(1, round(SCREEN_ROWS / height)))
    # The model looks at brightness alone; colour at full size allows odd sizes.
    larger = f"scale={times * width}:{times * height}:flags=bicubic,format=yuv444p"
    threads = os.cpu_count() or 1
    options = f"libvmaf=log_fmt=json:log_path=log.json:n_threads={threads}"
    with TemporaryDirectory() as folder:
        inputs = []
        for name, pictures in (("clip", second), ("reference", first)):
            path = Path(folder, name)
            path.write_bytes(np.ascontiguousarray(pictures).tobytes())
            inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
            inputs += ["-r", "16", "-i", name]
        graph = f"[0:v]{larger}[a];[1:v]{larger}[b];[a][b]{options}"
        command = [_ffmpeg(), "-hide_banner", "-nostdin", "-loglevel", "error", *inputs]
        command += ["-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = Path(folder, "log.json")
        found = json.loads(log.read_text())["frames"] if log.exists() else []
        if done.returncode or len(found) != frames:
            reason = done.stderr.strip().partition("\n")[0] or "no result"
            raise MetricUnavailable(f"ffmpeg failed on frames of {width}x{height}: {reason}")
    return [float(frame["metrics"]["vmaf"]) for frame in found]


def why_no_vmaf() -> str:
    """Return why VMAF cannot be computed here; "" where it can."""
    try:
        return (
            ""
            if _has_libvmaf(_ffmpeg())
            else (
                "its ffmpeg is built without libvmaf: `pip install -U imageio-ffmpeg`, or let "
                "IMAGEIO_FFMPEG_EXE name one that has it"
            )
        )
    except (ImportError, OSError, RuntimeError) as error:
        return f"it needs ffmpeg ({error}): `pip install imageio-ffmpeg`"


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@cache
def _has_libvmaf(program: str) -> bool:
    command = [program, "-hide_banner", "-filters"]
    return " libvmaf " in subprocess.run(command, capture_output=True, text=True).stdout
