"""One generation: to its latents."""

from types import SimpleNamespace

import numpy as np
import torch

from tiny.wan import wan
from vidaccel.clips.generate import generate, latents_of


def test_latents_are_those_of_the_seed_and_the_bar_stays_as_it_was():
    case = wan()
    case.pipe.set_progress_bar_config(desc="mine", disable=True)
    latents = latents_of(case.pipe, case.kwargs, seed=3)
    assert torch.equal(latents, case.run(3))
    assert not torch.equal(latents, latents_of(case.pipe, case.kwargs))
    assert case.pipe._progress_bar_config == {"desc": "mine", "disable": True}


class OnTheSecondGpu:
    """A pipeline whose latents are on the second GPU of a machine that has two."""

    device = torch.device("cuda:1")

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, num_inference_steps, generator, output_type, callback_on_step_end):
        for step in range(num_inference_steps):
            latents = SimpleNamespace(device=self.device)
            callback_on_step_end(self, step, 0, {"latents": latents})
        return SimpleNamespace(frames=np.zeros((1, 2, 4, 4, 3), np.float32))


def test_the_last_step_is_timed_on_the_device_of_the_latents(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr("vidaccel.clips.generate.engines_of", lambda pipe: {})
    run = generate(OnTheSecondGpu(), {"num_inference_steps": 3}, progress=False)
    assert waited == [torch.device("cuda:1")] and run.denoising_seconds is not None
