"""Measured segments against full runs, on tiny random pipelines."""

import pytest
import torch

from tiny import CASES, STEPS
from tiny.wan import wan, wan22, wan_i2v, wan_unipc, wan_v2v
from vidaccel import Plan, accelerate, restore
from vidaccel.api import engines_of
from vidaccel.calibration import replay
from vidaccel.calibration.replay import Replayer, l1
from vidaccel.calibration.segment_errors import (
    deviations,
    errors_from,
    exact_errors,
    gain_errors,
    segments,
)
from vidaccel.clips import metrics
from vidaccel.errors import PlanError
from vidaccel.plans.edge import SCALES


def test_segments_reuse_something_and_are_not_too_long():
    found = list(segments(5, 3))
    assert found == [(0, 2), (0, 3), (1, 3), (1, 4), (2, 4), (2, 5), (3, 5)]
    assert all(2 <= end - start <= 3 for start, end in found)


@pytest.mark.parametrize(
    "name", ["wan", "wan_unipc", "wan22", "hunyuan15", "cogvideox", "wan_vace"]
)
def test_each_measured_segment_equals_a_full_run_with_only_that_one_reused(name):
    case = CASES[name]()
    baseline = case.run()
    expected = {}
    for start, end in segments(STEPS, 3):
        computed = [s for s in range(STEPS) if not start < s < end]
        accelerate(case.pipe, policy=Plan(tuple(computed), STEPS))
        expected[start, end] = l1(baseline, case.run())
    restore(case.pipe)
    with Replayer(case.pipe, case.kwargs) as replayer:
        measured = exact_errors(replayer, max_skip=3)
        assert replayer.noise_floor() == 0.0
        switch = replayer.reference.switch
    assert (switch is not None) == (name == "wan22")
    assert set(measured) == {e for e in expected if switch is None or not e[0] < switch < e[1]}
    for segment, error in measured.items():
        assert error == pytest.approx(expected[segment], rel=1e-5, abs=1e-9)
    assert torch.equal(case.run(), baseline)  # left as it was


def test_a_replay_computes_only_what_comes_after():
    case = wan()
    with Replayer(case.pipe, case.kwargs) as replayer:
        assert replayer.forwards == STEPS
        replayer.error(2, 4)
        assert replayer.forwards == STEPS + (STEPS - 4)
        replayer.drift(1, 3)
        replayer.drift(2, 3, 1, 0)
        assert replayer.forwards == STEPS + (STEPS - 4)


@pytest.mark.parametrize("build", [wan, wan_unipc], ids=["euler", "unipc"])
def test_deviations_are_those_of_the_run(build):
    case = build()
    with Replayer(case.pipe, case.kwargs) as replayer:
        for start in range(STEPS - 1):
            found = replayer.drift(start, 3)
            assert list(found) == [end for s, end in segments(STEPS, 3) if s == start]
            if STEPS in found:  # reused to the end: the deviation is the error itself
                error = replayer.error(start, STEPS)
                assert float(found[STEPS].abs().mean()) == pytest.approx(error)


def test_a_deviation_is_of_the_latents_alone():
    """What else goes into a step, the channels of a picture here, is no part of the mean."""
    case = wan_i2v()
    with Replayer(case.pipe, case.kwargs) as replayer:
        found = deviations(replayer, 3, starts=[2]).holds
        for end, difference in replayer.drift(2, 3).items():
            latents = difference[:, : replayer.reference.latents.shape[1]]
            assert found[2, end] == pytest.approx(float(latents.abs().mean()))


@pytest.mark.parametrize("build", [wan, wan_unipc], ids=["euler", "unipc"])
def test_a_line_is_drawn_through_the_steps_that_the_plan_computes(build):
    """Against a full run: the steps between its two points are reused there, and not isolated."""
    case = build()
    baseline = case.run()
    with Replayer(case.pipe, case.kwargs) as replayer:
        neighbours = replayer.error(2, 5, 1, 1)
        apart = replayer.error(2, 5, 1, 0)
        (line,) = {
            row[-1]
            for key, row in deviations(replayer, 3, lines=True, starts=[3]).lines.items()
            if key == (3, STEPS, 2)
        }
        assert line == pytest.approx(replayer.error(3, STEPS, 1, 2), rel=1e-4)
    plan = Plan((0, 1, 2, 5), STEPS, orders=(0, 0, 1))
    accelerate(case.pipe, policy=plan)
    assert neighbours == pytest.approx(l1(baseline, case.run()), rel=1e-5)
    assert apart != pytest.approx(neighbours, rel=1e-3)


def test_every_line_is_measured_at_every_scale():
    case = wan()
    with Replayer(case.pipe, case.kwargs) as replayer:
        found = gain_errors(replayer, 3, lines=True)
        exact = errors_from(replayer, 3, 2, lines=True)
    expected = {(s, e, p) for s, e in found.holds for p in range(max(0, s - 3), s)}
    assert set(found.lines) == {(s, e, p) for s, e, p in expected if s - p in (1, 2, 3)}
    assert all(len(row) == len(SCALES) and min(row) >= 0 for row in found.lines.values())
    # The exact ones keep the proportion to the held segment, whose own gain they share.
    for (start, end, previous), row in exact.lines.items():
        ratio = found.lines[start, end, previous][1] / found.holds[start, end]
        assert row[1] / exact.holds[start, end] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("metric", ["decoded", "lpips"])
def test_other_metrics_look_at_the_decoded_clip(metric, monkeypatch):
    untrained = metrics.load_lpips("squeeze", pretrained=False)  # no weights can be had here
    monkeypatch.setattr(replay.metrics, "load_lpips", lambda: untrained)
    case = wan()
    with Replayer(case.pipe, case.kwargs, metric=metric) as replayer:
        assert replayer.noise_floor() == 0.0
        small, large = replayer.error(0, 2), replayer.error(0, 5)
        assert 0 < small < large
        gain = gain_errors(replayer, 3)
        assert gain.holds[3, STEPS] == pytest.approx(replayer.error(3, STEPS), rel=0.7)
    with pytest.raises(PlanError, match="found 'psnr', expected one of l1, decoded, lpips"):
        Replayer(case.pipe, case.kwargs, metric="psnr")


def test_estimates_rank_segments_like_exact_errors():
    case = wan()
    with Replayer(case.pipe, case.kwargs) as replayer:
        exact = exact_errors(replayer, max_skip=4)
        before = replayer.forwards
        estimated = gain_errors(replayer, max_skip=4, interval=2).holds
        assert replayer.forwards - before < 4 * STEPS
    assert set(estimated) == set(exact)
    for segment, error in exact.items():
        assert estimated[segment] == pytest.approx(error, rel=0.5)


def test_no_segment_crosses_the_switch_between_two_experts():
    case = wan22()
    with Replayer(case.pipe, case.kwargs) as replayer:
        switch = replayer.reference.switch
        assert switch is not None and 0 < switch < STEPS
        assert not any(s < switch < e for s, e in gain_errors(replayer, max_skip=4).holds)


def test_runs_that_cannot_be_calibrated():
    case = wan_v2v()
    with pytest.raises(PlanError, match="whole schedule"):
        Replayer(case.pipe, case.kwargs)
    assert not engines_of(case.pipe)  # left as it was
    case = wan()
    with pytest.raises(PlanError, match="3 steps or more"):
        Replayer(case.pipe, {**case.kwargs, "num_inference_steps": 2})
