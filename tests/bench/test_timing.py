"""Medians of timings and how sure they are."""

import random

from vidaccel.bench.timing import median_interval


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    draw = random.Random(0)
    samples = [[draw.gauss(0.0, 1.0) for _ in range(51)] for _ in range(2000)]
    held = [low <= 0.0 <= high for low, high in map(median_interval, samples)]
    assert 0.93 < sum(held) / len(held) < 0.97
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)
