"""What auto does where nothing is known is never worse than evenly spaced steps of its count."""

from statistics import fmean

import pytest
import torch

from vidaccel import accelerate, report, restore
from vidaccel.bench.grid import Setting, scheduler_of
from vidaccel.bench.methods import generic
from vidaccel.clips import metrics
from vidaccel.clips.generate import generate
from vidaccel.clips.load import load_pipeline
from vidaccel.plans.plan import Plan

# Within so many decibels two clips of some 30 dB are level.
LEVEL = 0.5
# Of one caption alone either may be ahead by some decibels.
CAPTIONS = (
    "a white checkered circle moving right on a forest checkered background",
    "a blue striped square moving up on a navy dotted background",
    "a red dotted triangle moving left on a teal striped background",
)
SIZE = {"height": 32, "width": 32, "num_frames": 5}
SETTINGS = (
    Setting("Euler", 1.0, 8, 5.0),
    Setting("UniPC", 3.0, 12, 1.0),
    Setting("DPM++ 2M", 7.0, 16, 1.0),
    Setting("Euler", 3.0, 20, 1.0),
)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(None, device="cpu", dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_auto_is_no_worse_than_evenly_spaced_steps(pipe, setting):
    """Invariant 11, on a few settings of the grid of `vidaccel bench defaults`."""
    pipe.scheduler = scheduler_of(setting)
    call = SIZE | {"num_inference_steps": setting.steps, "guidance_scale": setting.guidance}

    def clips():
        return [
            generate(pipe, {**call, "prompt": caption}, progress=False).frames
            for caption in CAPTIONS
        ]

    plain = clips()
    for speedup in (2, 3):
        with generic("auto", -(-setting.steps // speedup)).enabled(pipe):
            auto = clips()
            computed = report(pipe).transformers[0].timeline.count("C")
        assert computed < setting.steps
        accelerate(pipe, policy=Plan.spread(computed, setting.steps), attention=None)
        even = clips()
        restore(pipe)
        of_auto, of_even = (fmean(map(metrics.psnr, plain, found)) for found in (auto, even))
        assert of_auto >= of_even - LEVEL
