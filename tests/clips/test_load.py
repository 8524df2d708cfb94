"""Loading a pipeline, and what its call takes."""

import pytest

from vidaccel.clips.generate import generate
from vidaccel.clips.load import call_arguments, load_pipeline
from vidaccel.errors import ModelError, PlanError


def test_an_option_that_the_pipeline_does_not_have():
    pipe = load_pipeline(device="cpu")
    assert call_arguments(pipe, {"height": 64, "width": None}) == {"height": 64}
    with pytest.raises(ModelError, match="WanPipeline takes no strength"):
        call_arguments(pipe, {"strength": 0.5})
    for steps in (0, -1, 2.5):
        with pytest.raises(PlanError, match="num_inference_steps: found"):
            generate(pipe, {"prompt": "x", "num_inference_steps": steps})
