"""The segments that a plan may use, as an exact, integer-weighted DAG over the denoising steps."""

import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidaccel.errors import PlanError
from vidaccel.plans.plan import Plan

Segment = tuple[int, int]  # start, end: compute both, reuse in between
Line = tuple[int, int, int]  # the same and the computed step before start, for a line through both

# How far along a line the residual of a reused step is taken to be; holding is 0.
SCALES = (0.25, 0.5, 0.75, 1.0)

EVERY_COUNT = -1  # as a bit set: every number of segments


class Edge(NamedTuple):
    """A segment: compute `start` and `stop`, reuse in between."""

    start: int
    stop: int
    rank: int  # of the quantised error among all of them; 0 is no error
    raw: int  # the error as an exact integer, on one scale for the whole graph
    counts: int  # bit k: the segment may be used where costs of k are left, its own included
    cost: int  # what it takes of the budget, 1 or more; in a plain graph 1
    position: int  # in the graph


class Move(NamedTuple):
    """One way to get from a computed step to the next: an edge of the multigraph.

    Attributes:
        start, stop: compute both, reuse in between; T as `stop` reuses to the end.
        error: what that costs in quality, >= 0.
        order, scale: of the forecast on the reused steps; 0 holds.
        previous: the computed step before `start` that the error holds for; None for any.
        cost: what the reused steps take of the budget, in the units of `step_cost`.
    """

    start: int
    stop: int
    error: float
    order: int = 0
    scale: float = 1.0
    previous: int | None = None
    cost: int = 0


@dataclass(frozen=True)
class Dag:
    """The allowed segments, in order of start, then stop.

    Attributes:
        steps: number of denoising steps T.
        end: the node at which every path ends; all start at node 0.
        virtual_end: that node is no step.
        edges: the allowed segments.
        quantised: [len(edges)] their errors after rounding.
        moves: [len(edges)] what each of them does.
        step_cost: what a computed step takes of the budget.
    """

    steps: int
    end: int
    virtual_end: bool
    edges: list[Edge]
    quantised: NDArray[np.float64]
    moves: list[Move]
    step_cost: int = 1

    def spent(self, budget: int) -> int:
        """What the segments of a path cost in all that keeps to `budget`."""
        return budget - self.step_cost * (not self.virtual_end)

    def plan(self, path: Sequence[int]) -> Plan:
        """The plan of a path, given as positions in `edges`.

        The virtual end is no step, and its empty segment no error.
        """
        taken = [self.moves[position] for position in path]
        if self.virtual_end and taken[-1].start == self.steps - 1:
            taken = taken[:-1]
        steps = tuple(move.start for move in taken)
        if not self.virtual_end or not taken or taken[-1].stop < self.steps:
            steps += (taken[-1].stop if taken else 0,)
        orders = tuple(move.order for move in taken)
        scales = tuple(move.scale for move in taken)
        return Plan(
            steps,
            self.steps,
            tuple(move.error for move in taken),
            orders if any(orders) else (),
            scales if any(orders) and any(scale != 1.0 for scale in scales) else (),
        )


def segment_dag(
    errors: ArrayLike,
    forced: Iterable[int],
    forbidden: Iterable[int],
    virtual_end: bool,
    quantum: float,
) -> Dag:
    """The segments that the arguments of `search.solve` allow.

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
    starts, stops = np.nonzero(allowed)
    values = matrix[starts, stops]
    moves = [
        Move(start, stop, float(error))
        for start, stop, error in zip(starts.tolist(), stops.tolist(), values, strict=True)
    ]
    ends = [(move.start, move.stop, 1) for move in moves]
    edges, quantised = _weighed(ends, values, quantum)
    return Dag(steps, end, bool(virtual_end), edges, quantised, moves)


def move_dag(
    moves: Iterable[Move], steps: int, virtual_end: bool, quantum: float, step_cost: int
) -> Dag:
    """The graph over (previous step, step) that a multigraph of moves unfolds into.

    A move that names no previous step is there after each of them. Of the moves between two nodes
    at one cost only the best can be on a best path, so only that one is kept; the first of equals.

    Raises:
        PlanError: a move outside the run or with an error or cost that is none.
    """
    if steps < 3:
        raise PlanError(f"a plan is searched over 3 steps or more, found {steps}")
    if step_cost < 1:
        raise PlanError(f"step_cost is 1 or more, found {step_cost}")
    last = steps if virtual_end else steps - 1
    by_start: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        if not 0 <= move.start < move.stop <= steps:
            raise PlanError(f"found a move from {move.start} to {move.stop} in {steps} steps")
        if not 0 <= move.error < math.inf:
            raise PlanError(f"the error of a move is a finite number >= 0, found {move.error!r}")
        if move.cost < 0:
            raise PlanError(f"the cost of a move is 0 or more, found {move.cost}")
        if move.stop <= last:
            by_start[move.start].append(move)
    # Only a step that some move asks the previous step of needs a node for each of them.
    asked = {
        start for start, found in by_start.items() if any(m.previous is not None for m in found)
    }
    nodes: dict[tuple[int, int | None], int] = {(0, None): 0}
    best: dict[tuple[int, int, int], Move] = {}
    frontier: dict[int, list[tuple[int, int | None]]] = defaultdict(list, {0: [(0, None)]})
    for step in range(last):
        for here in frontier[step]:
            for move in by_start[step]:
                if move.previous is not None and move.previous != here[1]:
                    continue
                there = (move.stop, step if move.stop in asked and move.stop < last else None)
                if there not in nodes:
                    nodes[there] = len(nodes)
                    frontier[move.stop].append(there)
                cost = move.cost + step_cost
                key = (nodes[here], nodes[there], cost)
                if key not in best or move.error < best[key].error:
                    best[key] = move
    # Nodes by step, so that an edge always leads to a later one and the end is the last.
    ordered = sorted(nodes, key=lambda node: (node[0], -1 if node[1] is None else node[1]))
    place = {nodes[node]: position for position, node in enumerate(ordered)}
    rows = sorted(
        (((place[a], place[b], cost), move) for (a, b, cost), move in best.items()),
        key=lambda row: row[0],
    )
    values = np.array([move.error for _, move in rows])
    edges, quantised = _weighed([row for row, _ in rows], values, quantum)
    end = place.get(nodes.get((last, None), -1), len(ordered))
    return Dag(steps, end, virtual_end, edges, quantised, [move for _, move in rows], step_cost)


def _weighed(
    nodes: Sequence[tuple[int, int, int]], values: NDArray[np.float64], quantum: float
) -> tuple[list[Edge], NDArray[np.float64]]:
    """Edges from (start, stop, cost) and their errors, and the errors after rounding."""
    quantised = values
    if quantum != 0:
        if not 0 < quantum < math.inf or float(values.max(initial=0.0)) / quantum == math.inf:
            raise PlanError(f"quantum is 0, or a number on the scale of errors, found {quantum!r}")
        quantised = np.rint(values / quantum)
    ranks = np.unique(np.append(0.0, quantised), return_inverse=True)[1][1:]
    rows = zip(nodes, ranks.tolist(), integers(values), strict=True)
    edges = [
        Edge(start, stop, rank, raw, EVERY_COUNT, cost, position)
        for position, ((start, stop, cost), rank, raw) in enumerate(rows)
    ]
    return edges, quantised


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
