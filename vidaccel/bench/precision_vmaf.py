"""VMAF of a clip to another one, by the ffmpeg that imageio brings along."""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vidaccel.errors import MetricUnavailable

# The model is trained on large pictures: smaller ones are enlarged to so many rows.
_ROWS = 288


def vmaf(reference: Any, clip: Any) -> float:
    """Return VMAF (0 to 100, 100 for the same), the mean over the frames.

    Args:
        reference, clip: uint8 [F, H, W, 3].

    Raises:
        MetricUnavailable: there is no ffmpeg here, or one without libvmaf.
    """
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise MetricUnavailable(f"VMAF needs ffmpeg: {error}") from error
    _, height, width, _ = reference.shape
    times = max(1, round(_ROWS / height))
    size = f"{width}x{height}"
    larger = f"scale={times * width}:{times * height}:flags=bicubic,format=yuv420p"
    with TemporaryDirectory() as folder:
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", "16", "-i"]
        names = []
        for name, frames in (("clip", clip), ("reference", reference)):
            path = Path(folder, name)
            path.write_bytes(np.ascontiguousarray(frames).tobytes())
            names.append(str(path))
        log = Path(folder, "log.json")
        graph = f"[0:v]{larger}[a];[1:v]{larger}[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
        command = [program, "-hide_banner", "-loglevel", "error"]
        command += [*raw, names[0], *raw, names[1], "-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not log.exists():
            reason = done.stderr.strip().partition("\n")[0]
            raise MetricUnavailable(f"VMAF: ffmpeg failed: {reason or 'no result'}")
        return float(json.loads(log.read_text())["pooled_metrics"]["vmaf"]["mean"])
