"""Which plans are worth a run end to end."""

import itertools
import math
import random

import pytest

from vidaccel import Plan
from vidaccel.calibration.candidates import (
    candidates,
    head_and_gap,
    most_validation_forwards,
    priced,
    validated_budgets,
)
from vidaccel.lemica import search
from vidaccel.plans.edge import Edge
from vidaccel.plans.generic import generic_plan

STEPS, LONGEST = 20, 8


def held_edges(seed=0):
    """Errors that grow with the length of a segment, and are larger at either end of the run."""
    rng = random.Random(seed)
    return [
        Edge(i, j, (j - i - 1) * (1 + rng.random()) * (1 + abs(10 - i) / 5))
        for i in range(STEPS)
        for j in range(i + 1, min(i + LONGEST, STEPS - 1) + 1)
    ]


def with_lines(held):
    return held + [
        Edge(edge.start, edge.end, edge.error / 2, 1, 0.5, edge.start - 1)
        for edge in held
        if edge.start and edge.error
    ]


def gaps(plan):
    return [end - start for start, end in itertools.pairwise(plan.steps)]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("budget", [4, 5, 7, 10, 15, 19])
def test_every_candidate_keeps_to_the_budget_and_appears_once(budget, lines):
    held = held_edges()
    plans = candidates(with_lines(held) if lines else held, budget, STEPS)
    assert plans["evenly spaced"] == Plan.spread(budget, STEPS)
    assert {len(plan.steps) for plan in plans.values()} == {budget}
    keys = [(plan.steps, plan.orders, plan.scales) for plan in plans.values()]
    assert len(set(keys)) == len(keys)
    forecast = {name for name, plan in plans.items() if any(plan.orders)}
    assert bool(forecast) == lines
    assert all(name in forecast for name in plans if name.endswith("line"))


def test_the_last_steps_may_be_reused_and_the_generic_schedule_is_tried():
    held = held_edges()
    to_the_end = [Edge(i, STEPS, 0.01) for i in range(STEPS - 4, STEPS - 1)]
    sigmas = tuple(1 - step / STEPS for step in range(STEPS))
    plans = candidates([*with_lines(held), *to_the_end], 7, STEPS, sigmas)
    assert plans["generic schedule"].steps == generic_plan(7, STEPS, sigmas).steps
    ends = {name: plan.steps[-1] for name, plan in plans.items()}
    assert ends["leximax, lines"] == STEPS - 1, "the paper's paths compute the last step"
    assert ends["leximax, lines to the end"] < STEPS - 1
    short = candidates(with_lines(held), 7, STEPS)
    assert not any("to the end" in name for name in short), "nothing was measured to the end"


def test_shorter_segments_are_tried_where_they_are_a_choice():
    plans = candidates(held_edges(), 5, STEPS)
    short = {name: plan for name, plan in plans.items() if "segments up to" in name}
    # Four segments of 4 do not reach the end, four of 6 do; the best path has a longer one.
    assert max(gaps(plans["leximax"])) > 6
    assert list(short) == ["leximax, segments up to 6"]
    assert max(gaps(short["leximax, segments up to 6"])) <= 6


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_added_or_taken_away_where_it_changes_the_path_least(seed):
    held = held_edges(seed)
    errors = {(edge.start, edge.end): edge.error for edge in held}

    def worst_first(steps):
        segments = itertools.pairwise(steps)
        return sorted((errors.get(segment, math.inf) for segment in segments), reverse=True)

    paths = search.solve_edges(held, STEPS, [7, 8, 9])
    plans = candidates(held, 8, STEPS)
    expected = {
        "leximax of 7, one step added": [
            sorted({*paths[7].steps, step}) for step in set(range(STEPS)) - {*paths[7].steps}
        ],
        "leximax of 9, one step taken away": [
            [*paths[9].steps[:i], *paths[9].steps[i + 1 :]] for i in range(1, 8)
        ],
    }
    for name, possible in expected.items():
        best = min(map(worst_first, possible))
        assert best >= worst_first(paths[8].steps)
        # It is left out where it is a plan that is there already.
        found = plans[name] if name in plans else plans["leximax"]
        assert worst_first(found.steps) == best


def test_a_path_that_cannot_do_with_a_step_less_has_no_such_neighbour():
    chain = [Edge(i, i + 2, 1.0) for i in range(0, 18, 2)] + [Edge(18, 19, 0.0)]
    names = candidates(chain, 10, STEPS)
    assert not any("one step" in name for name in names)


def test_a_head_of_steps_is_followed_by_equal_gaps():
    plan = head_and_gap(8, STEPS, 4)
    assert plan is not None and plan.steps[0] == 0 and len(plan.steps) == 8
    assert gaps(plan) == sorted(gaps(plan)) and set(gaps(plan)) == {1, 4}
    assert head_and_gap(18, STEPS, 5) is None


@pytest.mark.parametrize("lines", [False, True])
def test_the_cost_of_a_validation_is_not_underestimated(lines):
    held = held_edges()
    edges = with_lines(held) if lines else held
    total = STEPS
    for budget in validated_budgets(STEPS):
        total += budget * (len(candidates(edges, budget, STEPS)) + 1)
    most = most_validation_forwards(STEPS, lines=lines, improved=False)
    assert total <= most <= 2 * total
    assert most_validation_forwards(STEPS, lines=lines, improved=True) > most


def test_plans_without_errors_get_those_of_their_segments():
    edges = [
        *(Edge(i, i + 1, 0.0) for i in range(6)),
        Edge(0, 2, 3.0),
        Edge(2, 4, 1.0),
        Edge(2, 4, 0.5, 1, 0.75, 0),
        Edge(4, 6, 0.25, 1, 1.0, 2),
    ]
    lines = Plan((0, 2, 4), 6, orders=(0, 1, 1), scales=(1.0, 0.3, 0.3))
    assert priced(lines, edges).errors == (3.0, 0.5, 0.25), "of the scale that was measured"
    assert priced(Plan((0, 2, 4), 6), edges).errors == (), "holding from 4 was not measured"
    whole = priced(Plan((0, 2, 4, 5), 6), edges)
    assert whole.errors == (3.0, 1.0, 0.0) and priced(whole, ()) is whole
