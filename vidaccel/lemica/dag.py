"""The edges that a plan may use, as an exact, integer-weighted DAG over the denoising steps."""

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidaccel.errors import PlanError
from vidaccel.plans.edge import Edge
from vidaccel.plans.plan import Plan

EVERY_COUNT = -1  # as a bit set: every number of segments


class WeightedEdge(NamedTuple):
    """An edge as the exact search takes it: between nodes of the graph, its error an integer."""

    start: int
    end: int
    rank: int  # of the quantised error among all of them; 0 is no error
    raw: int  # the error as an exact integer, on one scale for the whole graph
    counts: int  # bit k: the edge may be used where costs of k are left, its own included
    cost: int  # what it takes of the budget, 1 or more; in a plain graph 1
    position: int  # in the graph


@dataclass(frozen=True)
class Dag:
    """The allowed edges, in order of start, then end.

    Attributes:
        steps: number of denoising steps T.
        end: the node at which every path ends; all start at node 0.
        virtual_end: that node is no step.
        weighted: the allowed edges between nodes.
        quantised: [len(weighted)] their errors after rounding.
        edges: [len(weighted)] what each of them does, between steps.
        step_cost: what a computed step takes of the budget.
    """

    steps: int
    end: int
    virtual_end: bool
    weighted: list[WeightedEdge]
    quantised: NDArray[np.float64]
    edges: list[Edge]
    step_cost: int = 1

    def spent(self, budget: int) -> int:
        """Return what the edges of a path that keeps to `budget` cost in all."""
        return budget - self.step_cost * (not self.virtual_end)

    def plan(self, path: Sequence[int]) -> Plan:
        """Return the plan of a path, given as positions in `edges`.

        The virtual end is no step, and its empty segment no error.
        """
        taken = [self.edges[position] for position in path]
        if self.virtual_end and taken[-1].start == self.steps - 1:
            taken = taken[:-1]
        steps = tuple(edge.start for edge in taken)
        if not self.virtual_end or not taken or taken[-1].end < self.steps:
            steps += (taken[-1].end if taken else 0,)
        orders = tuple(edge.order for edge in taken)
        scales = tuple(edge.scale for edge in taken)
        return Plan(
            steps,
            self.steps,
            tuple(edge.error for edge in taken),
            orders if any(orders) else (),
            scales if any(orders) and any(scale != 1.0 for scale in scales) else (),
        )


def dag_of_errors(
    errors: ArrayLike,
    forced: Iterable[int],
    forbidden: Iterable[int],
    virtual_end: bool,
    quantum: float,
) -> Dag:
    """Make the graph of the segments that the arguments of `search.solve` allow.

    Raises:
        PlanError: when `errors` is no such array, or an option contradicts it.
    """
    matrix = _checked(errors)
    end = len(matrix) - 1
    steps = len(matrix) - bool(virtual_end)
    if steps < 3:
        raise PlanError(f"a plan is searched over 3 steps or more, found {steps}")
    computed, reused = whole_numbers(forced, "forced"), whole_numbers(forbidden, "forbidden")
    for name, nodes in (("forced", computed), ("forbidden", reused)):
        for node in nodes:
            if not 0 <= node < steps:
                raise PlanError(f"{name} step {node} is outside 0 to {steps - 1}")
    clash = sorted({*computed, 0, end} & set(reused))
    if clash:
        raise PlanError(f"step {clash[0]} is forbidden, but it must be computed")

    allowed = np.triu(np.isfinite(matrix), 1)
    for node in computed:
        allowed[:node, node + 1 :] = False
    allowed[reused, :] = allowed[:, reused] = False
    starts, ends = np.nonzero(allowed)
    values = matrix[starts, ends]
    edges = [
        Edge(i, j, float(error))
        for i, j, error in zip(starts.tolist(), ends.tolist(), values, strict=True)
    ]
    places = [(edge.start, edge.end, 1) for edge in edges]
    weighted, quantised = _weighted(places, values, quantum)
    return Dag(steps, end, bool(virtual_end), weighted, quantised, edges)


def dag_of_edges(
    edges: Iterable[Edge], steps: int, virtual_end: bool, quantum: float, step_cost: int
) -> Dag:
    """Make the graph over (previous step, step) that a multigraph of edges unfolds into.

    An edge that names no previous step is there after each of them. Of the edges between two nodes
    at one cost only the best can be on a best path, so only that one is kept; the first of equals.

    Raises:
        PlanError: an edge outside the run or with an error or cost that is none.
    """
    if steps < 3:
        raise PlanError(f"a plan is searched over 3 steps or more, found {steps}")
    if step_cost < 1:
        raise PlanError(f"step_cost is 1 or more, found {step_cost}")
    last = steps if virtual_end else steps - 1
    nodes, best = _unfolded(_by_start(edges, steps, last), last, step_cost)
    # Nodes by step, so that an edge always leads to a later one and the end is the last.
    ordered = sorted(nodes, key=lambda node: (node[0], -1 if node[1] is None else node[1]))
    place = {nodes[node]: position for position, node in enumerate(ordered)}
    rows = sorted(
        (((place[a], place[b], cost), edge) for (a, b, cost), edge in best.items()),
        key=lambda row: row[0],
    )
    values = np.array([edge.error for _, edge in rows])
    weighted, quantised = _weighted([row for row, _ in rows], values, quantum)
    end = place.get(nodes.get((last, None), -1), len(ordered))
    return Dag(steps, end, virtual_end, weighted, quantised, [edge for _, edge in rows], step_cost)


def _by_start(edges: Iterable[Edge], steps: int, last: int) -> dict[int, list[Edge]]:
    """Check the edges up to the node `last`, and return them by their start."""
    found: dict[int, list[Edge]] = defaultdict(list)
    for edge in edges:
        if not 0 <= edge.start < edge.end <= steps:
            raise PlanError(f"found an edge from {edge.start} to {edge.end} in {steps} steps")
        if not 0 <= edge.error < math.inf:
            raise PlanError(f"the error of an edge is a finite number >= 0, found {edge.error!r}")
        if edge.cost < 0:
            raise PlanError(f"the cost of an edge is 0 or more, found {edge.cost}")
        if edge.end <= last:
            found[edge.start].append(edge)
    return found


# A step, and the computed step before it where some edge asks for that.
_Node = tuple[int, int | None]


def _unfolded(
    by_start: dict[int, list[Edge]], last: int, step_cost: int
) -> tuple[dict[_Node, int], dict[tuple[int, int, int], Edge]]:
    """Number the nodes that can be reached, and find the best edge between two at each cost."""
    asked = {
        start for start, found in by_start.items() if any(e.previous is not None for e in found)
    }
    nodes: dict[_Node, int] = {(0, None): 0}
    best: dict[tuple[int, int, int], Edge] = {}
    frontier: dict[int, list[_Node]] = defaultdict(list, {0: [(0, None)]})
    for step in range(last):
        for here in frontier[step]:
            for edge in by_start.get(step, ()):
                if edge.previous is not None and edge.previous != here[1]:
                    continue
                there = (edge.end, step if edge.end in asked and edge.end < last else None)
                if there not in nodes:
                    nodes[there] = len(nodes)
                    frontier[edge.end].append(there)
                key = (nodes[here], nodes[there], edge.cost + step_cost)
                if key not in best or edge.error < best[key].error:
                    best[key] = edge
    return nodes, best


def _weighted(
    places: Sequence[tuple[int, int, int]], values: NDArray[np.float64], quantum: float
) -> tuple[list[WeightedEdge], NDArray[np.float64]]:
    """Edges from (start, end, cost) and their errors, and the errors after rounding."""
    quantised = values
    if quantum != 0:
        if not 0 < quantum < math.inf or float(values.max(initial=0.0)) / quantum == math.inf:
            raise PlanError(f"quantum is 0, or a number on the scale of errors, found {quantum!r}")
        quantised = np.rint(values / quantum)
    ranks = np.unique(np.append(0.0, quantised), return_inverse=True)[1][1:]
    rows = zip(places, ranks.tolist(), integers(values), strict=True)
    weighted = [
        WeightedEdge(start, end, rank, raw, EVERY_COUNT, cost, position)
        for position, ((start, end, cost), rank, raw) in enumerate(rows)
    ]
    return weighted, quantised


def _checked(errors: ArrayLike) -> NDArray[np.float64]:
    """`errors` as a float array, or a PlanError that says what is wrong with it."""
    try:
        matrix = np.asarray(errors, dtype=np.float64)
    except (TypeError, ValueError):
        raise PlanError("errors must be a square array of numbers") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise PlanError(f"errors must be a square array, found shape {matrix.shape}")
    for name, wrong in (("NaN", np.isnan(matrix)), ("negative", matrix < 0)):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise PlanError(f"errors[{i}, {j}] is {name}: errors are >= 0, or inf for no edge")
    above = np.diagonal(matrix, 1)
    if above.any():
        i = int(np.flatnonzero(above)[0])
        raise PlanError(f"errors[{i}, {i + 1}] is {above[i]:g}: without a reused step it must be 0")
    return matrix


def whole_numbers(values: Iterable[Any], name: str) -> list[int]:
    """`values` as whole numbers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise PlanError(f"{name} must be a list of whole numbers, found {values!r}") from None


def integers(values: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """Integers in exactly the proportions of `values`, which are finite and >= 0."""
    mantissas, exponents = np.frexp(values)
    shifts = exponents - exponents[mantissas != 0].min(initial=exponents.max(initial=0))
    whole = (mantissas * 2.0**53).astype(np.int64).tolist()
    return [m << s if m else 0 for m, s in zip(whole, shifts.tolist(), strict=True)]
