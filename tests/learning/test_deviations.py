"""Sums over steps against the definition, segment by segment."""

import pytest
import torch

from vidaccel.learning.deviations import LINE_GAPS, Deviations
from vidaccel.plans.forecast import damped_scales

STEPS, SKIP, SIZE = 9, 4, 6
SIGMAS = tuple(1.0 - (i / STEPS) ** 1.5 for i in range(STEPS))
WEIGHTS = tuple(a - b for a, b in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True))
BRANCHES = {"cond": 3.0, "uncond": -2.0}


def _outputs():
    """What each step becomes around the residual of each step: [branch][step][residual]."""
    generator = torch.Generator().manual_seed(0)
    return {
        branch: torch.randn(STEPS, STEPS, SIZE, generator=generator, dtype=torch.float64)
        for branch in BRANCHES
    }


def _run(outputs, switch=None):
    found = Deviations(SIGMAS, WEIGHTS, SKIP)
    for step in range(STEPS):
        if step:
            found.close(step, BRANCHES)
        if step == switch:
            found.restart(step)
        for branch in BRANCHES:
            needed = found.needed(step)
            found.add(branch, step, outputs[branch][step, needed])
    found.close(STEPS, BRANCHES)
    return found.result()


def _expected(outputs, start, end, previous=None, scale=0.0):
    total = torch.zeros(SIZE, dtype=torch.float64)
    for branch, share in BRANCHES.items():
        for step in range(start + 1, end):
            around = outputs[branch][step]
            change = around[start] - around[step]
            if previous is not None:
                reach = (SIGMAS[start] - SIGMAS[step]) / (SIGMAS[previous] - SIGMAS[start])
                change = change + scale * reach * (around[start] - around[previous])
            total += share * WEIGHTS[step] * change
    return float(total.abs().mean())


def test_every_segment_and_line_is_the_sum_over_its_steps():
    outputs = _outputs()
    holds, lines = _run(outputs)
    segments = {(i, j) for i in range(STEPS) for j in range(i + 2, min(i + SKIP, STEPS) + 1)}
    assert set(holds) == segments
    for (start, end), found in holds.items():
        assert found == pytest.approx(_expected(outputs, start, end))
    assert set(lines) == {(i, j, i - gap) for i, j in segments for gap in LINE_GAPS if gap <= i}
    for (start, end, previous), found in lines.items():
        steps = (previous, start) if end == STEPS else (previous, start, end)
        scale = damped_scales(steps, SIGMAS)[1]
        assert found == pytest.approx(_expected(outputs, start, end, previous, scale))


def test_nothing_reaches_over_the_switch_of_two_transformers():
    outputs = _outputs()
    holds, lines = _run(outputs, switch=5)
    assert all(not start < 5 < end for start, end in holds)
    assert (2, 5) in holds and (5, 7) in holds
    assert all(start < 5 or previous >= 5 for start, _, previous in lines)
    assert holds[2, 5] == pytest.approx(_expected(outputs, 2, 5))
    assert (3, 5, 1) in lines
