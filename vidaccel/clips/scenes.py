"""Procedural video scenes: caption grammar, renderer and adherence check.

A scene is one textured object that moves over a textured background, for example

    "a red striped circle moving right on a navy dotted background"

together with a smaller distractor that the caption does not name. Object colours are bright and
background colours dark, and a texture is two brightness levels of one hue, so the colour of every
pixel can be read back from a video without a learned model: `adherence` does that.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

# Hues at full brightness. Object pixels keep at least 0.62 of it, background pixels at most 0.42.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.12, 0.12),
    "yellow": (1.0, 0.92, 0.1),
    "green": (0.15, 1.0, 0.2),
    "cyan": (0.1, 0.95, 1.0),
    "blue": (0.2, 0.35, 1.0),
    "magenta": (1.0, 0.15, 0.9),
    "white": (1.0, 1.0, 1.0),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "navy": (0.15, 0.25, 1.0),
    "maroon": (1.0, 0.12, 0.18),
    "forest": (0.15, 1.0, 0.25),
    "purple": (0.75, 0.15, 1.0),
    "teal": (0.1, 0.95, 1.0),
    "charcoal": (1.0, 1.0, 1.0),
}
TEXTURES = ("striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {  # (rows, columns) per unit of travel
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}

OBJECT_LEVELS = (0.62, 1.0)
BACKGROUND_LEVELS = (0.16, 0.42)
FOREGROUND_THRESHOLD = 0.52  # of a pixel's largest channel, between the two ranges above
TEXTURE_PERIOD = 10.0  # pixels, at every frame size
# Outlines, in reaches: half the side of a square; the base of a triangle below its centre, and how
# much steeper than a diagonal its sides are, which meet one reach above.
_SQUARE, _BASE, _SLOPE = 0.86, 0.8, 1.8
# Shape -> area of its outline over the square of its reach, and how far its centroid lies below
# its centre, in reaches.
_AREAS = {
    "circle": (np.pi, 0.0),
    "square": (4 * _SQUARE**2, 0.0),
    "triangle": ((1 + _BASE) ** 2 / _SLOPE, 2 * (1 + _BASE) / 3 - 1),
}
MIN_SIZE, MIN_FRAMES = 48, 9
MIN_TRAVEL = 0.08  # of the frame side, for a motion to count
HELD_OUT_ONE_IN = 10

Array = NDArray[np.float32]

_CAPTION = re.compile(
    rf"a (?P<color>{'|'.join(COLORS)}) (?P<texture>{'|'.join(TEXTURES)}) "
    rf"(?P<shape>{'|'.join(SHAPES)}) moving (?P<motion>{'|'.join(MOTIONS)}) "
    rf"on a (?P<background>{'|'.join(BACKGROUNDS)}) "
    rf"(?P<background_texture>{'|'.join(TEXTURES)}) background"
)


@dataclass(frozen=True)
class Scene:
    """The parts of a caption. Every field is a word of the matching vocabulary above."""

    color: str
    texture: str
    shape: str
    motion: str
    background: str
    background_texture: str

    @property
    def caption(self) -> str:
        """The scene in words."""
        return (
            f"a {self.color} {self.texture} {self.shape} moving {self.motion} "
            f"on a {self.background} {self.background_texture} background"
        )


@dataclass(frozen=True)
class Adherence:
    """The four measurable parts of a caption; true for those that a video follows."""

    color: bool
    background: bool
    motion: bool
    shape: bool


def parse_caption(caption: str) -> Scene:
    """Return the scene a caption describes (case and outer spaces are ignored).

    Raises:
        ValueError: the caption is outside the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"{caption!r} is not a scene caption; write it like {next(all_scenes()).caption!r} "
            f"with colors {list(COLORS)}, textures {list(TEXTURES)}, shapes {list(SHAPES)}, "
            f"motions {list(MOTIONS)} and backgrounds {list(BACKGROUNDS)}"
        )
    return Scene(**match.groupdict())


def all_scenes() -> Iterator[Scene]:
    """Yield every scene of the grammar, in a fixed order."""
    words = (COLORS, TEXTURES, SHAPES, MOTIONS, BACKGROUNDS, TEXTURES)
    return (Scene(*choice) for choice in product(*words))


def is_held_out(caption: str) -> bool:
    """Tell whether a caption is kept out of training (one in ten, by its checksum)."""
    return zlib.crc32(caption.encode()) % HELD_OUT_ONE_IN == 0


def render(
    scene: Scene,
    rng: np.random.Generator,
    *,
    frames: int = 17,
    height: int = 96,
    width: int = 96,
) -> Array:
    """Draw one clip of a scene.

    The path, size, texture phases and the distractor come from `rng`, so the same generator state
    gives the same clip.

    Returns:
        float32 [frames, height, width, 3] in 0..1.

    Raises:
        ValueError: fewer than 9 frames or a side below 48 pixels.
    """
    _check_size(frames, height, width)
    canvas = _paint(
        _texture(scene.background_texture, rng, *_grid(height, width)),
        BACKGROUNDS[scene.background],
        BACKGROUND_LEVELS,
    )
    video = np.repeat(canvas[None], frames, axis=0)
    distractor = Scene(
        color=str(rng.choice([color for color in COLORS if color != scene.color])),
        texture=str(rng.choice(TEXTURES)),
        shape=str(rng.choice(SHAPES)),
        motion=str(rng.choice(list(MOTIONS))),
        background=scene.background,
        background_texture=scene.background_texture,
    )
    _draw(video, distractor, rng, radius=rng.uniform(0.08, 0.11))
    _draw(video, scene, rng, radius=rng.uniform(0.18, 0.22))
    return video


def adherence(video: NDArray[np.uint8] | NDArray[np.floating], caption: str) -> Adherence:
    """Compare a video with the caption it was made from.

    The colour is that of most bright pixels, the background that of most dark ones, and the motion
    is the main direction of the centroid of the main object between the first and last quarter.
    The shape is the one whose outline, as large as the object and in its place, overlaps it most.

    Args:
        video: [frames, height, width, 3], uint8 or floating in 0..1.
        caption: a caption of the grammar.

    Raises:
        ValueError: caption outside the grammar, or a video of another shape, dtype or smaller than
            9 frames of 48x48.
    """
    scene = parse_caption(caption)
    pixels = _to_float(video)
    value, bright, colors = _objects(pixels)
    counts = np.bincount(colors[bright], minlength=len(COLORS))
    backgrounds = _nearest(pixels, value, BACKGROUNDS)[~bright]
    weights = np.bincount(backgrounds, weights=value[~bright], minlength=len(BACKGROUNDS))
    color = int(counts.argmax())
    mask = bright & (colors == color)
    return Adherence(
        color=bool(counts[color]) and list(COLORS)[color] == scene.color,
        background=bool(weights.max() > 0)
        and list(BACKGROUNDS)[int(weights.argmax())] == scene.background,
        motion=_direction(mask) == scene.motion,
        shape=_shape(mask) == scene.shape,
    )


def object_mask(video: NDArray[np.uint8] | NDArray[np.floating], color: str) -> NDArray[np.bool_]:
    """Return which pixels of a clip show an object of a colour of the grammar.

    Args:
        video: [frames, height, width, 3], uint8 or floating in 0..1.

    Returns:
        bool [frames, height, width].

    Raises:
        ValueError: another colour, or a video that `adherence` does not take.
    """
    if color not in COLORS:
        raise ValueError(f"{color!r} is not a color of the grammar: {list(COLORS)}")
    _, bright, colors = _objects(_to_float(video))
    mask: NDArray[np.bool_] = bright & (colors == list(COLORS).index(color))
    return mask


def _check_size(frames: int, height: int, width: int) -> None:
    if frames < MIN_FRAMES or min(height, width) < MIN_SIZE:
        raise ValueError(
            f"a clip needs at least {MIN_FRAMES} frames of {MIN_SIZE}x{MIN_SIZE}, "
            f"got {frames} of {height}x{width}"
        )


def _to_float(video: NDArray[np.uint8] | NDArray[np.floating]) -> Array:
    """[frames, height, width, 3] of either accepted dtype -> float32 in 0..1."""
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a video is [frames, height, width, 3], got shape {video.shape}")
    _check_size(*video.shape[:3])
    if video.dtype == np.uint8:
        return video.astype(np.float32) / np.float32(255)
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"a video is uint8 or floating in 0..1, got {video.dtype}")
    if not np.isfinite(video).all() or video.min() < -1e-3 or video.max() > 1 + 1e-3:
        raise ValueError("a floating video has values in 0..1; scale it, or pass uint8")
    return video.astype(np.float32)


def _objects(pixels: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.intp]]:
    """Brightness of each pixel, whether it is an object's, and its nearest of COLORS. [..., 3]"""
    value: Array = pixels.max(axis=-1)
    return value, value > FOREGROUND_THRESHOLD, _nearest(pixels, value, COLORS)


def _nearest(
    pixels: Array, value: Array, palette: dict[str, tuple[float, float, float]]
) -> NDArray[np.intp]:
    """Index of the palette hue nearest to each pixel at full brightness. [..., 3] -> [...]"""
    hue = pixels / np.maximum(value, 1e-3)[..., None]
    reference = np.array(list(palette.values()), dtype=np.float32)
    # |a - b|^2 without the |a|^2 every candidate shares: one matrix product instead of a 5-D array.
    score = (reference**2).sum(axis=1) - 2 * hue @ reference.T
    nearest: NDArray[np.intp] = score.argmin(axis=-1)
    return nearest


def _direction(mask: NDArray[np.bool_]) -> str | None:
    """Main direction of a mask's centroid, or None when it does not travel. [F, H, W] -> word"""
    frames, height, width = mask.shape
    quarter = frames // 4
    first, last = _centroid(mask[:quarter]), _centroid(mask[-quarter:])
    travel = (last - first) / np.array([height, width])
    axis = int(np.abs(travel).argmax())
    if not np.abs(travel[axis]) >= MIN_TRAVEL:
        return None
    step = (int(np.sign(travel[axis])), 0) if axis == 0 else (0, int(np.sign(travel[axis])))
    return next(word for word, direction in MOTIONS.items() if direction == step)


def _shape(mask: NDArray[np.bool_]) -> str | None:
    """Shape of a mask's outline, or None when it is empty. [F, H, W] -> word"""
    overlaps = dict.fromkeys(SHAPES, 0.0)
    for frame in mask:
        area = int(frame.sum())
        if not area:
            continue
        rows, columns = _grid(*frame.shape)
        row, column = _centroid(frame[None]) + 0.5  # of pixel centres
        for shape, (of_square, below) in _AREAS.items():
            reach = np.sqrt(area / of_square)
            ideal = _distance(shape, rows - row + below * reach, columns - column, reach) < 0
            overlaps[shape] += (frame & ideal).sum() / (frame | ideal).sum()
    return max(overlaps, key=lambda shape: overlaps[shape]) if any(overlaps.values()) else None


def _centroid(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean (row, column) of a [F, H, W] mask, nan when it is empty."""
    _, rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.full(2, np.nan)
    return np.array([rows.mean(), columns.mean()])


def _grid(height: int, width: int) -> tuple[Array, Array]:
    """Pixel centres: rows [height, 1] and columns [1, width]."""
    rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None] + 0.5
    return rows, columns


def _texture(kind: str, rng: np.random.Generator, rows: Array, columns: Array) -> Array:
    """Pattern in 0..1 at a random phase. Broadcast shape of rows and columns."""
    phase = rng.uniform(0, 2 * np.pi, size=2)
    slant = float(rng.choice([-1.0, 1.0]))
    scale = 2 * np.pi / TEXTURE_PERIOD
    across, down = np.sin(columns * scale + phase[0]), np.sin(rows * scale + phase[1])
    if kind == "striped":
        wave = 1.6 * np.sin((rows + slant * columns) * scale / np.sqrt(2) + phase[0])
    elif kind == "dotted":
        wave = 1.6 * (across + down - 0.5)
    else:
        wave = 2.5 * across * down
    return np.asarray(0.5 + 0.5 * np.tanh(wave), dtype=np.float32)


def _paint(texture: Array, hue: tuple[float, float, float], levels: tuple[float, float]) -> Array:
    """Colour a 0..1 pattern between two levels of one hue. [..., H, W] -> [..., H, W, 3]"""
    low, high = levels
    brightness: Array = low + (high - low) * texture
    return brightness[..., None] * np.asarray(hue, dtype=np.float32)


def _draw(video: Array, scene: Scene, rng: np.random.Generator, *, radius: float) -> None:
    """Draw a moving object over `video` [F, H, W, 3] in place; `radius` is of the shorter side."""
    frames, height, width, _ = video.shape
    size = np.array([height, width], dtype=np.float64)
    reach = radius * min(height, width)
    travel = rng.uniform(0.35, 0.45) * np.array(MOTIONS[scene.motion]) * size
    low, high = reach + np.maximum(-travel, 0), size - reach - np.maximum(travel, 0)
    start = rng.uniform(low, high)
    path = start + np.linspace(0, 1, frames)[:, None] * travel  # [F, 2]
    rows, columns = _grid(height, width)
    # Coordinates relative to the object, [F, H, 1] and [F, 1, W]: its texture moves along with it.
    rows = (rows - path[:, 0, None, None]).astype(np.float32)
    columns = (columns - path[:, 1, None, None]).astype(np.float32)
    coverage = np.clip(0.5 - _distance(scene.shape, rows, columns, reach), 0, 1)[..., None]
    texture = _texture(scene.texture, rng, rows, columns)
    video *= 1 - coverage
    video += coverage * _paint(texture, COLORS[scene.color], OBJECT_LEVELS)


def _distance(shape: str, rows: Array, columns: Array, reach: float) -> Array:
    """Signed distance in pixels to a shape's outline (negative inside)."""
    if shape == "circle":
        distance = np.hypot(rows, columns) - reach
    elif shape == "square":
        distance = np.maximum(np.abs(rows), np.abs(columns)) - _SQUARE * reach
    else:
        # Isosceles, apex up.
        side = (_SLOPE * np.abs(columns) - rows - reach) / np.hypot(_SLOPE, 1)
        distance = np.maximum(side, rows - _BASE * reach)
    return np.asarray(distance, dtype=np.float32)
