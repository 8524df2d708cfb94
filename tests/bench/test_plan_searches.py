"""Searches by whole runs: what they find, and what they need."""

import pytest

from tiny.building import prompted
from tiny.wan import wan
from vidaccel.bench.methods import variants
from vidaccel.bench.plan_searches import BUDCACHE, IMPROVED, SEARCHES, searched_plans
from vidaccel.bench.variants import MethodContext
from vidaccel.errors import PolicyError
from vidaccel.plans.plan import Plan


def test_a_search_of_whole_runs_keeps_the_budget_and_goes_on_from_its_runs(tmp_path):
    case = prompted(wan())
    call, prompt = {**case.call, "num_inference_steps": 16}, "a"
    call.pop("prompt", None)
    more = {"workdir": tmp_path, "progress": False}
    found = searched_plans(case.pipe, call, [prompt], [6], [IMPROVED, BUDCACHE], 6, **more)
    assert {len(found[method][6].steps) for method in (IMPROVED, BUDCACHE)} == {6}
    assert not any(found[BUDCACHE][6].orders)
    trials = sorted(tmp_path.glob("searches/trial-*"))
    assert searched_plans(case.pipe, call, [prompt], [6], [IMPROVED, BUDCACHE], 6, **more) == found
    assert sorted(tmp_path.glob("searches/trial-*")) == trials


def test_methods_that_search_need_runs():
    with pytest.raises(PolicyError, match="--search-runs"):
        variants([BUDCACHE], MethodContext(50))
    plans = {method: {9: Plan.spread(9, 50)} for method in SEARCHES}
    found, _ = variants(list(SEARCHES), MethodContext(50, chosen=(9,), searched=plans))
    assert [variant.method for variant in found] == list(SEARCHES)
