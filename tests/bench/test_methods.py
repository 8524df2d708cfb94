"""The variants of every method: settings from careful to fast, and what they need."""

import pytest

from vidaccel.bench.methods import variants
from vidaccel.bench.plan_searches import SEARCHES
from vidaccel.bench.records import key_of
from vidaccel.bench.variants import MethodContext
from vidaccel.errors import PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies


def test_variants_that_cannot_run_are_left_out_unless_named():
    found, left_out = variants(None, MethodContext(50))
    assert "no policy" in left_out["vidaccel plan"]
    assert "not calibrated" in left_out["MagCache"]
    assert {variant.method for variant in found}.isdisjoint(left_out)
    with pytest.raises(PolicyError, match="no policy"):
        variants(["vidaccel plan"], MethodContext(50))
    with pytest.raises(UnsupportedPipelineError, match="not calibrated"):
        variants(["MagCache"], MethodContext(50))
    with pytest.raises(PlanError, match="found warp drive, expected preset quality, "):
        variants(["warp drive"], MethodContext(50))


def test_variants_of_a_policy():
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    context = MethodContext(50, policy, (1.0,) * 50)
    found, left_out = variants(None, context)
    reasons = {name: reason for name, reason in left_out.items() if name not in SEARCHES}
    assert all("not installed" in reason for reason in reasons.values())
    plans = [variant for variant in found if variant.method == "vidaccel plan"]
    assert [len(variant.setting["steps"]) for variant in plans] == context.budgets
    keys = {key_of(variant.method, variant.setting) for variant in found}
    assert len(keys) == len(found)
    with pytest.raises(PolicyError, match="the policy is for 50, this run has 30"):
        variants(["LeMiCa sum"], MethodContext(30, policy))
