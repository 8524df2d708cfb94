"""Fidelity of one clip to another, frame by frame, and files that show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.clips import metrics, video
from vidaccel.clips.cvvdp import cvvdp
from vidaccel.clips.vmaf import vmaf_of_frames
from vidaccel.errors import MetricUnavailable, VideoError

# The value of a whole clip, and one per frame.
Values = tuple[float, list[float]]


@dataclass(frozen=True)
class Measure:
    """A measure of fidelity.

    Attributes:
        title: its name for people.
        form: how its values are printed.
        measure: takes the reference, the clip, the frames per second, and the LPIPS network or
            None for the usual one; raises MetricUnavailable.
    """

    title: str
    form: str
    measure: Callable[[video.Clip, video.Clip, float, Any], Values]


def _psnr(first: video.Clip, second: video.Clip, *_: Any) -> Values:
    return metrics.psnr(first, second), _each_frame(metrics.psnr, first, second)


def _ssim(first: video.Clip, second: video.Clip, *_: Any) -> Values:
    if min(first.shape[1:3]) < 3:
        raise MetricUnavailable("it needs frames of 3 pixels a side")
    return _with_mean(_each_frame(metrics.ssim, first, second))


def _lpips(first: video.Clip, second: video.Clip, _: float, model: Any) -> Values:
    known = _usual_lpips() if model is None else model
    if isinstance(known, str):
        raise MetricUnavailable(known)
    return _with_mean(_each_frame(metrics.lpips, first, second, model=known))


def _vmaf(first: video.Clip, second: video.Clip, *_: Any) -> Values:
    return _with_mean(vmaf_of_frames(first, second))


def _cvvdp(first: video.Clip, second: video.Clip, fps: float, _: Any) -> Values:
    return cvvdp(first, second, fps=fps)


MEASURES = {
    "psnr": Measure("PSNR", "{:.1f} dB", _psnr),
    "ssim": Measure("SSIM", "{:.3f}", _ssim),
    "lpips": Measure("LPIPS", "{:.3f}", _lpips),
    "vmaf": Measure("VMAF", "{:.1f}", _vmaf),
    "cvvdp": Measure("ColorVideoVDP", "{:.2f} JOD", _cvvdp),
}


def fidelity(
    reference: Any,
    clip: Any,
    *,
    fps: float = 16.0,
    lpips_model: Any = None,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Measure how close a clip is to its reference, as a whole and frame by frame.

    README.md beside this module tells what each measure is good for.

    Args:
        reference, clip: two clips of one shape, as `vidaccel.clips.video.as_uint8` takes them.
        fps: frames per second at which they are shown.
        lpips_model: the network of `vidaccel.clips.metrics.load_lpips`; None for the usual one.
        leave_out: measures that are not wanted.

    Returns:
        "mean" (measure -> value of the clip), "worst" (measure -> {"frame", "value"}), "per_frame"
        (measure -> one value per frame), "flicker" (grey levels of the reference and of the clip)
        and "unavailable" (measure -> why). The measures are those of `MEASURES`; one that cannot
        be computed here, whatever it raises, is in none but the last: the clips are worth more
        than a number about them.

    Raises:
        VideoError: the clips differ in shape.
    """
    first, second = video.as_pair(reference, clip)
    mean: dict[str, float] = {}
    per_frame: dict[str, list[float]] = {}
    unavailable: dict[str, str] = {}
    for name, measure in MEASURES.items():
        if name in leave_out:
            continue
        try:
            mean[name], per_frame[name] = measure.measure(first, second, fps, lpips_model)
        except MetricUnavailable as error:
            unavailable[name] = str(error)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            unavailable[name] = f"it failed ({type(error).__name__}: {reason})"
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


def summary(reference: Any, clip: Any, **options: Any) -> dict[str, Any]:
    """Return the measures of `fidelity`, which takes the same, in one level and without the frames.

    Returns:
        Each measure -> value of the clip; None where it cannot be computed, and "unavailable" maps
        it to the reason. "flicker" is that of the clip less that of the reference, in grey levels:
        above 0 it flickers more; "flicker_of" has both. "worst" is as `fidelity` gives it.
    """
    found = fidelity(reference, clip, **options)
    before, after = found["flicker"]
    return {
        **{name: found["mean"].get(name) for name in MEASURES},
        "flicker": after - before,
        "flicker_of": found["flicker"],
        "worst": found["worst"],
        "unavailable": found["unavailable"],
    }


def _each_frame(
    metric: Callable[..., float], first: video.Clip, second: video.Clip, **options: Any
) -> list[float]:
    return [metric(first[i : i + 1], second[i : i + 1], **options) for i in range(len(first))]


def _with_mean(values: list[float]) -> Values:
    return float(np.mean(values)), values


@cache
def _usual_lpips() -> Any:
    """Return the LPIPS network, or why there is none.

    Kept for the process, since finding out can take seconds.
    """
    try:
        return metrics.load_lpips()
    except MetricUnavailable as error:
        return str(error)


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
    result = fidelity(first, second, fps=fps)
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
    """Return the result of `fidelity` for people: a row per measure."""
    rows = [("", "whole clip", "worst frame", "")]
    for name, measure in MEASURES.items():
        if name in result["unavailable"]:
            rows.append((measure.title, "not available", "", ""))
            continue
        worst = result["worst"][name]
        mean, lowest = (in_words(name, value) for value in (result["mean"][name], worst["value"]))
        rows.append((measure.title, mean, lowest, f"frame {worst['frame']}"))
    first, second = result["flicker"]
    rows.append(("flicker", f"{second - first:+.3f}", "", f"{first:.3f} to {second:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}  {d}".rstrip()
        for a, b, c, d in rows
    ]
    return "\n".join([*lines, *why_unavailable(result["unavailable"])])


def why_unavailable(unavailable: dict[str, str]) -> list[str]:
    """Return a line for each measure that could not be computed: its name, and why."""
    return [f"{MEASURES[name].title} is not available: {why}" for name, why in unavailable.items()]


def in_words(name: str, value: float | None) -> str:
    """Return a value of a metric for people; JSON has null for the PSNR of equal clips."""
    if name == "psnr" and (value is None or not math.isfinite(value)):
        return "identical"
    return "-" if value is None else MEASURES[name].form.format(value)
