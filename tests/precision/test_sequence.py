"""The grid of video tokens, as the calls of a transformer tell it."""

from typing import Any

import pytest
import torch
from torch import nn

from tiny import CASES
from vidaccel.errors import PrecisionError
from vidaccel.hosts.registry import find_transformers
from vidaccel.precision.sequence import GridFinder, Sequence


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox", "ltx", "mochi"])
def test_the_grid_of_a_call_is_that_of_its_tokens(name: str):
    case = CASES[name]()
    transformer, host = find_transformers(case.pipe)["transformer"]
    finder = GridFinder(transformer, host)
    seen: list[Any] = []
    first = getattr(transformer, host.blocks[0].name)[0]

    def block(module: nn.Module, args: Any, kwargs: Any) -> None:
        streams = kwargs | {str(place): value for place, value in enumerate(args)}
        tokens = streams.get("hidden_states", streams.get("0")).shape[1]
        seen.append((finder.sequence.grid, tokens, finder.sequence.video(tokens)))

    transformer.register_forward_pre_hook(finder, with_kwargs=True)
    first.register_forward_pre_hook(block, with_kwargs=True)
    case.run(num_inference_steps=2)
    grid, tokens, video = seen[0]
    assert torch.Size(grid).numel() == tokens
    assert video == (0, tokens)


def test_a_model_that_does_not_tell_is_refused():
    case = CASES["flux"]() if "flux" in CASES else None
    if case is None:
        pytest.skip("no model of images here")
    transformer, host = find_transformers(case.pipe)["transformer"]
    try:
        finder = GridFinder(transformer, host)
    except PrecisionError as error:
        assert "sequence=None" in str(error)
        return
    with pytest.raises(PrecisionError, match="sequence=None"):
        finder(transformer, (), {"hidden_states": torch.zeros(1, 16, 8)})


def test_video_lies_before_text_or_behind_it():
    first, last = Sequence(False, (2, 2, 2)), Sequence(True, (2, 2, 2))
    assert (first.video(8), first.video(12), first.video(7)) == ((0, 8), (0, 8), None)
    assert (last.video(8), last.video(12)) == ((0, 8), (4, 12))
    assert Sequence().video(100) is None
