"""Settings that take a given time: the line they lie on, and how it is halved."""

from contextlib import nullcontext

import pytest

from tiny.points import point
from vidaccel.bench.tuning import Family, at_time, standing, tuned
from vidaccel.bench.variants import Variant

SETTINGS = (
    {"threshold": 0.01, "max_skip": 1, "warmup_steps": 10, "limit": -1},
    {"threshold": 0.04, "max_skip": 3, "warmup_steps": 10, "limit": 3},
    {"threshold": 0.64, "max_skip": 7, "warmup_steps": 4, "limit": None},
)


def family(settings=SETTINGS):
    return Family("cache", settings, lambda s: Variant("cache", s, lambda _: nullcontext()))


def test_a_position_between_two_settings():
    line = family()
    assert line.end == 2.0
    assert line.at(0, 50).setting == SETTINGS[0] and line.at(2, 50).setting == SETTINGS[2]
    between = {"threshold": 0.02, "max_skip": 2, "warmup_steps": 10, "limit": 3}
    assert line.at(0.5, 50).setting == between
    assert line.at(0.4, 50).setting["limit"] == -1
    short = line.at(1.5, 25).setting
    assert short["threshold"] == pytest.approx(0.16) and short["warmup_steps"] == 4
    assert line.at(1.8, 5).setting["warmup_steps"] == 1


def measured(speed):
    """Measures variants by a function of their threshold, and counts them."""
    asked = []

    def measure(variants):
        asked.extend(v.setting["threshold"] for v in variants if v.method == "cache")
        return [
            point(v.method, speed(v.setting.get("threshold", 2.0)), 50.0, setting=v.setting)
            for v in variants
            if speed(v.setting.get("threshold", 2.0))
        ]

    measure.asked = asked
    return measure


AUTO = [Variant("auto", {"budget": 1}, lambda _: nullcontext())]


def speeds_of(variants, speed):
    return sorted(speed(v.setting["threshold"]) for v in variants)


def test_settings_around_the_time_are_found():
    def speed(threshold):
        return 1 + 3 * threshold**0.5

    measure = measured(speed)
    found = tuned([family()], 50, measure, lambda points: [2.0], AUTO, rounds=6)
    slow, fast = speeds_of(found, speed)
    assert slow <= 2.0 <= fast
    assert 1 / slow - 1 / fast <= 0.07


@pytest.mark.parametrize("fixed", [1.5, 2.5])
def test_a_method_that_is_never_as_slow_or_fast_gives_its_nearest_setting(fixed):
    measure = measured(lambda threshold: fixed + threshold / 10)
    (found,) = tuned([family()], 50, measure, lambda points: [2.0], AUTO, rounds=4)
    assert found.setting["threshold"] == (0.64 if fixed < 2 else 0.01)


def test_settings_that_fail_are_gone_round():
    def speed(threshold):
        return None if threshold > 0.1 and threshold < 2 else 1 + 20 * threshold

    found = tuned([family()], 50, measured(speed), lambda points: [1.5], AUTO, rounds=3)
    assert len(found) <= 2 and all(v.setting["threshold"] <= 0.1 for v in found)
    nothing = tuned([family()], 50, measured(lambda t: None), lambda points: [1.5], AUTO)
    assert nothing == []


def test_quality_at_a_time():
    points = [point("a", 1.5, 50.0), point("a", 3.0, 30.0)]
    assert at_time(points, 1.2).psnr == 50.0, "more time than it can use"
    assert 30.0 < at_time(points, 2.0).psnr < 50.0
    assert at_time(points, 3.1).psnr == 30.0
    assert at_time(points, 4.0) is None and at_time([], 2.0) is None


def test_standing_over_settings():
    found = standing([point("a", 2.0, 40.0), point("a", 2.0, 30.0)])
    assert (found.settings, found.psnr, found.worst_setting) == (2, 35.0, 30.0)
    assert found.worst_prompt <= found.worst_setting
    assert standing([]) is None
