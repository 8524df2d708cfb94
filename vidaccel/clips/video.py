"""Clips in one form, to and from files, and laid out as pictures to compare.

A clip is an array `[F, H, W, 3]` of uint8: frames, rows, columns, red-green-blue. `as_uint8` makes
one from whatever a Diffusers pipeline returns; every other function here takes the same inputs.
Files are read and written through the ffmpeg program that the package imageio-ffmpeg brings.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vidaccel.errors import VideoError

Clip = NDArray[np.uint8]

CRF = 10  # of 0 (lossless) to 51; below about 17 the loss cannot be seen
BACKGROUND = 20  # grey level of the canvas, dark enough for frames to stand out on any page
TEXT = (236, 238, 242)
EXACT = "flags=accurate_rnd+full_chroma_int"  # ffmpeg's default conversion costs some 7 dB
SMALLEST_TEXT = 11  # pixels; below this a label is cut, not shrunk


def as_uint8(frames: Any) -> Clip:
    """Return one clip as uint8 `[F, H, W, 3]`.

    `frames` is what a Diffusers pipeline gives for one prompt: a list of PIL images, an array
    `[F, H, W, 3]`, or a torch tensor `[F, 3, H, W]` or `[F, H, W, 3]`. Floats are in 0..1. An
    input that has the final form already comes back uncopied.

    Raises VideoError for another shape or type, and for floats that are NaN or outside 0..1.
    """
    sequence = isinstance(frames, list | tuple)
    try:
        array = np.stack([_array(frame) for frame in frames]) if sequence else _array(frames)
    except (TypeError, ValueError) as error:
        raise VideoError(
            f"expected frames of one size as a clip, found something else: {error}"
        ) from error
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3 or array.size == 0:
        hint = "; for a batch, pass one clip of it: frames[0]" if array.ndim == 5 else ""
        raise VideoError(
            f"expected a clip [F, H, W, 3] with at least one pixel, found {list(array.shape)}{hint}"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise VideoError(f"expected a clip of uint8 or of floats in 0..1, found {array.dtype}")
    low, high = float(array.min()), float(array.max())
    # Half a grey level of slack is for the rounding of 16-bit floats. A NaN fails as well.
    if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):
        raise VideoError(f"expected floats in 0..1, found a range of {low:.4g} to {high:.4g}")
    return np.clip(np.rint(array * np.float32(255)), 0, 255).astype(np.uint8)


def as_pair(reference: Any, clip: Any) -> tuple[Clip, Clip]:
    """Return two clips as `as_uint8` does; raises VideoError for two shapes."""
    first, second = as_uint8(reference), as_uint8(clip)
    if first.shape != second.shape:
        raise VideoError(
            f"expected a clip of the reference's shape {list(first.shape)}, "
            f"found {list(second.shape)}"
        )
    return first, second


def write_video(
    path: str | os.PathLike[str], frames: Any, fps: float = 16, *, comment: str = ""
) -> None:
    """Write a clip as H.264 in `path`, which ends in .mp4, at `fps` frames per second.

    The file is visually lossless and plays in browsers (yuv420p). That format needs even sizes, so
    an odd one grows by a copy of its last row or column. The file appears whole or not at all, and
    carries `comment` in its metadata, which `read_comment` gives back.

    Raises VideoError if the clip, `fps` or `path` is wrong, or ffmpeg is missing or fails.
    """
    target = _with_suffix(path, ".mp4")
    clip = as_uint8(frames)
    with _scratch(target) as temporary:
        _encode(temporary, clip, fps, comment)
        os.replace(temporary, target)


def read_video(path: str | os.PathLike[str]) -> tuple[Clip, float]:
    """Return all frames of a video file, `[F, H, W, 3]` uint8, and its frames per second.

    Raises VideoError if the file is missing, damaged or not a video, or ffmpeg is missing.
    """
    source = Path(path)
    if not source.is_file():
        raise VideoError(f"no video file at {source}")
    # PPM frames state their own size. -xerror turns a truncated stream into a failure.
    output = ["-vf", f"scale={EXACT}", "-f", "image2pipe", "-c:v", "ppm"]
    result = _ffmpeg("-xerror", "-i", str(source.absolute()), *output)
    header = re.match(rb"P6\s(\d+) (\d+)\s255\s", result.stdout)
    rate = re.search(rb"([\d.]+) fps", result.stderr)
    if result.returncode != 0 or header is None or rate is None:
        raise VideoError(f"{source} is damaged, cut short or not a video")
    width, height, start = int(header[1]), int(header[2]), header.end()
    stream = np.frombuffer(result.stdout, dtype=np.uint8)
    pixels = stream.reshape(-1, start + height * width * 3)[:, start:]
    return pixels.reshape(-1, height, width, 3), float(rate[1])


def read_comment(path: str | os.PathLike[str]) -> str:
    """Return the comment in the metadata of an .mp4 file; "" when it has none.

    Raises VideoError if the file is missing or not an .mp4 file, or ffmpeg is missing.
    """
    source = Path(path)
    if not source.is_file():
        raise VideoError(f"no video file at {source}")
    # With its format named, a file that claims to be a playlist of other files is not followed.
    result = _ffmpeg("-v", "error", "-f", "mp4", "-i", str(source.absolute()), "-f", "ffmetadata")
    if result.returncode != 0:
        raise VideoError(f"{source.name} is damaged or no .mp4 file")
    # Within a value, ffmpeg puts a backslash before = ; # \\ and the end of a line.
    metadata = result.stdout.decode(errors="replace")
    match = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", metadata, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL) if match else ""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before a long generation that `write_video(path, ...)` will work.

    Makes the parent folder if need be and encodes one black frame there, then removes it.

    Raises VideoError that says what stands in the way.
    """
    target = _with_suffix(path, ".mp4")
    with _scratch(target) as temporary:
        _encode(temporary, np.zeros((1, 16, 16, 3), np.uint8), fps=16)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture as red, green and blue, turned as its camera says.

    Raises VideoError if the file is missing, damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) or image).convert("RGB")
    except FileNotFoundError as error:
        raise VideoError(f"no picture at {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is damaged or no picture") from error


def write_image(path: str | os.PathLike[str], image: Any) -> None:
    """Write one picture `[H, W, 3]`, uint8 or floats in 0..1, in `path`, which ends in .png.

    The file appears whole or not at all. Raises VideoError if the picture or `path` is wrong.
    """
    target = _with_suffix(path, ".png")
    pixels = as_uint8([image])[0]
    with _scratch(target) as temporary:
        Image.fromarray(pixels).save(temporary, optimize=True)
        os.replace(temporary, target)


def side_by_side(clips: Mapping[str, Any]) -> Clip:
    """Return one clip that shows all clips beside each other, each under its label.

    Small clips are enlarged to 256 rows or more, by a whole factor so that pixels stay sharp.

    Raises VideoError if there is no clip or if their numbers of frames differ.
    """
    shown = {label: _resize(clip, at_least=256) for label, clip in _aligned(clips, axes=1).items()}
    rows = max(clip.shape[1] for clip in shown.values())
    text = max(20, rows // 24)
    panels = []
    for label, clip in shown.items():
        bar = _label(label, clip.shape[2], text, centred=True)
        bars = np.broadcast_to(bar, (len(clip), *bar.shape))
        below = [(0, 0), (0, rows - clip.shape[1]), (0, 0), (0, 0)]
        panels.append(np.concatenate([bars, np.pad(clip, below, constant_values=BACKGROUND)], 1))
    return _join(panels, axis=-2, gap=max(4, rows // 64))


def contact_sheet(
    clips: Mapping[str, Any], columns: int = 6, *, difference: bool = True, amplify: int = 4
) -> Clip:
    """Return one picture `[H, W, 3]`: a labelled row per clip, of `columns` evenly spaced frames.

    With `difference`, a row for each clip after the first shows how far, times `amplify`, its
    pixels are from those of the first clip.

    Raises VideoError if there is no clip or if their shapes differ.
    """
    arrays = _aligned(clips, axes=4)
    reference = next(iter(arrays.values()))
    count = min(max(columns, 1), len(reference))
    chosen = np.linspace(0, len(reference) - 1, count).round().astype(int)
    rows = [(label, clip[chosen]) for label, clip in arrays.items()]
    if difference:
        first = rows[0][1].astype(np.int32)
        rows += [
            (f"{label}: difference x{amplify}", (np.abs(clip - first) * amplify).clip(0, 255))
            for label, clip in rows[1:]
        ]
    parts = []
    for label, frames in rows:
        strip = _join([*_resize(frames.astype(np.uint8), 160, 320)], axis=-2, gap=4)
        parts.append(np.concatenate([_label(label, strip.shape[1], 20), strip]))
    margin = [(4, 16), (16, 16), (0, 0)]
    return np.pad(_join(parts, axis=-3, gap=8), margin, constant_values=BACKGROUND)


def _array(value: Any) -> NDArray[Any]:
    """Return a tensor, picture or array as a NumPy array, without importing torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return np.asarray(value.float() if value.is_floating_point() else value)
    return np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)


def _with_suffix(path: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path of a file; raises VideoError for another suffix."""
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise VideoError(f"expected a file name that ends in {suffix}, found {target}")
    return target


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Give a new file in the folder of `target`, to be renamed to it; it is gone at the end."""
    temporary = target.absolute().with_name(f".vidaccel-{uuid4().hex}{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
    except OSError as error:
        raise VideoError(f"cannot write {target} ({error}); choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _encode(path: Path, clip: Clip, fps: float, comment: str = "") -> None:
    """Write H.264 with ffmpeg; raises VideoError when it fails."""
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"expected fps above 0, found {fps}")
    odd = [(0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)]
    clip = np.ascontiguousarray(np.pad(clip, odd, mode="edge"))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clip.shape[2]}x{clip.shape[1]}"]
    source += ["-r", str(Fraction(fps).limit_denominator(1001)), "-i", "-"]
    # Without a tag, players guess the colour matrix from the frame size, and colours shift.
    convert = f"scale=out_color_matrix=bt709:out_range=tv:{EXACT}"
    colour = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
    codec = ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv420p", "-color_range", "tv"]
    options = ["-vf", convert, *codec, *colour, "-movflags", "+faststart", "-y"]
    options += ["-metadata", f"comment={comment}"] if comment else []
    result = _ffmpeg("-v", "error", *source, *options, output=str(path), data=clip.reshape(-1).data)
    if result.returncode != 0:
        reason = result.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise VideoError(f"ffmpeg could not encode the clip {list(clip.shape)}: {reason}")


def _ffmpeg(
    *arguments: str, output: str = "-", data: memoryview | bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg to its end; raises VideoError when there is none."""
    advice = "`pip install imageio-ffmpeg`, or set IMAGEIO_FFMPEG_EXE to an ffmpeg program"
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        program = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise VideoError(f"video files need ffmpeg: {advice}") from error
    if shutil.which(program) is None:
        raise VideoError(f"video files need ffmpeg, and {program} is not a program: {advice}")
    command = [program, "-hide_banner", "-nostats", *arguments, output]
    return subprocess.run(command, input=data, capture_output=True, check=False)


def _aligned(clips: Mapping[str, Any], axes: int) -> dict[str, Clip]:
    """Return the clips as arrays; raises VideoError unless their first `axes` sizes are equal."""
    arrays = {label: as_uint8(clip) for label, clip in clips.items()}
    if len({clip.shape[:axes] for clip in arrays.values()}) != 1:
        found = ", ".join(f"{label} {list(clip.shape)}" for label, clip in arrays.items())
        wanted = "numbers of frames" if axes == 1 else "shapes"
        raise VideoError(f"expected clips of equal {wanted}, found {found or 'no clip'}")
    return arrays


def _resize(clip: Clip, at_least: int, at_most: int | None = None) -> Clip:
    """Return the clip with its number of rows between two limits, in its own proportions."""
    _, height, width, _ = clip.shape
    if at_most is not None and height > at_most:
        size = (max(1, round(width * at_most / height)), at_most)
        images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in clip]
        return np.stack([np.asarray(image) for image in images])
    factor = max(1, math.ceil(at_least / height))
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def _join(parts: list[Clip], axis: int, gap: int) -> Clip:
    """Return the parts along one axis, with a gap between them."""
    shape = list(parts[0].shape)
    shape[axis] = gap
    gutter = np.full(shape, BACKGROUND, np.uint8)
    return np.concatenate([piece for part in parts for piece in (gutter, part)][1:], axis)


def _label(text: str, width: int, size: int, centred: bool = False) -> Clip:
    """Draw a bar `[1.8 size, width, 3]` with `text` in letters of `size` pixels, or less to fit."""
    bar = Image.new("RGB", (width, round(1.8 * size)), (BACKGROUND,) * 3)
    line, room = " ".join(str(text).split()), width - 4
    while size > SMALLEST_TEXT and ImageFont.load_default(size).getlength(line) > room:
        size -= 1
    font = ImageFont.load_default(size)
    if font.getlength(line) > room:
        while line and font.getlength(line + "...") > room:
            line = line[:-1]
        line += "..."
    x, anchor = (width / 2, "mm") if centred else (0, "lm")
    ImageDraw.Draw(bar).text((x, bar.height / 2), line, TEXT, font, anchor=anchor)
    return np.asarray(bar)
