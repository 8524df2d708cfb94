"""What is known of a run: above all, of which model it is."""

import inspect
import json

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tiny.images import flux
from tiny.wan import wan, wan22, wan_v2v
from vidaccel import accelerate, report
from vidaccel.engine.run_settings import run_settings_of, shift_of
from vidaccel.errors import PolicyError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import SCHEMA_VERSION, ModelInfo
from vidaccel.plans.shipped import shipped_policies

HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def settings(*pipes):
    """The run of the first of these pipelines."""
    pipe = pipes[0]
    pipe.scheduler.set_timesteps(6)
    return run_settings_of(pipe.transformer, pipes, pipe.scheduler, 6)


def loaded_from(name, transformer=None):
    """A pipeline as `from_pretrained` leaves it."""
    pipe = wan().pipe
    pipe.register_to_config(_name_or_path=name)
    pipe.transformer.register_to_config(_name_or_path=transformer or f"/cache/{name}/transformer")
    return pipe


def test_the_config_of_a_run():
    run = settings(wan().pipe)
    assert (run.pipeline, run.experts) == ("WanPipeline", 1)
    known = {"num_layers": 3, "in_channels": 16, "added_kv_proj_dim": None, "cross_attn_norm": True}
    assert known.items() <= run.config.items()
    assert {"eps", "patch_size"}.isdisjoint(run.config)  # neither whole numbers nor words
    ModelInfo.of(run)
    assert settings(wan22().pipe).experts == 2
    assert settings(flux().pipe).config["guidance_embeds"] is False


def test_an_entry_that_a_newer_diffusers_adds_leaves_a_model_what_it_is(monkeypatch):
    """With its default; another value makes another model, and so does one that is not added."""
    pipe = wan().pipe
    plain = settings(pipe)
    signature = inspect.signature

    def newer(cls, *args, **kwargs):
        known = signature(cls, *args, **kwargs)
        added = inspect.Parameter("rope_kind", inspect.Parameter.KEYWORD_ONLY, default=[1, 2])
        return known.replace(parameters=[*known.parameters.values(), added])

    monkeypatch.setattr(inspect, "signature", newer)
    pipe.transformer.register_to_config(rope_kind=(1, 2))
    default = settings(pipe)
    assert default.config_hash == plain.config_hash
    assert default.full_config_hash != plain.full_config_hash
    policy = own_policy(config_hash=plain.config_hash)
    assert policy.fits(default)
    pipe.transformer.register_to_config(rope_kind=(3, 2))
    assert not policy.fits(settings(pipe))
    pipe.transformer.register_to_config(rope_kind=(1, 2), eps=1e-3)
    assert not policy.fits(settings(pipe))
    # Files of before have the hash of all entries.
    assert own_policy(config_hash=plain.full_config_hash).fits(plain)


def test_the_shift_of_a_run():
    run = settings(wan().pipe)
    assert run.shift == wan().pipe.scheduler.config.get("shift", 1.0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert shift_of(dynamic) is None
    assert shift_of(UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0)) == 5.0
    assert shift_of(DDIMScheduler()) is None


def test_pipelines_that_share_a_transformer():
    """The one whose scheduler runs is meant; with one scheduler it could be either."""
    pipe = wan().pipe
    other = wan_v2v().pipe
    other.transformer = pipe.transformer
    assert settings(pipe, other).pipeline == "WanPipeline"
    assert settings(other, pipe).pipeline == "WanVideoToVideoPipeline"
    other.scheduler = pipe.scheduler
    assert settings(pipe, other).pipeline is None


def test_the_hub_id_of_a_pipeline(tmp_path, monkeypatch):
    assert settings(loaded_from(HUB_ID)).model_id == HUB_ID
    # Another transformer of the hub was put in: what its config contradicts is seen to elsewhere.
    assert settings(loaded_from(HUB_ID, f"{HUB_ID}-other")).model_id == HUB_ID
    folders = [tmp_path, str(tmp_path), "/gone/since", "./models", "a/b/c", "../wan", "~/wan", None]
    for name in folders:
        assert settings(loaded_from(name)).model_id is None, name
    # A folder of that name is none on the hub, not even when the working directory is another.
    local = loaded_from(HUB_ID, f"{HUB_ID}/transformer")
    assert settings(local).model_id is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert settings(loaded_from(HUB_ID)).model_id is None


def published(name):
    (file,) = (path for key, path in shipped_policies().items() if name in key)
    return CachePolicy.load(file)


def test_a_published_list_of_another_model_is_refused(tmp_path):
    case = wan()
    case.pipe.register_to_config(_name_or_path=str(tmp_path))
    accelerate(case.pipe, policy=published("T2V-1.3B"))
    with pytest.raises(PolicyError, match=r"model\.config\.\w+: the policy is for \d+, this run"):
        case.run(num_inference_steps=50)


def own_policy(**model):
    """A policy of 6 steps that knows of its model what is given."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "model": {"transformer": "WanTransformer3DModel"} | model,
        "num_inference_steps": 6,
        "plans": {"3": {"steps": [0, 2, 4]}},
        "provenance": "published",
    }
    return CachePolicy.from_json(json.dumps(data))


def test_the_report_says_what_was_not_checked(tmp_path):
    """Of a model in a folder: nothing known, told by its numbers, told by the hash of all."""
    case = wan()
    case.pipe.register_to_config(_name_or_path=str(tmp_path))
    run = settings(case.pipe)
    known = {"config": dict(run.config), "pipeline": "WanPipeline", "experts": 1}
    for model, said in (
        ({"id": HUB_ID}, f"model not checked beyond its class: nothing says that this is {HUB_ID}"),
        ({"id": HUB_ID} | known, f"model taken for {HUB_ID} by its class and config alone"),
        ({"config_hash": run.config_hash}, None),
    ):
        accelerate(case.pipe, policy=own_policy(**model), attention=None)
        case.run()
        found = report(case.pipe).transformers[0]
        assert found.timeline == "C-C-C-"
        assert found.policy.endswith(said) if said else "model" not in found.policy


def test_a_merged_adapter_is_not_seen():
    """Other weights of the same config are the same model, as far as anybody can tell."""
    pipe = wan().pipe
    before = settings(pipe)
    pipe.transformer.blocks[0].attn1.to_q.weight.data += 1.0
    assert settings(pipe) == before
