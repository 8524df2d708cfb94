"""The DAG of segments: what its edges carry, and how samples become one error."""

import numpy as np
import pytest

from vidaccel.errors import PlanError
from vidaccel.lemica.graph import aggregate, search_edges, segment_graph, stability
from vidaccel.lemica.search import solve, solve_edges
from vidaccel.plans.edge import SCALES

T = 6


def measured(samples=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        (start, end): list(rng.uniform(0.1, 1.0, samples) * (end - start))
        for start in range(T - 1)
        for end in range(start + 2, min(start + 3, T) + 1)
    }


def test_edges_carry_every_sample():
    graph = segment_graph(measured(), T)
    assert graph.edges[0, 2]["errors"] == measured()[0, 2]
    assert graph.edges[0, 2]["mean"] == pytest.approx(np.mean(measured()[0, 2]))
    assert graph.edges[0, 2]["spread"] == pytest.approx(np.std(measured()[0, 2]))
    assert graph.edges[0, 2]["count"] == 5
    assert graph.edges[3, 4] == {"errors": [], "mean": 0.0, "spread": 0.0, "count": 0}
    assert not graph.has_edge(0, 4)


def test_aggregation():
    errors = {(0, 2): [1.0, 2.0, 3.0, 4.0, 10.0]}
    graph = segment_graph(errors, 3)
    values = {
        how: aggregate(graph, how, level=0.75)[0, 2] for how in ("mean", "max", "quantile", "cvar")
    }
    assert values == {"mean": 4.0, "max": 10.0, "quantile": 4.0, "cvar": 7.0}
    matrix = aggregate(graph)
    assert matrix.shape == (3, 3) and matrix[0, 1] == matrix[1, 2] == 0.0
    assert np.isinf(matrix[1, 0]) and np.isinf(matrix[0, 0])
    assert aggregate(segment_graph({(1, 3): [0.5]}, 3), virtual_end=True)[1, 3] == 0.5


def test_the_solver_takes_the_aggregated_errors():
    graph = segment_graph(measured(), T)
    plans = solve(aggregate(graph))
    assert plans and all(plan.steps[-1] == T - 1 for plan in plans.values())
    ended = solve(aggregate(graph, virtual_end=True), virtual_end=True)
    assert min(ended) <= min(plans)


def test_stability_is_certain_where_samples_agree():
    agreeing = {segment: errors[:1] * 4 for segment, errors in measured().items()}
    graph = segment_graph(agreeing, T)
    plan = solve(aggregate(graph), [4])[4]
    certain = stability(graph, [3, 4], rounds=20)
    assert certain[4].tolist() == [float(s in plan.steps) for s in range(T)]
    assert certain[3].sum() == pytest.approx(3)
    spread = stability(segment_graph(measured(), T), [4], rounds=50)[4]
    assert spread[0] == spread[-1] == 1.0
    assert spread.sum() == pytest.approx(4)
    assert np.array_equal(spread, stability(segment_graph(measured(), T), [4], rounds=50)[4])


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({(0, 1): [0.1]}, "segment 0 to 1"),
        ({(2, 9): [0.1]}, "segment 2 to 9"),
        ({(-1, 2): [0.1]}, "segment -1 to 2"),
        ({(0, 2): []}, "needs errors"),
        ({(0, 2): [-0.1]}, "needs errors"),
        ({(0, 2): [float("nan")]}, "needs errors"),
    ],
)
def test_wrong_measurements_are_refused(errors, message):
    with pytest.raises(PlanError, match=message):
        segment_graph(errors, T)


def test_wrong_questions_are_refused():
    graph = segment_graph(measured(), T)
    with pytest.raises(PlanError, match="found 'median'"):
        aggregate(graph, "median")
    with pytest.raises(PlanError, match="level: found 2"):
        aggregate(graph, "quantile", level=2)
    with pytest.raises(PlanError, match="no plan of 1 computed"):
        stability(graph, [1])
    uneven = measured()
    uneven[0, 2] = [0.1]
    with pytest.raises(PlanError, match="as many samples"):
        stability(segment_graph(uneven, T), [4])


def lines(better):
    """Lines of which the second scale has `better` times the error of holding."""
    return {
        (start, end, previous): [
            [error * factor for factor in (2.0, better, 2.0, 2.0)] for error in errors
        ]
        for (start, end), errors in measured().items()
        for previous in (start - 1, start - 3)
        if previous >= 0
    }


def test_a_line_is_offered_where_it_is_better():
    held = search_edges(segment_graph(measured(), T))
    assert {edge.order for edge in held} == {0}
    assert held == search_edges(segment_graph(measured(), T, lines(0.5)), faithful=True)
    assert held == search_edges(segment_graph(measured(), T, lines(1.5)))
    found = search_edges(segment_graph(measured(), T, lines(0.5)))
    by_previous = {(edge.start, edge.end, edge.previous): edge for edge in found}
    for start, end in measured():
        hold = by_previous[start, end, None]
        # Steps 1 and 3 before were measured; 2 before lies between them.
        for gap in (g for g in (1, 2, 3) if g <= start and (g == 1 or start >= 3)):
            line = by_previous[start, end, start - gap]
            assert (line.order, line.scale) == (1, SCALES[1])
            assert line.error == pytest.approx(hold.error / 2)
    plan = solve_edges(found, T, [4])[4]
    assert any(plan.orders) and len(plan.scales) == len(plan.orders)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({(0, 2, 0): [[0.1] * 4] * 5}, "does not fit"),
        ({(2, 4, 1): [[0.1] * 4]}, "does not fit"),
        ({(2, 4, 1): [[float("nan")] * 4] * 5}, "needs errors"),
    ],
)
def test_wrong_lines_are_refused(wrong, message):
    with pytest.raises(PlanError, match=message):
        segment_graph(measured(), T, wrong)
