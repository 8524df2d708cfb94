"""Measured segments against full runs, on tiny random pipelines."""

import pytest
import torch
from conftest import CASES, STEPS, wan, wan22, wan_unipc, wan_v2v

from vidaccel import Plan, accelerate, restore
from vidaccel.api import engines_of
from vidaccel.errors import PlanError
from vidaccel.lemica.calibrate import Replayer, exact_errors, gain_errors, l1, segments


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
        assert replayer.forwards == STEPS + (STEPS - 2) - 1
        replayer.deviations(1, 3)
        assert replayer.forwards == STEPS + (STEPS - 2) - 1 + 1


@pytest.mark.parametrize("build", [wan, wan_unipc], ids=["euler", "unipc"])
def test_deviations_are_those_of_the_run(build):
    case = build()
    with Replayer(case.pipe, case.kwargs) as replayer:
        for start in range(STEPS - 1):
            found = replayer.deviations(start, 3)
            assert list(found) == [end for s, end in segments(STEPS, 3) if s == start]
            if STEPS in found:  # reused to the end: the deviation is the error itself
                assert found[STEPS] == pytest.approx(replayer.error(start, STEPS))


def test_estimates_rank_segments_like_exact_errors():
    case = wan()
    with Replayer(case.pipe, case.kwargs) as replayer:
        exact = exact_errors(replayer, max_skip=4)
        before = replayer.forwards
        estimated = gain_errors(replayer, max_skip=4, interval=2)
        assert replayer.forwards - before < 4 * STEPS
    assert set(estimated) == set(exact)
    for segment, error in exact.items():
        assert estimated[segment] == pytest.approx(error, rel=0.5)


def test_no_segment_crosses_the_switch_between_two_experts():
    case = wan22()
    with Replayer(case.pipe, case.kwargs) as replayer:
        switch = replayer.reference.switch
        assert switch is not None and 0 < switch < STEPS
        assert not any(s < switch < e for s, e in gain_errors(replayer, max_skip=4))


def test_runs_that_cannot_be_calibrated():
    case = wan_v2v()
    with pytest.raises(PlanError, match="whole schedule"):
        Replayer(case.pipe, case.kwargs)
    assert not engines_of(case.pipe)  # left as it was
    case = wan()
    with pytest.raises(PlanError, match="3 steps or more"):
        Replayer(case.pipe, {**case.kwargs, "num_inference_steps": 2})
