"""A pipeline without weights, and what is found out on it."""

import json
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tiny.wan import wan, wan22
from vidaccel import DBCache, Plan
from vidaccel.api import engines_of
from vidaccel.clips.embedded import EMBEDDED_CALL, embedded_model
from vidaccel.clips.load import check_call
from vidaccel.clips.outline import check_acceleration, outline_of
from vidaccel.errors import ModelError, PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.resolve import Resolver

CALL = {**EMBEDDED_CALL, "prompt": "a red circle"}


@pytest.fixture
def outline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    return outline_of()


def test_an_outline_is_of_the_class_of_the_model_and_has_no_weights(outline):
    assert type(outline) is diffusers.WanPipeline
    assert {p.device.type for p in outline.transformer.parameters()} == {"meta"}
    assert len(outline.transformer.blocks) == 10
    assert outline.scheduler.config.shift == 1.0
    assert outline.text_encoder is None


def test_sizes_are_held_against_the_model(outline):
    check_call(outline, CALL)
    with pytest.raises(ModelError, match=r"WanPipeline: .* divisible by 16 but are 47 and 96"):
        check_call(outline, {**CALL, "height": 47})


@pytest.mark.parametrize(
    ("arguments", "steps", "error"),
    [
        (([0, 1, 99],), 50, PlanError),
        ((Plan.every(2, 6),), 50, PlanError),
        (("vidaccel/tiny-wan/30-steps",), 50, PolicyError),
        (("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",), 50, PolicyError),
        ((None, DBCache(0.1, probe_blocks=10)), 50, PlanError),
        ((None, DBCache(0.1, probe_blocks=5, corrector_blocks=5)), 50, PlanError),
    ],
)
def test_what_does_not_fit_the_model_is_refused(outline, arguments, steps, error):
    with pytest.raises(error):
        check_acceleration(outline, {**CALL, "num_inference_steps": steps}, Resolver(*arguments))
    assert not engines_of(outline)


@pytest.mark.parametrize("policy", ["auto", None, "every 3", "vidaccel/tiny-wan", [0, 1, 29]])
@pytest.mark.parametrize("steps", [30, 50])
def test_what_fits_passes(outline, policy, steps):
    check_acceleration(outline, {**CALL, "num_inference_steps": steps}, Resolver(policy, "auto"))
    assert not engines_of(outline)


def test_a_scheduler_that_cannot_be_is_found(outline):
    outline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UnsupportedPipelineError, match="times per step"):
        check_acceleration(outline, CALL, Resolver("auto"))


@pytest.mark.parametrize("build", [wan, wan22], ids=lambda build: build.__name__)
def test_other_models_have_an_outline(build, tmp_path):
    case = build()
    case.pipe.save_pretrained(tmp_path / "model")
    outline = outline_of(str(tmp_path / "model"))
    assert type(outline) is type(case.pipe)
    for name in ("transformer", "transformer_2"):
        model, made = (getattr(pipe, name, None) for pipe in (case.pipe, outline))
        assert (model is None) == (made is None)
        assert made is None or len(made.blocks) == len(model.blocks)


def test_a_model_whose_configs_make_no_pipeline_has_none(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(embedded_model(), model)
    index = json.loads((model / "model_index.json").read_text())
    for change in ({"_class_name": "MyPipeline"}, {"transformer": ["mine", "MyTransformer"]}):
        (model / "model_index.json").write_text(json.dumps(index | change))
        found = outline_of(str(model))
        assert found is None or found.transformer is None
    (model / "model_index.json").write_text("{")
    assert outline_of(str(model)) is None


def test_only_config_files_of_a_hub_model_are_downloaded(monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(embedded_model())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert type(outline_of("someone/model")) is diffusers.WanPipeline
    [(name, patterns)] = asked
    assert name == "someone/model"
    weights = [file for file in embedded_model().rglob("*") if file.suffix == ".safetensors"]
    assert weights and not [w for w in weights if any(w.match(p) for p in patterns)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no"), "no model folder at no/model, and the hub cannot be"),
        (OSError("disk full\nmore"), "no/model, and the hub does not give it: disk full$"),
    ],
)
def test_a_hub_model_that_is_not_there(monkeypatch, error, message):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        outline_of("no/model")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        outline_of(str(tmp_path))
    with pytest.raises(ModelError, match="no model folder at"):
        outline_of(str(Path("./nowhere")))
