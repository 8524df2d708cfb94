"""BudCache's search, on errors that are known."""

from vidaccel.bench.budcache import annealing
from vidaccel.plans.plan import Plan

BEST = (0, 1, 2, 4, 9)


def _distance(plan):
    return sum(abs(a - b) for a, b in zip(plan.steps, BEST, strict=True))


def _run(search, error):
    runs, sent = [], None
    try:
        while True:
            sample, plan = search.send(sent)
            runs.append((sample, plan.steps))
            sent = error(plan) * (1 + sample)
    except StopIteration as end:
        return runs, end.value


def test_annealing_comes_near_the_best_list_within_its_runs():
    runs, found = _run(annealing(5, 24, 2, 120), _distance)
    assert len(runs) == 120
    assert {sample for sample, _ in runs} == {0, 1}
    assert all(len(steps) == 5 and steps[0] == 0 for _, steps in runs)
    assert _distance(found) < 0.3 * _distance(Plan.spread(5, 24))
    assert _run(annealing(5, 24, 2, 120), _distance)[1] == found
    assert min(_distance(Plan(steps, 24)) for _, steps in runs) == _distance(found)


def test_annealing_ends_when_every_list_was_met():
    runs, found = _run(annealing(2, 4, 1, 100), lambda plan: float(plan.steps[1]))
    assert found.steps == (0, 1) and len(runs) == 3
