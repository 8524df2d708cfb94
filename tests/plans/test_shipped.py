"""The policies that come with vidaccel, and the table that explains their fields."""

import inspect
import itertools
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from vidaccel.lemica import search
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import ModelInfo
from vidaccel.plans.shipped import shipped_policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies(name):
    policy = CachePolicy.load(ROOT / "policies" / name)
    assert hasattr(diffusers, policy.model.transformer)
    if policy.model.id is not None:
        assert name.startswith(policy.model.id.replace("/", "--"))
    else:
        assert policy.model.config_hash
    assert policy.provenance != "published" or (policy.validation is None and policy.source)
    for budget in policy.budgets():
        steps = policy.plan(budget=budget).steps
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        if policy.provenance == "published":
            assert steps[-1] == policy.num_inference_steps - 1
            assert max(gaps) <= 8
    assert (ROOT / "policies" / name).read_text() == policy.to_json()


def local_copy(policy):
    """The run of a copy of a policy's model that was loaded from a folder."""
    cls = getattr(diffusers, policy.model.transformer)
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return RunSettings(
        policy.num_inference_steps,
        transformer=policy.model.transformer,
        scheduler="FlowMatchEulerDiscreteScheduler",
        config=defaults | policy.model.config,
        pipeline=policy.model.pipeline,
        experts=policy.model.experts,
    )


PUBLISHED = {n: CachePolicy.load(p) for n, p in shipped_policies().items() if "published" in n}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_local_copy_takes_the_list_of_its_own_model(name):
    policy = PUBLISHED[name]
    run = local_copy(policy)
    assert hasattr(diffusers, policy.model.pipeline)
    assert policy.model.config.keys() <= run.config.keys()
    others = [other for other in PUBLISHED.values() if other.fits(run)]
    assert policy in others
    # The models of 480P and 720P have one config, and one list.
    assert all(other.plans == policy.plans for other in others)
    assert len(others) == (2 if "I2V-14B" in name else 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Wan-AI--Wan2.1-T2V-14B-", {"experts": 2}),  # Wan 2.2 T2V A14B
        ("Wan-AI--Wan2.1-I2V-14B-720P", {"experts": 2, "config": {"added_kv_proj_dim": None}}),
        ("Wan-AI--Wan2.1-I2V-14B-720P", {"config": {"added_kv_proj_dim": None}}),
        ("Wan-AI--Wan2.1-I2V-14B-720P", {"config": {"pos_embed_seq_len": 514}}),  # FLF2V
        ("Wan-AI--Wan2.1-T2V-1.3B", {"config": {"in_channels": 36}}),  # Fun, inpainting
        ("Wan-AI--Wan2.1-T2V-14B", {"transformer": "SkyReelsV2Transformer3DModel"}),
        ("black-forest-labs--FLUX.1-dev", {"config": {"guidance_embeds": False}}),  # schnell
        ("black-forest-labs--FLUX.1-dev", {"pipeline": "FluxKontextPipeline"}),
        ("black-forest-labs--FLUX.1-dev", {"config": {"in_channels": 384}}),  # Fill
        ("Qwen--Qwen-Image", {"pipeline": "QwenImageEditPipeline"}),
        (
            "hunyuanvideo-community--HunyuanVideo-1.5-Diffusers-720p_i2v",
            {"config": {"target_size": 640}},
        ),
        (
            "hunyuanvideo-community--HunyuanVideo-1.5-Diffusers-720p_i2v",
            {"config": {"use_meanflow": True}},
        ),
        ("black-forest-labs--FLUX.2-dev", {"config": {"num_single_layers": 24}}),  # klein 9B
    ],
)
def test_a_model_of_the_same_class_is_no_copy(name, changes):
    (policy,) = (policy for key, policy in PUBLISHED.items() if key.startswith(f"{name}"))
    run = local_copy(policy)
    config = {**run.config, **changes.get("config", {})}
    other = replace(run, **(changes | {"config": config}))
    assert policy.fits(run) and not any(policy.fits(other) for policy in PUBLISHED.values())


def test_every_field_is_explained():
    explained = (ROOT / "policies" / "README.md").read_text()
    for field in (*CachePolicy.model_fields, *ModelInfo.model_fields):
        assert f"`{field}`" in explained


@pytest.mark.parametrize("name", [n for n in shipped_policies() if "published" not in n])
def test_the_errors_of_a_measured_policy_give_its_plans(name):
    policy = CachePolicy.load(shipped_policies()[name])
    solved = search.solve_edges(
        policy.search_edges(),
        policy.num_inference_steps,
        objective=str(policy.objective),
        virtual_end=True,
    )
    assert policy.budgets() == sorted(solved)
    for budget, plan in solved.items():
        if policy.plans[str(budget)].chosen_as is None:
            assert policy.plan(budget=budget) == plan
    assert policy.validation is not None
    kept = {row.budget: row.psnr for row in policy.validation if row.kept}
    for row in policy.validation:
        assert kept[row.budget] >= row.psnr
