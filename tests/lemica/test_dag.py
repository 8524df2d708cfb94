"""The search over a multigraph: against every path of small ones, and what it does to ties."""

import itertools

import numpy as np
import pytest

from vidaccel.errors import PlanError
from vidaccel.lemica import search
from vidaccel.lemica.search import solve, solve_edges
from vidaccel.plans.edge import Edge, without_reuse

OBJECTIVES = ("leximax", "sum", "power(2)", "bottleneck")


def random_edges(rng, steps, levels, costs):
    """Holds between any two steps and some lines, with errors and costs of few values."""
    edges = without_reuse(steps)
    for start, end in itertools.combinations(range(steps + 1), 2):
        if end == start + 1 or rng.random() < 0.15:
            continue
        edges.append(Edge(start, end, float(rng.integers(levels)), cost=int(rng.integers(costs))))
        for previous in [*range(start), None]:
            if rng.random() < 0.4:
                error, cost = float(rng.integers(levels)), int(rng.integers(costs))
                edges.append(Edge(start, end, error, 1, 0.5, previous, cost))
    return edges


def value(objective, errors):
    return {
        "leximax": sorted(errors, reverse=True) + [0.0] * (20 - len(errors)),
        "sum": sum(errors),
        "power(2)": sum(error**2 for error in errors),
        "bottleneck": max(errors),
    }[objective]


def brute_force(edges, steps, objective, virtual_end, step_cost):
    """The value of the best path of every total cost."""
    end = steps if virtual_end else steps - 1
    found = {}

    def walk(here, previous, errors, cost):
        if here == end:
            total = cost + step_cost * (not virtual_end)
            key = value(objective, errors), sum(errors)
            found[total] = min(found.get(total, key), key)
            return
        for edge in edges:
            if edge.start == here and edge.end <= end and edge.previous in (None, previous):
                walk(edge.end, here, [*errors, edge.error], cost + edge.cost + step_cost)

    walk(0, None, [], 0)
    return found


def check(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        steps, step_cost = int(rng.integers(3, 7)), int(rng.integers(1, 4))
        edges = random_edges(rng, steps, int(rng.integers(2, 5)), 1 if step_cost == 1 else 3)
        virtual_end = bool(rng.integers(2))
        most = step_cost * steps
        for objective in OBJECTIVES:
            expected = brute_force(edges, steps, objective, virtual_end, step_cost)
            options = {"objective": objective, "virtual_end": virtual_end, "step_cost": step_cost}
            plans = solve_edges(edges, steps, **options)
            assert sorted(plans) == sorted(b for b in expected if b <= most)
            for budget, plan in plans.items():
                # The virtual end's own empty segment is no part of a plan.
                assert value(objective, [*plan.errors, 0.0]) == expected[budget][0]
                assert sum(plan.errors) == expected[budget][1]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_paths(seed):
    check(seed)


def test_the_second_solver_does_too(monkeypatch):
    monkeypatch.setattr(search, "TABLE_BYTES", -1)
    check(99)


def test_without_lines_and_costs_it_is_the_search_over_segments():
    rng = np.random.default_rng(5)
    errors = np.full((9, 9), np.inf)
    for start, end in itertools.combinations(range(9), 2):
        errors[start, end] = 0.0 if end == start + 1 else float(rng.integers(4))
    edges = [
        Edge(start, end, errors[start, end]) for start, end in itertools.combinations(range(9), 2)
    ]
    for objective in OBJECTIVES:
        assert solve_edges(edges, 9, objective=objective) == solve(errors, objective=objective)


def test_a_line_holds_only_after_its_own_previous_step():
    ones = without_reuse(5)
    holds = [Edge(0, 2, 1.0), Edge(1, 3, 1.0), Edge(2, 4, 3.0), Edge(1, 4, 9.0), Edge(0, 3, 9.0)]
    line = Edge(2, 4, 0.5, 1, 0.75, 0)
    plan = solve_edges([*ones, *holds, line], 5, [3])[3]
    assert (plan.steps, plan.orders, plan.scales) == ((0, 2, 4), (0, 1), (1.0, 0.75))
    # After step 1 the same segment can only be held.
    plan = solve_edges([*ones, *holds, line], 5, [4])[4]
    assert plan.orders == () and plan.steps in ((0, 1, 3, 4), (0, 2, 3, 4))


def test_what_costs_more_is_weighed_against_another_computed_step():
    ones = without_reuse(4)
    edges = [*ones, Edge(0, 2, 1.0), Edge(1, 3, 1.0), Edge(0, 3, 8.0), Edge(0, 3, 0.5, 2, cost=2)]
    # Two computed steps of 2 each and nothing else, then with the dearer forecast, then three.
    plans = solve_edges(edges, 4, step_cost=2)
    assert {b: (p.steps, p.orders) for b, p in plans.items() if b < 8} == {
        4: ((0, 3), ()),
        6: ((0, 3), (2,)),
    }
    assert plans[8].steps == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (Edge(0, 9, 0.1), "from 0 to 9"),
        (Edge(2, 1, 0.1), "from 2 to 1"),
        (Edge(0, 2, float("nan")), "finite number >= 0, found nan"),
        (Edge(0, 2, -1.0), "finite number >= 0"),
        (Edge(0, 2, 0.1, cost=-1), "cost of an edge"),
    ],
)
def test_wrong_edges_are_refused(edge, message):
    with pytest.raises(PlanError, match=message):
        solve_edges([edge], 5)
    with pytest.raises(PlanError, match="step_cost is 1 or more"):
        solve_edges([], 5, step_cost=0)
    with pytest.raises(PlanError, match="3 steps or more"):
        solve_edges([], 2)
    assert solve_edges([], 5) == {}
