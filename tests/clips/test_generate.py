"""One generation: to its latents."""

import torch

from tiny.wan import wan
from vidaccel.clips.generate import latents_of


def test_latents_are_those_of_the_seed_and_the_bar_stays_as_it_was():
    case = wan()
    case.pipe.set_progress_bar_config(desc="mine", disable=True)
    latents = latents_of(case.pipe, case.kwargs, seed=3)
    assert torch.equal(latents, case.run(3))
    assert not torch.equal(latents, latents_of(case.pipe, case.kwargs))
    assert case.pipe._progress_bar_config == {"desc": "mine", "disable": True}
