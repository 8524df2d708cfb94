"""The decisions of the block cache against their definition, and its settings."""

import random
from dataclasses import replace

import pytest

from vidaccel import DBCache
from vidaccel.dbcache import ACCUMULATED, CACHED, CONSECUTIVE, DIFFERENCE, WARM_UP, Decider
from vidaccel.errors import PlanError


def simulate(cache: DBCache, differences: list[float]) -> list[str]:
    """Let `Decider` decide a row of differences: "" for a reused step, otherwise the reason."""
    decider = Decider(cache)
    reasons = []
    for step, difference in enumerate(differences):
        reason = decider.before_probe(step) or decider.after_probe(difference)
        decider.record(step, reason, difference)
        reasons.append(reason)
    return reasons


def test_decisions_are_what_the_settings_say():
    """Each decision restated from the definitions, over many random settings and differences."""
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        cache = DBCache(
            threshold=rng.choice([0.0, 0.1, 0.3]),
            warmup_steps=rng.randrange(5),
            warmup_interval=rng.randrange(1, 4),
            max_consecutive=rng.choice([None, 0, 1, 2, 3]),
            max_cached=rng.choice([None, 0, 2, 5]),
            max_accumulated=rng.choice([None, 0.0, 0.2, 0.5]),
        )
        differences = [rng.choice([0.0, 0.05, 0.1, 0.2, 0.4, float("nan")]) for _ in range(14)]
        reasons = simulate(cache, differences)
        for step, reason in enumerate(reasons):
            earlier = reasons[:step]
            since = max((i + 1 for i, r in enumerate(earlier) if r), default=0)
            run = differences[since : step + 1]
            broken = set()
            if step < cache.warmup_steps and step % cache.warmup_interval == 0:
                broken.add(WARM_UP)
            if cache.max_cached is not None and earlier.count("") >= cache.max_cached:
                broken.add(CACHED)
            if cache.max_consecutive is not None and step - since >= cache.max_consecutive:
                broken.add(CONSECUTIVE)
            if not differences[step] < cache.threshold:
                broken.add(DIFFERENCE)
            elif cache.max_accumulated is not None and sum(run) > cache.max_accumulated + 1e-12:
                broken.add(ACCUMULATED)
            assert (reason in broken) if broken else reason == ""
            seen.add(reason)
    assert seen == {"", WARM_UP, CACHED, CONSECUTIVE, DIFFERENCE, ACCUMULATED}


def test_limits_start_anew_after_a_computed_step():
    free = DBCache(threshold=1.0, warmup_steps=0, max_consecutive=2)
    assert simulate(free, [0.1] * 6) == ["", "", CONSECUTIVE, "", "", CONSECUTIVE]
    summed = replace(free, max_consecutive=None, max_accumulated=0.25)
    assert simulate(summed, [0.1] * 6) == ["", "", ACCUMULATED, "", "", ACCUMULATED]
    # A step that its difference has computed counts as much as one that a limit has.
    assert simulate(free, [0.1, 2.0, 0.1, 0.1, 0.1]) == ["", DIFFERENCE, "", "", CONSECUTIVE]


def test_a_guard_knows_only_the_difference():
    cache = DBCache(threshold=0.1, warmup_steps=9, max_consecutive=0)
    decider = Decider(cache, guards=True)
    assert decider.before_probe(0) is None
    assert decider.after_probe(0.05) == ""
    assert decider.after_probe(0.1) == DIFFERENCE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", -0.1),
        ("threshold", float("nan")),
        ("threshold", float("inf")),
        ("threshold", "0.1"),
        ("probe_blocks", -1),
        ("corrector_blocks", 1.5),
        ("warmup_steps", -1),
        ("warmup_interval", 0),
        ("max_consecutive", -1),
        ("max_cached", True),
        ("max_accumulated", -1.0),
        ("forecast_order", 3),
        ("branches", "both"),
        ("probe_stride", 0),
        ("store", "disk"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(field, value):
    with pytest.raises(PlanError, match=rf"{field} is .*found"):
        DBCache(**{field: value})


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="treshold"):
        DBCache(treshold=0.1)
