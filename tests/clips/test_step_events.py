"""Ends of denoising steps, found by the calls of the transformers."""

import pytest
import torch

from tiny.cogvideo import cogvideox_i2v
from tiny.hunyuan import framepack, hunyuan15, hunyuan15_i2v
from tiny.wan import wan, wan22
from vidaccel.clips.step_events import follow_steps


@pytest.mark.parametrize("build", [wan, wan22, cogvideox_i2v], ids=lambda b: b.__name__)
def test_it_calls_back_as_the_pipeline_does(build):
    case, expected, seen = build(), [], []
    with follow_steps(case.pipe, lambda step, latents: seen.append((step, latents))):
        case.run(
            callback_on_step_end=lambda _, step, __, kwargs: (
                expected.append((step, kwargs["latents"])) or kwargs
            )
        )
    assert [step for step, _ in seen] == [step for step, _ in expected] == list(range(6))
    assert seen.pop()[1] is None
    for (_, latents), (_, theirs) in zip(seen, expected[:-1], strict=True):
        assert torch.equal(latents[:1], theirs[:1].to(latents.dtype))


@pytest.mark.parametrize("build", [hunyuan15, hunyuan15_i2v], ids=lambda b: b.__name__)
def test_a_pipeline_without_a_callback(build):
    case, seen = build(), []
    with follow_steps(case.pipe, lambda step, latents: seen.append((step, latents))):
        clip = case.run()
    assert [step for step, _ in seen] == list(range(6))
    assert {latents.shape for _, latents in seen[:-1]} == {clip.shape}
    assert not case.pipe.transformer._forward_pre_hooks


def test_chunks_are_counted_on():
    case, seen = framepack(), []
    with follow_steps(case.pipe, lambda step, _: seen.append(step)):
        case.run()
    assert seen == list(range(len(seen))) and len(seen) == 12


def test_what_is_raised_ends_the_run():
    case = hunyuan15()
    expected = case.run()

    def stop(step, _):
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError), follow_steps(case.pipe, stop):
        case.run()
    assert not case.pipe.transformer._forward_pre_hooks
    assert torch.equal(case.run(), expected)
