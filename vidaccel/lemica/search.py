"""The best computed steps for each budget: exact paths through a DAG of cache segments.

LeMiCa (arXiv 2511.00090, Eq. 5) takes, of all paths from the first to the last step over B nodes,
the one whose segment errors, in descending order, are lexicographically smallest: "leximax".
Adding a segment to two paths never changes which of them is better, so dynamic programming over
(node, number of segments left) is exact. There are two solvers:

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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidaccel.errors import PlanError
from vidaccel.lemica.segments import EVERY_COUNT, Dag, Edge, integers, segment_dag, whole_numbers
from vidaccel.plan import Plan

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
    """The best plan for each budget of computed steps.

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
    exponent = _exponent(objective)
    dag = segment_dag(errors, forced, forbidden, virtual_end, quantum)
    wanted = range(1, dag.steps + 1) if budgets is None else whole_numbers(budgets, "budgets")
    counts = {b: dag.segments(b) for b in wanted if 0 < dag.segments(b) <= dag.end}
    longest = max(counts.values(), default=0)
    weights = _weights(dag, objective, exponent, longest)
    table = None if weights is None else _Table(dag.edges, weights, dag.end, longest)
    plans = {}
    for budget, count in counts.items():
        targets = (2 << count) - 1 if at_most else 1 << count
        best = table or _one_budget(dag, objective, targets)
        for path in itertools.islice(best.ranking(targets), 1):
            plans[budget] = dag.plan(path)
    return plans


def candidates(
    errors: ArrayLike,
    budget: int,
    number: int,
    *,
    objective: str = "leximax",
    forced: Iterable[int] = (),
    forbidden: Iterable[int] = (),
    virtual_end: bool = False,
    quantum: float = 0.0,
) -> list[Plan]:
    """The `number` best plans of one budget, best first; fewer when there are no more.

    The first is the plan that `solve` gives. Arguments and errors are those of `solve`, except that
    "bottleneck" is refused, and so is "leximax" on a graph too large for one table.
    """
    exponent = _exponent(objective)
    dag = segment_dag(errors, forced, forbidden, virtual_end, quantum)
    budget, number = whole_numbers([budget, number], "budget and number")
    count = dag.segments(budget)
    if not 0 < count <= dag.end or number < 1:
        return []
    weights = _weights(dag, objective, exponent, count)
    if weights is None:
        raise PlanError(f"cannot rank plans of {dag.steps} steps by {objective!r}: try 'power(8)'")
    paths = _Table(dag.edges, weights, dag.end, count).ranking(1 << count)
    return [dag.plan(path) for path in itertools.islice(paths, number)]


class _Table:
    """The least weight from every node to the end, for every number of segments.

    Args:
        edges: in order of start, then stop.
        weights: what each edge adds, one non-negative integer of any length per edge.
        end: the node at which paths end; they start at node 0.
        longest: the largest number of segments of a path.
    """

    def __init__(self, edges: list[Edge], weights: list[int], end: int, longest: int) -> None:
        self.unreached = (max(weights, default=0) << longest.bit_length()) + 1
        self.successors: list[list[tuple[int, int, int]]] = [[] for _ in range(end)]
        for (start, stop, _, _, counts), weight in zip(edges, weights, strict=True):
            self.successors[start].append((stop, weight, counts))
        self.best = np.full((end + 1, longest + 1), self.unreached, dtype=object)
        self.best[end, 0] = 0
        for start in reversed(range(end)):
            if self.successors[start]:
                self.best[start, 1:] = self._through(self.successors[start]).min(axis=0)

    def _through(self, successors: list[tuple[int, int, int]]) -> NDArray[np.object_]:
        """[successors, longest] weights to the end by each of them, over 1, 2, ... segments."""
        stops, weights, counts = zip(*successors, strict=True)
        labels: NDArray[np.object_] = self.best[list(stops), :-1]
        labels = labels + np.array(weights, dtype=object)[:, None]
        if EVERY_COUNT in counts:  # then it is so for all of them
            return labels
        size = labels.shape[1] // 8 + 1
        packed = np.frombuffer(b"".join(c.to_bytes(size, "little") for c in counts), np.uint8)
        bits = np.unpackbits(packed.reshape(-1, size), axis=1, bitorder="little")
        return np.where(bits[:, 1 : labels.shape[1] + 1], labels, self.unreached)

    def ranking(self, targets: int) -> Iterator[tuple[int, ...]]:
        """The paths from 0 to the end whose number of segments is a bit of `targets`, best first.

        A best-first search: the table tells exactly what the rest of a path will weigh.
        """
        heap: list[tuple[Any, int, tuple[int, ...], int]] = [
            (weight, count, (0,), count)
            for count, weight in enumerate(self.best[0])
            if targets >> count & 1 and weight < self.unreached
        ]
        heapq.heapify(heap)
        while heap:
            weight, count, path, left = heapq.heappop(heap)
            if left == 0:
                yield path
                continue
            spent = weight - self.best[path[-1], left]
            for stop, added, counts in self.successors[path[-1]]:
                rest = self.best[stop, left - 1]
                if counts >> left & 1 and rest < self.unreached:
                    entry = (spent + added + rest, count, (*path, stop), left - 1)
                    heapq.heappush(heap, entry)


def _one_budget(dag: Dag, objective: str, targets: int) -> _Table:
    """The table of raw errors over the best paths alone, whose segment counts are in `targets`."""
    edges = dag.edges
    if not _reach(edges, dag.end, len(edges))[0] & targets:
        edges = []
    elif objective == "leximax":
        edges = _peel(edges, dag.end, targets)
    else:
        edges = _below_bottleneck(edges, dag.end, targets)
    return _Table(edges, [edge.raw for edge in edges], dag.end, targets.bit_length() - 1)


def _peel(edges: list[Edge], end: int, targets: int) -> list[Edge]:
    """The edges that make up the leximax paths, and at which segment counts.

    A settled level occurs equally often on every remaining path, so it counts as rank 0 from then.
    """
    while True:
        edges = _below_bottleneck(edges, end, targets)
        level = max(edge.rank for edge in edges)
        if level == 0:
            return edges
        edges = _fewest(edges, level, end, targets)


def _below_bottleneck(edges: list[Edge], end: int, targets: int) -> list[Edge]:
    """The edges up to the smallest rank that some path can keep to."""
    levels = sorted({edge.rank for edge in edges})
    enough = bisect_left(
        levels, True, key=lambda level: _reach(edges, end, level)[0] & targets != 0
    )
    return [edge for edge in edges if edge.rank <= levels[enough]]


def _reach(edges: list[Edge], end: int, level: int) -> list[int]:
    """Per node, in how many segments of rank <= `level` the end can be reached, as a bit set."""
    reach = [0] * end + [1]
    for start, stop, rank, _, counts in reversed(edges):
        if rank <= level:
            reach[start] |= reach[stop] << 1 & counts
    return reach


def _fewest(edges: list[Edge], level: int, end: int, targets: int) -> list[Edge]:
    """The edges of those paths that have the fewest segments of rank `level`, now settled."""
    within = [[0] * (end + 1)]  # within[m + 1]: as _reach, over at most m segments of that rank
    while not within[-1][0] & targets:
        reach = [0] * end + [1]
        for start, stop, rank, _, counts in reversed(edges):
            onward = within[-1] if rank == level else reach
            reach[start] |= onward[stop] << 1 & counts
        within.append(reach)

    used = [0] * len(edges)
    here = [within[-1][0] & targets] + [0] * end  # as within, but on a path from node 0
    for same, fewer in itertools.pairwise(reversed(within)):
        after = [0] * (end + 1)
        for position, (start, stop, rank, _, counts) in enumerate(edges):
            onward, reached = (fewer, after) if rank == level else (same, here)
            passed = here[start] & counts & onward[stop] << 1
            used[position] |= passed
            reached[stop] |= passed >> 1
        here = after
    return [
        Edge(start, stop, 0 if rank == level else rank, raw, counts)
        for (start, stop, rank, raw, _), counts in zip(edges, used, strict=True)
        if counts
    ]


def _exponent(objective: str) -> float | None:
    """The power to which an objective raises errors; None when it only orders them."""
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
    """What each edge adds to a path; None when the objective has no sum, or too large a one."""
    width = longest.bit_length()
    if exponent is not None:
        scale = -math.frexp(max(dag.quantised, default=0.0))[1]  # exactly, to at most 1
        scaled = [math.ldexp(value, scale) for value in dag.quantised.tolist()]
        main = integers([value**exponent for value in scaled])
    elif objective == "leximax":
        ranks = [edge.rank for edge in dag.edges]
        if max(ranks, default=0) * width / 8 * longest * len(dag.errors) > TABLE_BYTES:
            return None
        main = [1 << width * (rank - 1) if rank else 0 for rank in ranks]
    else:
        return None
    shift = max((edge.raw for edge in dag.edges), default=0).bit_length() + width
    return [(weight << shift) + edge.raw for weight, edge in zip(main, dag.edges, strict=True)]
