"""The DAG of cache segments as a networkx graph: aggregation and stability.

Nodes are the denoising steps 0 to T - 1 and the end T; an edge i -> j is the segment that computes
i and j and reuses in between. Every edge carries what was measured on each sample. What else could
be done between i and j than holding the residual hangs on the same edge: lines through i and an
earlier computed step, at several scales. `search_edges` unfolds that into a multigraph for the
search.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from vidaccel.errors import PlanError
from vidaccel.lemica.search import solve_edges
from vidaccel.plans.edge import SCALES, Edge, Line, Segment

Aggregation = Literal["mean", "max", "quantile", "cvar"]


def segment_graph(
    measured: Mapping[Segment, Sequence[float]],
    num_inference_steps: int,
    lines: Mapping[Line, Sequence[Sequence[float]]] | None = None,
) -> nx.DiGraph:
    """Make the graph of measured segments.

    Args:
        measured: (start, end) -> the error of each sample, in one order for all segments.
        num_inference_steps: T.
        lines: (start, end, previous) -> for each sample the error at each of `SCALES`.

    Returns:
        A graph with the attribute "num_inference_steps" and edges that carry "errors" (of each
        sample), "mean", "spread" (standard deviation) and "count". Segments of length 1 reuse
        nothing: error 0, count 0. Where there are lines, "lines" lists them, each with "previous"
        and "errors" ([samples][scales]).

    Raises:
        PlanError: a segment outside 0 to T, without an error, or with one that is negative or not
            finite.
    """
    graph = nx.DiGraph(num_inference_steps=num_inference_steps)
    graph.add_nodes_from(range(num_inference_steps + 1))
    for start in range(num_inference_steps):
        graph.add_edge(start, start + 1, errors=[], mean=0.0, spread=0.0, count=0)
    for (start, end), errors in measured.items():
        values = np.asarray(errors, dtype=np.float64)
        if not 0 <= start < end - 1 < num_inference_steps:
            raise PlanError(f"segment {start} to {end} is not inside {num_inference_steps} steps")
        if values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
            raise PlanError(f"segment {start} to {end} needs errors >= 0, found {list(errors)}")
        graph.add_edge(
            start,
            end,
            errors=values.tolist(),
            mean=float(values.mean()),
            spread=float(values.std()),
            count=int(values.size),
        )
    for (start, end, previous), rows in sorted((lines or {}).items()):
        table = np.asarray(rows, dtype=np.float64)
        samples = graph.edges[start, end]["count"] if graph.has_edge(start, end) else 0
        if not 0 <= previous < start or table.shape != (samples, len(SCALES)):
            raise PlanError(f"a line from {previous} over {start} to {end} does not fit the graph")
        if not np.isfinite(table).all() or (table < 0).any():
            raise PlanError(f"a line from {previous} over {start} to {end} needs errors >= 0")
        found = graph.edges[start, end].setdefault("lines", [])
        found.append({"previous": previous, "errors": table.tolist()})
    return graph


def aggregate(
    graph: nx.DiGraph, how: Aggregation = "mean", *, level: float = 0.8, virtual_end: bool = False
) -> NDArray[np.float64]:
    """One error per held segment from those of the samples, as `lemica.search.solve` takes them.

    Args:
        graph: as `segment_graph` makes it.
        how: "mean" (as in the paper), "max", "quantile" at `level`, or "cvar": the mean of the
            errors from that quantile up, which looks at the worst prompts.
        level: 0 to 1, for "quantile" and "cvar".
        virtual_end: keep the column of segments that reuse to the end.

    Returns:
        [T, T], or [T + 1, T + 1] with a virtual end; inf where there is no segment.

    Raises:
        PlanError: unknown `how`, or `level` out of range.
    """
    over = aggregator(how, level)
    nodes = graph.graph["num_inference_steps"] + virtual_end
    matrix = np.full((nodes, nodes), np.inf)
    for start, end, edge in graph.edges(data=True):
        if end < nodes:
            errors = np.asarray(edge["errors"])
            matrix[start, end] = over(errors) if errors.size else 0.0
    return matrix


def search_edges(
    graph: nx.DiGraph, how: Aggregation = "mean", *, level: float = 0.8, faithful: bool = False
) -> list[Edge]:
    """Return the multigraph of the search: held segments and, where one is better, lines.

    The errors of a line through a step that was not measured are interpolated between the measured
    ones, sample by sample. Of each line the best scale is taken.

    Args:
        graph: as `segment_graph` makes it.
        how, level: as `aggregate` takes them.
        faithful: held segments only, as in the paper.
    """
    return _edges(_measured(graph, faithful), aggregator(how, level))


def stability(
    graph: nx.DiGraph,
    budgets: Sequence[int],
    *,
    rounds: int = 100,
    seed: int = 0,
    objective: str = "leximax",
    faithful: bool = False,
    virtual_end: bool = False,
) -> dict[int, NDArray[np.float64]]:
    """Estimate how sure the choice of each step is: the bootstrap over samples.

    Args:
        graph: as `segment_graph` makes it, with as many samples on every segment.
        budgets: numbers of computed steps.
        rounds: resamples of the samples, with replacement.
        seed: seed of the resampling.
        objective: what the best path is, see `lemica.search.solve`.
        faithful: held segments only.
        virtual_end: the last steps may be reused.

    Returns:
        Budget -> [T] the fraction of resamples whose plan computes each step.

    Raises:
        PlanError: unequal numbers of samples, or no plan of a budget.
    """
    counts = {edge["count"] for _, _, edge in graph.edges(data=True) if edge["count"]}
    if len(counts) != 1:
        raise PlanError("stability needs as many samples on every segment")
    (count,) = counts
    measured = _measured(graph, faithful)
    steps = graph.graph["num_inference_steps"]
    rng = np.random.default_rng(seed)
    chosen = {budget: np.zeros(steps) for budget in budgets}
    for _ in range(rounds):
        drawn = rng.integers(count, size=count)
        resampled = _edges(measured, partial(_mean_of, drawn))
        plans = solve_edges(resampled, steps, budgets, objective=objective, virtual_end=virtual_end)
        for budget in budgets:
            if budget not in plans:
                raise PlanError(f"no plan of {budget} computed steps exists in this graph")
            chosen[budget][list(plans[budget].steps)] += 1
    return {budget: times / rounds for budget, times in chosen.items()}


def _mean_of(drawn: NDArray[np.int64], errors: NDArray[np.float64]) -> float:
    return float(errors[drawn].mean())


def aggregator(how: str, level: float = 0.8) -> Callable[[NDArray[np.float64]], float]:
    """Return the function that makes one error of those of the samples; errors as `aggregate`."""
    if not 0.0 <= level <= 1.0:
        raise PlanError(f"level: found {level}, expected 0 to 1")
    aggregators: dict[str, Callable[[NDArray[np.float64]], float]] = {
        "mean": lambda errors: float(errors.mean()),
        "max": lambda errors: float(errors.max()),
        "quantile": lambda errors: float(np.quantile(errors, level)),
        "cvar": lambda errors: float(errors[errors >= np.quantile(errors, level)].mean()),
    }
    if how not in aggregators:
        raise PlanError(f"aggregation: found {how!r}, expected one of {', '.join(aggregators)}")
    return aggregators[how]


class _Measured(NamedTuple):
    """The errors of what can be done between two steps."""

    start: int
    end: int
    held: NDArray[np.float64]  # [samples]; empty where nothing is reused
    lines: dict[int, NDArray[np.float64]]  # previous step -> [samples, scales]


def _measured(graph: nx.DiGraph, faithful: bool) -> list[_Measured]:
    """Return the errors between every two steps, with those of the lines that were not measured."""
    found = []
    for start, end, edge in graph.edges(data=True):
        lines = [] if faithful else edge.get("lines", [])
        rows = {line["previous"]: np.asarray(line["errors"]) for line in lines}
        known = sorted(rows)
        for left, right in itertools.pairwise(known):
            for previous in range(left + 1, right):
                share = (previous - left) / (right - left)
                rows[previous] = (1 - share) * rows[left] + share * rows[right]
        found.append(_Measured(start, end, np.asarray(edge["errors"], dtype=np.float64), rows))
    return found


def _edges(
    measured: Sequence[_Measured], over: Callable[[NDArray[np.float64]], float]
) -> list[Edge]:
    found = []
    for start, end, held, lines in measured:
        error = over(held) if held.size else 0.0
        found.append(Edge(start, end, error))
        for previous, errors in sorted(lines.items()):
            of_line, best = min(
                (over(errors[:, position]), position) for position in range(len(SCALES))
            )
            if of_line < error:
                found.append(Edge(start, end, of_line, 1, SCALES[best], previous))
    return found
