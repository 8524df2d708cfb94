"""The three clocks of a run."""

import os

import pytest

from vidaccel.clips import stopwatch
from vidaccel.clips.stopwatch import Clocks, Stopwatch, Times, machine_seconds


def ticking(*times):
    """A clock that shows one time after the other."""
    return iter(times).__next__


def test_what_others_used_is_what_the_machine_used_less_our_own():
    watch = Stopwatch(Clocks(ticking(100.0, 110.0), ticking(5.0, 12.0), ticking(50.0, 62.5)))
    assert watch.started == 100.0
    assert watch.read() == Times(wall=10.0, cpu=7.0, others=5.5)


def test_rounding_of_the_machines_clock_never_takes_others_below_nothing():
    watch = Stopwatch(Clocks(ticking(0.0, 1.0), ticking(0.0, 1.0), ticking(0.0, 0.99)))
    assert watch.read().others == 0.0


def test_a_machine_that_does_not_tell_leaves_others_unknown():
    watch = Stopwatch(Clocks(ticking(0.0, 1.0), ticking(0.0, 1.0), lambda: None))
    assert watch.read() == Times(1.0, 1.0, None)


def test_the_first_line_of_proc_stat_is_read(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr(stopwatch, "STAT", stat)
    assert machine_seconds() is None
    tick = os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(f"cpu  {tick} {tick} {tick} 999 999 {tick} {tick} {tick} 7 7\ncpu0 1 1 1\n")
    assert machine_seconds() == pytest.approx(6.0)
    stat.write_text("nonsense\n")
    assert machine_seconds() is None
