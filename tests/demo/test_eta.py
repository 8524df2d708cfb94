"""The estimate of the time that is left."""

import pytest

from vidaccel.demo.eta import Eta
from vidaccel.engine.stats import StepKind


def test_reused_steps_are_known_to_be_cheap(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vidaccel.demo.eta.time.perf_counter", lambda: now[0])
    eta = Eta(8)
    eta.start()
    for kind, seconds in (
        (StepKind.COMPUTED, 4.0),
        (StepKind.COMPUTED, 4.0),
        (StepKind.REUSED, 1.0),
    ):
        now[0] += seconds
        eta.start()
        eta.end_step(kind)
    computed = [True, True, False, False, True, False, False, True]
    assert eta.seconds_left(computed) == pytest.approx(2 * 4.0 + 3 * 1.0)
    assert eta.seconds_left() == pytest.approx(5 * 3.0)
