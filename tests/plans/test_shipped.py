"""The policies that come with vidaccel, and the table that explains their fields."""

import itertools
from pathlib import Path

import diffusers
import pytest

from vidaccel.lemica import search
from vidaccel.plans.policy import CachePolicy
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


def test_every_field_is_explained():
    explained = (ROOT / "policies" / "README.md").read_text()
    for field in CachePolicy.model_fields:
        assert f"`{field}`" in explained


@pytest.mark.parametrize("name", [n for n in shipped_policies() if "published" not in n])
def test_the_errors_of_a_measured_policy_give_its_plans(name):
    policy = CachePolicy.load(shipped_policies()[name])
    solved = search.solve_edges(
        policy.search_edges(), policy.num_inference_steps, objective=str(policy.objective)
    )
    assert policy.budgets() == sorted(solved)
    for budget, plan in solved.items():
        if policy.plans[str(budget)].chosen_as is None:
            assert policy.plan(budget=budget) == plan
    assert policy.validation is not None
    kept = {row.budget: row.psnr for row in policy.validation if row.kept}
    for row in policy.validation:
        assert kept[row.budget] >= row.psnr
