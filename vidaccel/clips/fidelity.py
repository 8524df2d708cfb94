"""Fidelity of one clip to another, frame by frame, and files that show it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.clips import metrics, video
from vidaccel.errors import MetricUnavailable, VideoError

# Metric -> how its values are printed.
FORMS = {"psnr": "{:.1f} dB", "ssim": "{:.3f}", "lpips": "{:.3f}"}


def fidelity(reference: Any, clip: Any) -> dict[str, Any]:
    """Measure how close a clip is to its reference, as a whole and frame by frame.

    Args:
        reference, clip: two clips of one shape, as `vidaccel.clips.video.as_uint8` takes them.

    Returns:
        "mean" (metric -> value of the clip, as `vidaccel.clips.metrics.summary` gives it), "worst"
        (metric -> {"frame", "value"}), "per_frame" (metric -> one value per frame), "flicker" (grey
        levels of the reference and of the clip) and "unavailable" (metric -> why). The metrics are
        "psnr", "ssim" and "lpips"; one that cannot be computed here is in none but the last.

    Raises:
        VideoError: the clips differ in shape.
    """
    first, second = video.as_uint8(reference), video.as_uint8(clip)
    mean: dict[str, float] = {"psnr": metrics.psnr(first, second)}  # raises for different shapes
    per_frame: dict[str, list[float]] = {}
    unavailable: dict[str, str] = {}
    for name in FORMS:
        try:
            per_frame[name] = _per_frame(name, first, second)
        except MetricUnavailable as error:
            unavailable[name] = str(error)
    mean |= {name: float(np.mean(per_frame[name])) for name in per_frame if name != "psnr"}
    worst = {}
    for name, values in per_frame.items():
        frame, value = metrics.worst(name, values)
        worst[name] = {"frame": frame, "value": value}
    return {
        "mean": mean,
        "worst": worst,
        "per_frame": per_frame,
        "flicker": [metrics.flicker(first), metrics.flicker(second)],
        "unavailable": unavailable,
    }


def _per_frame(name: str, first: video.Clip, second: video.Clip) -> list[float]:
    """Return the values of the metric of that name, one per frame."""
    if name == "ssim" and min(first.shape[1:3]) < 3:
        raise MetricUnavailable("SSIM needs frames of 3 pixels a side")
    model = _lpips_model() if name == "lpips" else None
    more = {} if model is None else {"model": model}
    metric = getattr(metrics, name)
    return [metric(first[i : i + 1], second[i : i + 1], **more) for i in range(len(first))]


def _lpips_model() -> Any:
    """Return the LPIPS network; raises MetricUnavailable without one."""
    model, reason = _lpips()
    if model is None:
        raise MetricUnavailable(reason)
    return model


@cache
def _lpips() -> tuple[Any, str]:
    """Return the network, or None and why there is none.

    Kept for the process, since finding out can take seconds.
    """
    try:
        return metrics.load_lpips(), ""
    except MetricUnavailable as error:
        return None, str(error)


def compare_files(
    reference: Path, clip: Path, out: Path, *, labels: tuple[str, str] | None = None
) -> tuple[dict[str, Any], list[Path]]:
    """Compare two video files and draw the difference.

    Args:
        reference, clip: the files; same size and number of frames.
        out: file of the two clips beside each other, .mp4; a contact sheet goes beside it.
        labels: text over each clip; the names of the files if left out.

    Returns:
        The result of `fidelity` with "frames", "size" (width, height) and "fps" of both, and the
        files that were written.

    Raises:
        VideoError: a file is missing, damaged or no video, they differ in shape, or `out` cannot
            be written.
    """
    video.check_writable(out)
    (first, fps), (second, other_fps) = video.read_video(reference), video.read_video(clip)
    if first.shape != second.shape:
        described = (
            f"{path} with {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"
            for path, frames in ((reference, first), (clip, second))
        )
        raise VideoError(
            f"expected two clips of one size and length, found {' and '.join(described)}"
        )
    result = fidelity(first, second)
    a, b = labels or (reference.name, clip.name)
    clips = {a: first, (b if b != a else f"{b} (second)"): second}
    video.write_video(out, video.side_by_side(clips), fps)
    sheet = sheet_of(out)
    video.write_image(sheet, video.contact_sheet(clips))
    size = [first.shape[2], first.shape[1]]
    return {"frames": len(first), "size": size, "fps": [fps, other_fps]} | result, [out, sheet]


def sheet_of(out: Path) -> Path:
    """Return the file of the contact sheet that goes beside a clip."""
    return out.with_name(f"{out.stem}-contact-sheet.png")


def fidelity_table(result: dict[str, Any]) -> str:
    """Return the result of `fidelity` for people: a row per metric."""
    rows = [("", "whole clip", "worst frame", "")]
    for name in FORMS:
        if name in result["unavailable"]:
            rows.append((name.upper(), "not available", "", ""))
            continue
        worst = result["worst"][name]
        mean, lowest = (in_words(name, value) for value in (result["mean"][name], worst["value"]))
        rows.append((name.upper(), mean, lowest, f"frame {worst['frame']}"))
    first, second = result["flicker"]
    rows.append(("flicker", f"{second - first:+.3f}", "", f"{first:.3f} to {second:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}  {d}".rstrip()
        for a, b, c, d in rows
    ]
    return "\n".join([*lines, *(f"{n.upper()}: {why}" for n, why in result["unavailable"].items())])


def in_words(name: str, value: float | None) -> str:
    """Return a value of a metric for people; JSON has null for the PSNR of equal clips."""
    if name == "psnr" and (value is None or not math.isfinite(value)):
        return "identical"
    return "-" if value is None else FORMS[name].format(value)
