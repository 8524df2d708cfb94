"""scenes.py: the adherence check must accept what a caption describes and little else."""

import dataclasses

import numpy as np
import pytest

from vidaccel.clips import scenes

SCENES = list(scenes.all_scenes())
SIZES = [(9, 48, 48), (9, 64, 96), (17, 96, 96)]


def draw(count: int, seed: int, frames: int = 9, height: int = 64, width: int = 64):
    rng = np.random.default_rng(seed)
    picked = [SCENES[i] for i in rng.integers(len(SCENES), size=count)]
    size = {"frames": frames, "height": height, "width": width}
    return picked, [scenes.render(scene, rng, **size) for scene in picked]


def scores(videos, captions) -> np.ndarray:
    checked = [scenes.adherence(v, c) for v, c in zip(videos, captions, strict=True)]
    return np.mean([dataclasses.astuple(c) for c in checked], axis=0)


def blur(video: np.ndarray) -> np.ndarray:
    """3x3 box filter with wrap-around, plus a contrast loss: harsher than a good autoencoder."""
    shifts = [np.roll(video, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return 0.02 + 0.96 * np.mean(shifts, axis=0)


@pytest.mark.parametrize("size", SIZES)
def test_rendered_clips_follow_their_caption(size):
    picked, videos = draw(60, 1, *size)
    assert (scores(videos, [s.caption for s in picked]) >= 0.97).all()


def test_blur_and_uint8_do_not_change_the_verdict():
    picked, videos = draw(60, 2)
    captions = [s.caption for s in picked]
    assert (scores([blur(v) for v in videos], captions) >= 0.97).all()
    assert (scores([(v * 255).astype(np.uint8) for v in videos], captions) >= 0.97).all()


def test_mismatched_captions_score_near_chance():
    _, videos = draw(200, 3)
    others, _ = draw(200, 4)
    words = (scenes.COLORS, scenes.BACKGROUNDS, scenes.MOTIONS, scenes.SHAPES)
    chance = 1 / np.array(list(map(len, words)))
    assert (np.abs(scores(videos, [s.caption for s in others]) - chance) < 0.09).all()


def test_each_part_is_judged_alone():
    scene = scenes.Scene("red", "dotted", "square", "up", "navy", "striped")
    video = scenes.render(scene, np.random.default_rng(0))
    others = {"color": "cyan", "background": "teal", "motion": "left", "shape": "circle"}
    for part, other in others.items():
        verdict = scenes.adherence(video, dataclasses.replace(scene, **{part: other}).caption)
        expected = dict.fromkeys(others, True) | {part: False}
        assert dataclasses.asdict(verdict) == expected


def test_still_and_empty_videos_follow_nothing_they_do_not_show():
    caption = SCENES[0].caption
    still = np.repeat(draw(1, 5)[1][0][:1], 9, axis=0)
    assert not scenes.adherence(still, caption).motion
    black = scenes.adherence(np.zeros((9, 48, 48, 3), np.uint8), caption)
    assert black == scenes.Adherence(color=False, background=False, motion=False, shape=False)


def test_a_triangle_points_up():
    scene = scenes.Scene("red", "dotted", "triangle", "up", "navy", "striped")
    video = scenes.render(scene, np.random.default_rng(0))
    upside_down = video[:, ::-1]
    assert not scenes.adherence(upside_down, scene.caption).shape
    assert scenes.adherence(video[:, :, ::-1], scene.caption).shape


@pytest.mark.parametrize("as_bytes", [False, True])
def test_the_mask_of_an_object_is_where_it_was_drawn(as_bytes):
    scene = scenes.Scene("red", "dotted", "square", "up", "navy", "striped")
    video = scenes.render(scene, np.random.default_rng(0))
    mask = scenes.object_mask((video * 255).astype(np.uint8) if as_bytes else video, "red")
    assert mask.shape == video.shape[:3] and mask.any((1, 2)).all()
    assert (video[mask].argmax(axis=1) == 0).all()
    # A square of 0.36 to 0.44 sides times 0.86, where no smaller object hides it.
    assert 0.08 < mask.mean() < 0.15


def test_the_mask_of_an_unknown_color_is_refused():
    with pytest.raises(ValueError, match="'pink' is not a color of the grammar"):
        scenes.object_mask(np.zeros((9, 48, 48, 3), np.uint8), "pink")


def test_same_generator_state_gives_the_same_clip():
    first, again, other = (draw(1, seed)[1][0] for seed in (6, 6, 7))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1


def test_captions_parse_back_to_their_scene():
    assert len({s.caption for s in SCENES}) == len(SCENES)
    for scene in SCENES[::97]:
        assert scenes.parse_caption(scene.caption) == scene
        assert scenes.parse_caption(f" {scene.caption.upper()} ") == scene


def test_a_tenth_of_the_captions_is_held_out():
    share = np.mean([scenes.is_held_out(s.caption) for s in SCENES])
    assert 0.08 < share < 0.12


def test_captions_outside_the_grammar_are_refused():
    video = draw(1, 8)[1][0]
    for caption in ("", "a cat", SCENES[0].caption + "s", SCENES[0].caption.replace("red", "navy")):
        with pytest.raises(ValueError, match="not a scene caption"):
            scenes.adherence(video, caption)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((9, 48, 48), np.uint8), r"\[frames, height, width, 3\]"),
        (np.zeros((8, 48, 48, 3), np.uint8), "at least 9 frames"),
        (np.zeros((9, 32, 48, 3), np.uint8), "48x48"),
        (np.zeros((9, 48, 48, 3), np.int64), "uint8 or floating"),
        (np.full((9, 48, 48, 3), 255.0), "0..1"),
        (np.full((9, 48, 48, 3), np.nan), "0..1"),
    ],
)
def test_unusable_videos_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        scenes.adherence(video, SCENES[0].caption)


def test_too_small_clips_are_not_rendered():
    with pytest.raises(ValueError, match="48x48"):
        scenes.render(SCENES[0], np.random.default_rng(0), frames=9, height=32, width=64)
