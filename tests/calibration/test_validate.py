"""What is kept of the candidates, at the budgets that are run and at those beside them."""

from dataclasses import replace

import pytest

from vidaccel import Plan
from vidaccel.calibration import validate
from vidaccel.calibration.validate import Score, validated_policy
from vidaccel.plans.generic import generic_plan
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import load_shipped

SCORE = Score(40.0, 39.0, 38.0, 0.99, None, None, None, 0.0, 1.0)


@pytest.fixture
def policy() -> CachePolicy:
    return next(
        known for _, known in load_shipped()
        if known.provenance == "measured" and known.num_inference_steps == 50
    )  # fmt: skip


def test_budgets_that_are_not_run_take_what_was_best_on_both_sides(policy, monkeypatch):
    def scores(pipe, call, samples, plans, **options):
        found = {name: SCORE for name in plans} | {f"{b} steps": SCORE for b in (10, 25)}
        best = {"10: generic schedule": 52.0, "25: spread": 50.0, "25: improved": 51.0}
        found |= {name: replace(SCORE, psnr=psnr) for name, psnr in best.items()}
        return found, 2.0

    def plans_of(budget):
        generic = generic_plan(budget, 50, policy.scheduler.sigmas)
        return {"spread": Plan.spread(budget, 50), "generic schedule": generic}

    monkeypatch.setattr(validate, "scores", scores)
    tried = {budget: plans_of(budget) for budget in (10, 25)}
    tried[25]["improved"] = Plan.every(2, 50)
    elsewhere = {budget: plans_of(budget) for budget in (11, 20, 30)}
    kept = validated_policy(None, policy, tried, {}, [], elsewhere, progress=False)
    names = {budget: kept.plans[str(budget)].chosen_as for budget in (10, 11, 20, 25, 30)}
    assert names == {
        10: "generic schedule", 11: "generic schedule", 20: "generic schedule", 25: "improved",
        30: "spread",
    }  # fmt: skip
    assert kept.plans["11"].steps == elsewhere[11]["generic schedule"].steps
    assert kept.plans["40"] == policy.plans["40"], "without candidates it stays what it was"
