"""What tokens become in the output of a head, found out without knowing its layout."""

import pytest
import torch
from torch import nn

from vidaccel.learning.token_slots import NotLearnable, TokenSlots

BATCH, GRID, WIDTH = 2, (2, 3, 4), 8
LENGTH = 24


class _Head:
    """A head that norms, projects to 2 channels of 2 x 2 pixels, and lays tokens out as pictures.

    Attributes:
        start: the stream at the first block, with some tokens of text before the video.
    """

    def __init__(self, text: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.start = torch.randn(BATCH, text + LENGTH, WIDTH, generator=generator)
        self.weight = torch.randn(WIDTH, 2 * 4, generator=generator)
        self.text, self.places, self.mixed = text, torch.ones(1, text + LENGTH, 1), False
        self.passes = 0

    def __call__(self, put):
        self.passes += 1
        hidden = put(self.start)
        hidden = nn.functional.layer_norm(hidden, (WIDTH,)) * self.places
        if self.mixed:
            hidden = hidden + hidden.mean(1, keepdim=True)
        video = (hidden @ self.weight)[:, self.text :]
        frames, height, width = GRID
        video = video.reshape(BATCH, frames, height, width, 2, 2, 2)  # pixels, then channels
        video = video.permute(0, 6, 1, 2, 4, 3, 5)
        return (video.reshape(BATCH, 2, frames, height * 2, width * 2),)


def _find(head, **more):
    return TokenSlots.find(head, **({"most": 5, "passes": 2, "rows": 4} | more))


def test_the_sampled_tokens_are_those_of_the_plain_output():
    head = _Head()
    slots = _find(head)
    assert len(slots.slots) == LENGTH and int(slots.slots.min()) == 3
    assert slots.elements.shape == (LENGTH, 8) and len(slots.sampled) == 5
    residual = torch.randn(head.start.shape, generator=torch.Generator().manual_seed(2))
    plain = head(lambda start: start + residual)
    found = slots.evaluate(head, [slots.take(residual)])
    assert found.shape == (1, BATCH, 5 * 8)
    assert torch.allclose(found[0], slots.of_output(plain), atol=1e-6)
    slots.check(plain, found[0])


def test_many_residuals_share_a_pass():
    head = _Head()
    slots = _find(head, most=6)
    generator = torch.Generator().manual_seed(3)
    residuals = [torch.randn(head.start.shape, generator=generator) for _ in range(7)]
    before = head.passes
    found = slots.evaluate(head, [slots.take(residual) for residual in residuals])
    assert head.passes - before == 2  # 7 x 6 tokens in 24 slots
    for part, residual in zip(found, residuals, strict=True):
        alone = slots.of_output(head(lambda start, residual=residual: start + residual))
        assert torch.allclose(part, alone, atol=1e-6)


def test_few_tokens_are_sampled_where_many_residuals_have_to_fit():
    assert len(_find(_Head(), most=256, passes=1, rows=12).sampled) == 2
    assert len(_find(_Head(), most=256, passes=1, rows=99).sampled) == 1


def test_a_head_that_mixes_tokens_is_refused():
    head = _Head()
    head.mixed = True
    with pytest.raises(NotLearnable, match="mixes tokens"):
        _find(head)


def test_a_head_that_depends_on_the_place_is_noticed():
    head = _Head()
    head.places = torch.linspace(0.2, 3.0, 3 + LENGTH)[None, :, None]
    slots = _find(head)
    residual = torch.zeros_like(head.start)
    plain = head(lambda start: start)
    again = slots.evaluate(head, [slots.take(residual)] * 3)[2]
    with pytest.raises(NotLearnable, match="places"):
        slots.check(plain, again)


def test_outputs_without_a_batch_or_a_tensor_are_refused():
    head = _Head()
    with pytest.raises(NotLearnable, match="batch"):
        _find(lambda put: head(put)[0].flatten(0, 1))
    with pytest.raises(NotLearnable, match="str"):
        _find(lambda put: ("text",))
