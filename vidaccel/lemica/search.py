"""The best computed steps for each budget: exact paths through a DAG of cache segments.

LeMiCa (arXiv 2511.00090, Eq. 5) takes, of all paths from the first to the last step over B nodes,
the one whose segment errors, in descending order, are lexicographically smallest: "leximax".
Adding a segment to two paths never changes which of them is better, so dynamic programming over
(node, number of segments left) is exact. `solve_edges` generalises it to a multigraph: several
forecasts for a segment, errors that depend on the computed step before, and costs other than one
per step. There are two solvers:

- `_Table` writes an objective as a sum of Python integers, and all budgets come out of one pass.
  For leximax an error of rank r weighs 2^(w(r - 1)), where w bits count to the longest path.
- `_peel` settles one error level after another for one budget, on bit sets of segment counts: the
  smallest worst error, then the fewest segments that have it, then the next level on the paths
  that remain. It serves graphs whose table would be too large.

Ties are broken by the smaller sum of unrounded errors, then by fewer computed steps (only with
`at_most`), then by the lexicographically smallest list of steps.
"""

import heapq
import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidaccel.errors import PlanError
from vidaccel.lemica.dag import (
    EVERY_COUNT,
    Dag,
    WeightedEdge,
    dag_of_edges,
    dag_of_errors,
    integers,
    whole_numbers,
)
from vidaccel.plans.edge import Edge
from vidaccel.plans.plan import Plan

# One table of leximax labels may take this many bytes; above it, budgets are peeled one by one.
TABLE_BYTES = 64_000_000

# Larger exponents would underflow on ordinary errors; leximax is their limit.
MAX_EXPONENT = 100.0


def solve(
    errors: ArrayLike,
    budgets: Iterable[int] | None = None,
    *,
    objective: str = "leximax",
    forced: Iterable[int] = (),
    forbidden: Iterable[int] = (),
    virtual_end: bool = False,
    at_most: bool = False,
    quantum: float = 0.0,
) -> dict[int, Plan]:
    """Find the best plan for each budget of computed steps.

    Args:
        errors: [T, T] array; `errors[i, j]` for i < j is the outcome error of computing steps i and
            j and reusing in between, `inf` where that is not allowed. `errors[i, i + 1]` is 0.
            Entries on and below the diagonal are no segments, whatever their error.
        budgets: numbers of computed steps B; None answers every feasible one.
        objective: "leximax", "sum" of the errors, "power(g)" the sum of their g-th powers, or
            "bottleneck" the largest error, then the sum.
        forced: steps that must be computed.
        forbidden: steps that must be reused.
        virtual_end: the run may end on reused steps: `errors` is [T + 1, T + 1], and its last
            column holds the error of computing i and reusing all that follows.
        at_most: answer the best plan of B *or fewer* steps: measured errors may grow with B.
        quantum: errors are first rounded to a multiple of this, in units of `errors`; differences
            below it, such as the noise floor, decide only ties. 0 compares them exactly.

    Returns:
        Budget -> plan with its error per segment; an infeasible budget is absent.

    Raises:
        PlanError: when `errors` is not such an array, or an option contradicts it.
    """
    dag = dag_of_errors(errors, forced, forbidden, virtual_end, quantum)
    wanted = range(1, dag.steps + 1) if budgets is None else whole_numbers(budgets, "budgets")
    return _solved(dag, wanted, objective, at_most)


def solve_edges(
    edges: Iterable[Edge],
    num_inference_steps: int,
    budgets: Iterable[int] | None = None,
    *,
    objective: str = "leximax",
    virtual_end: bool = False,
    at_most: bool = False,
    quantum: float = 0.0,
    step_cost: int = 1,
) -> dict[int, Plan]:
    """Find the best plan for each budget of a multigraph: its steps, and a forecast per segment.

    Exact as `solve` is, over the graph whose nodes are (previous computed step, computed step).

    Args:
        edges: two between the same steps are alternatives. A path takes an edge that names a
            previous step only after that step. Without reused steps there must be an edge of error
            0 wherever two steps may be computed in a row.
        num_inference_steps: T.
        budgets: total costs: `step_cost` for each computed step and the cost of each edge; None
            answers every feasible one up to T computed steps.
        objective, virtual_end, at_most, quantum: as `solve` takes them.
        step_cost: what a computed step costs. Edges that cost something, such as refreshing a
            cache, need it larger than 1, so that they are integers.

    Returns:
        Budget -> plan with the error, forecast order and scale of each segment.

    Raises:
        PlanError: an edge or an option that is out of range.
    """
    dag = dag_of_edges(edges, num_inference_steps, virtual_end, quantum, step_cost)
    every = range(step_cost, step_cost * num_inference_steps + 1)
    wanted = every if budgets is None else whole_numbers(budgets, "budgets")
    return _solved(dag, wanted, objective, at_most)


def _solved(dag: Dag, budgets: Iterable[int], objective: str, at_most: bool) -> dict[int, Plan]:
    exponent = _exponent(objective)
    most = dag.end * max((edge.cost for edge in dag.weighted), default=0)
    counts = {b: dag.spent(b) for b in budgets if 0 < dag.spent(b) <= most}
    longest = max(counts.values(), default=0)
    weights = _weights(dag, objective, exponent, longest)
    table = None if weights is None else _Table(dag.weighted, weights, dag.end, longest)
    plans = {}
    for budget, count in counts.items():
        targets = (2 << count) - 1 if at_most else 1 << count
        best = table or _one_budget(dag, objective, targets)
        if (path := best.best_path(targets)) is not None:
            plans[budget] = dag.plan(path)
    return plans


class _Table:
    """The least weight from every node to the end, for every number of segments.

    Args:
        edges: in order of start, then end.
        weights: what each edge adds, one non-negative integer of any length per edge.
        last: the node at which paths end; they start at node 0.
        longest: the largest cost of a path, and so of its segments, which cost 1 or more.
    """

    def __init__(
        self, edges: list[WeightedEdge], weights: list[int], last: int, longest: int
    ) -> None:
        self.unreached = (max(weights, default=0) << longest.bit_length()) + 1
        self.successors: list[list[_Successor]] = [[] for _ in range(last)]
        for edge, weight in zip(edges, weights, strict=True):
            onward = _Successor(edge.end, edge.position, weight, edge.counts, edge.cost)
            self.successors[edge.start].append(onward)
        self.best = np.full((last + 1, longest + 1), self.unreached, dtype=object)
        self.best[last, 0] = 0
        for start in reversed(range(last)):
            for cost, successors in _by_cost(self.successors[start]):
                if cost <= longest:
                    through = self._through(successors, cost).min(axis=0)
                    self.best[start, cost:] = np.minimum(self.best[start, cost:], through)

    def _through(self, successors: list["_Successor"], cost: int) -> NDArray[np.object_]:
        """Return [successors, longest + 1 - cost] weights to the end by each, from `cost` up."""
        ends, _, weights, counts, _ = zip(*successors, strict=True)
        labels: NDArray[np.object_] = self.best[list(ends), : self.best.shape[1] - cost]
        labels = labels + np.array(weights, dtype=object)[:, None]
        if EVERY_COUNT in counts:  # then it is so for all of them
            return labels
        width = labels.shape[1]
        size = (width + cost) // 8 + 1
        packed = np.frombuffer(b"".join(c.to_bytes(size, "little") for c in counts), np.uint8)
        bits = np.unpackbits(packed.reshape(-1, size), axis=1, bitorder="little")
        return np.where(bits[:, cost : cost + width], labels, self.unreached)

    def best_path(self, targets: int) -> tuple[int, ...] | None:
        """Return the positions of the edges of the best path from 0 to the end; None without one.

        A best-first search: the table tells exactly what the rest of a path will weigh.

        Args:
            targets: the costs that the path may have, as a bit set.
        """
        # Ties are broken by the nodes of the path, then by its edges.
        heap: list[tuple[Any, int, tuple[int, ...], tuple[int, ...], int]] = [
            (weight, count, (0,), (), count)
            for count, weight in enumerate(self.best[0])
            if targets >> count & 1 and weight < self.unreached
        ]
        heapq.heapify(heap)
        while heap:
            weight, count, path, taken, left = heapq.heappop(heap)
            if left == 0:
                return taken
            spent = weight - self.best[path[-1], left]
            for end, position, added, counts, cost in self.successors[path[-1]]:
                if cost > left or not counts >> left & 1:
                    continue
                rest = self.best[end, left - cost]
                if rest < self.unreached:
                    onward = ((*path, end), (*taken, position), left - cost)
                    heapq.heappush(heap, (spent + added + rest, count, *onward))
        return None


class _Successor(NamedTuple):
    """An edge of a table, seen from where it starts."""

    end: int
    position: int
    weight: int
    counts: int
    cost: int


def _by_cost(successors: list[_Successor]) -> Iterator[tuple[int, list[_Successor]]]:
    for cost in sorted({successor.cost for successor in successors}):
        yield cost, [successor for successor in successors if successor.cost == cost]


def _one_budget(dag: Dag, objective: str, targets: int) -> _Table:
    """Return the table of raw errors over the best paths alone, whose costs are in `targets`."""
    edges = dag.weighted
    if not _reach(edges, dag.end, len(edges))[0] & targets:
        edges = []
    elif objective == "leximax":
        edges = _peel(edges, dag.end, targets)
    else:
        edges = _below_bottleneck(edges, dag.end, targets)
    return _Table(edges, [edge.raw for edge in edges], dag.end, targets.bit_length() - 1)


def _peel(edges: list[WeightedEdge], last: int, targets: int) -> list[WeightedEdge]:
    """Return the edges that make up the leximax paths, and at which segment counts.

    A settled level occurs equally often on every remaining path, so it counts as rank 0 from then.
    """
    while True:
        edges = _below_bottleneck(edges, last, targets)
        level = max(edge.rank for edge in edges)
        if level == 0:
            return edges
        edges = _fewest(edges, level, last, targets)


def _below_bottleneck(edges: list[WeightedEdge], last: int, targets: int) -> list[WeightedEdge]:
    """Return the edges up to the smallest rank that some path can keep to."""
    levels = sorted({edge.rank for edge in edges})
    enough = bisect_left(
        levels, True, key=lambda level: _reach(edges, last, level)[0] & targets != 0
    )
    return [edge for edge in edges if edge.rank <= levels[enough]]


def _reach(edges: list[WeightedEdge], last: int, level: int) -> list[int]:
    """Per node, at what costs the end can be reached over ranks <= `level`, as a bit set."""
    reach = [0] * last + [1]
    for start, end, rank, _, counts, cost, _ in reversed(edges):
        if rank <= level:
            reach[start] |= reach[end] << cost & counts
    return reach


def _fewest(edges: list[WeightedEdge], level: int, last: int, targets: int) -> list[WeightedEdge]:
    """Keep the edges of the paths that have the fewest segments of rank `level`, now settled."""
    within = [[0] * (last + 1)]  # within[m + 1]: as _reach, over at most m segments of that rank
    while not within[-1][0] & targets:
        reach = [0] * last + [1]
        for start, end, rank, _, counts, cost, _ in reversed(edges):
            onward = within[-1] if rank == level else reach
            reach[start] |= onward[end] << cost & counts
        within.append(reach)

    used = [0] * len(edges)
    here = [within[-1][0] & targets] + [0] * last  # as within, but on a path from node 0
    for same, fewer in itertools.pairwise(reversed(within)):
        after = [0] * (last + 1)
        for index, (start, end, rank, _, counts, cost, _) in enumerate(edges):
            onward, reached = (fewer, after) if rank == level else (same, here)
            passed = here[start] & counts & onward[end] << cost
            used[index] |= passed
            reached[end] |= passed >> cost
        here = after
    return [
        edge._replace(rank=0 if edge.rank == level else edge.rank, counts=counts)
        for edge, counts in zip(edges, used, strict=True)
        if counts
    ]


def _exponent(objective: str) -> float | None:
    """Return the power to which an objective raises errors; None when it only orders them."""
    if objective in ("leximax", "bottleneck"):
        return None
    if objective == "sum":
        return 1.0
    match = re.fullmatch(r"power\((\d+(?:\.\d+)?)\)", str(objective))
    if match is None or not 0 < float(match[1]) <= MAX_EXPONENT:
        raise PlanError(
            "objective is 'leximax', 'sum', 'bottleneck' or 'power(g)' with "
            f"0 < g <= {MAX_EXPONENT:g}, found {objective!r}"
        )
    return float(match[1])


def _weights(dag: Dag, objective: str, exponent: float | None, longest: int) -> list[int] | None:
    """Return what each edge adds to a path; None when the objective has no sum, or a huge one."""
    width = longest.bit_length()
    if exponent is not None:
        scale = -math.frexp(max(dag.quantised, default=0.0))[1]  # exactly, to at most 1
        scaled = [math.ldexp(value, scale) for value in dag.quantised.tolist()]
        main = integers([value**exponent for value in scaled])
    elif objective == "leximax":
        ranks = [edge.rank for edge in dag.weighted]
        if max(ranks, default=0) * width / 8 * longest * dag.end > TABLE_BYTES:
            return None
        main = [1 << width * (rank - 1) if rank else 0 for rank in ranks]
    else:
        return None
    shift = max((edge.raw for edge in dag.weighted), default=0).bit_length() + width
    return [(weight << shift) + edge.raw for weight, edge in zip(main, dag.weighted, strict=True)]
