"""What the arguments of `accelerate` come to: policy files, presets and "auto"."""

from dataclasses import replace

import pytest

from tiny.policies import parse, plan_of, run_settings, valid
from vidaccel.errors import PlanError, PolicyError
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.store import FILE_NAME
from vidaccel.resolve import Resolver


def test_a_policy_file_as_the_source_of_plans(tmp_path):
    file = tmp_path / FILE_NAME
    parse(valid()).save(file)
    for policy in (file, str(file), tmp_path, parse(valid())):
        assert plan_of(policy, run_settings(), "quality").steps == (0, 3, 5)
    # The preset asks for three times, the fastest plan gives two.
    source = Resolver(file)
    assert source.plan(run_settings()).steps == (0, 3, 5)
    assert source.description == f"policy {file}: 3 of 6 steps computed"
    with pytest.raises(PolicyError, match="num_inference_steps"):
        source.plan(run_settings(num_inference_steps=7))


@pytest.mark.parametrize("policy", ["nowhere.json", "./nowhere", "no-org/no-policy", "a/b/c"])
def test_a_policy_that_is_not_there(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match=r"nowhere|no-policy|a/b/c"):
        Resolver(policy)


def test_auto_is_the_generic_schedule_without_a_policy_for_the_model():
    budgets = [
        len(plan_of("auto", run_settings(num_inference_steps=50, sigmas=None), preset).steps)
        for preset in ("quality", "balanced", "fast")
    ]
    assert budgets == [25, 17, 10]


def test_auto_computes_every_step_of_a_few_step_model():
    assert plan_of("auto", run_settings()).steps == tuple(range(6))
    assert len(plan_of("auto", run_settings(num_inference_steps=8, sigmas=None)).steps) < 8


def test_auto_takes_a_shipped_policy_that_fits():
    wan = RunSettings(50, "WanTransformer3DModel", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "0" * 64)
    plan = plan_of("auto", wan)
    assert plan.steps[:9] == (0, 1, 2, 3, 4, 5, 7, 10, 17)
    assert "published, not validated here" in plan.origin
    other = plan_of("auto", replace(wan, num_inference_steps=40))
    assert "carried over by position" in other.origin


@pytest.mark.parametrize(
    ("layers", "heads", "width", "model"),
    [
        (30, 12, 8960, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (40, 40, 13824, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        (40, 40, 8960, None),
    ],
)
def test_auto_tells_a_copy_in_a_folder_by_its_config(layers, heads, width, model):
    config = {"num_layers": layers, "num_attention_heads": heads, "ffn_dim": width}
    config |= {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
    local = run_settings(
        num_inference_steps=50,
        model_id=None,
        config=config,
        sigmas=None,
        pipeline="WanPipeline",
        experts=1,
    )
    origin = plan_of("auto", local).origin
    if model is None:
        assert "generic schedule" in origin
    else:
        assert origin.startswith(model.replace("/", "--"))
        assert origin.endswith(f"; model taken for {model} by its class and config alone")
    for changes in ({"experts": 2}, {"config": config | {"in_channels": 36}}):
        assert "generic schedule" in plan_of("auto", replace(local, **changes)).origin


def test_a_policy_that_tells_too_little_says_so():
    origin = plan_of(parse(valid()), run_settings(model_id=None)).origin
    assert origin.startswith("model not checked beyond its class")
    moved = Resolver(parse(valid()), allow_transfer=True).plan(
        run_settings(
            model_id=None, num_inference_steps=9, sigmas=tuple(1 - i / 10 for i in range(9))
        )
    )
    assert "not validated; model not checked beyond its class" in moved.origin
    assert plan_of(parse(valid()), run_settings()).origin == ""


def test_unknown_preset_is_refused():
    with pytest.raises(PlanError, match="'quality', 'balanced', 'fast', found 'turbo'"):
        Resolver("auto", preset="turbo")


def test_a_transfer_is_to_the_same_model():
    resolver = Resolver(parse(valid()), allow_transfer=True)
    with pytest.raises(PolicyError, match=r"model.transformer"):
        resolver.plan(run_settings(transformer="CogVideoXTransformer3DModel"))
