"""Loading a pipeline, and what its call takes."""

import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tiny.cogvideo import cogvideox_i2v
from tiny.wan import wan
from vidaccel.clips.generate import generate
from vidaccel.clips.load import (
    call_arguments,
    check_call,
    find_device,
    load_pipeline,
    quiet_libraries,
)
from vidaccel.errors import ModelError, PlanError


def test_an_option_that_the_pipeline_does_not_have():
    pipe = load_pipeline(device="cpu")
    assert call_arguments(pipe, {"height": 64, "width": None}) == {"height": 64}
    with pytest.raises(ModelError, match="WanPipeline takes no strength"):
        call_arguments(pipe, {"strength": 0.5})
    for steps in (0, -1, 2.5):
        with pytest.raises(PlanError, match="num_inference_steps: found"):
            generate(pipe, {"prompt": "x", "num_inference_steps": steps})


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("banana", "no device is called 'banana'"),
        ("cuda:99", "there is no device cuda:99 here"),
        ("meta", "there is no device meta here"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    device, message, monkeypatch
):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(ModelError, match=message):
        load_pipeline(device=device)
    assert find_device("cpu") == torch.device("cpu")


def test_a_cpu_has_nothing_to_offload(monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(ModelError, match="offload keeps idle parts off a GPU"):
        load_pipeline(device="cpu", offload=True)


def test_what_a_pipeline_says_of_its_arguments_is_said_before_it_runs():
    case = wan()
    given = case.kwargs
    check_call(case.pipe, given)
    with pytest.raises(ModelError, match=r"WanPipeline: .* divisible by 16 but are 20 and 16"):
        check_call(case.pipe, {**given, "height": 20})
    with pytest.raises(ModelError, match="WanPipeline: Cannot forward both `prompt`"):
        check_call(case.pipe, {**given, "prompt": "x"})


def test_an_image_that_a_pipeline_needs():
    case = cogvideox_i2v()
    check_call(case.pipe, case.kwargs)
    given = {name: value for name, value in case.kwargs.items() if name != "image"}
    with pytest.raises(ModelError, match="needs image"):
        check_call(case.pipe, given)
    with pytest.raises(ModelError, match="has to be of type"):
        check_call(case.pipe, {**given, "image": 3})


def test_libraries_are_quiet_while_a_model_is_loaded_and_no_longer(caplog):
    log = logging.getLogger("a library")
    with quiet_libraries():
        log.warning("deprecated")
        assert not transformers_logging.is_progress_bar_enabled()
    log.warning("heard")
    assert transformers_logging.is_progress_bar_enabled()
    assert [record.message for record in caplog.records] == ["heard"]
    with pytest.raises(KeyError), quiet_libraries():
        raise KeyError
    assert transformers_logging.is_progress_bar_enabled()
