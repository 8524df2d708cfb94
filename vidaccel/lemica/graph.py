"""The DAG of cache segments as a networkx graph: aggregation, stability, files.

Nodes are the denoising steps 0 to T - 1 and the end T; an edge i -> j is the segment that computes
i and j and reuses in between. Every edge carries what was measured on each sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from vidaccel.errors import PlanError
from vidaccel.lemica.search import solve

Aggregation = Literal["mean", "max", "quantile", "cvar"]


def segment_graph(
    measured: Mapping[tuple[int, int], Sequence[float]], num_inference_steps: int
) -> nx.DiGraph:
    """The graph of measured segments.

    Args:
        measured: (start, end) -> the error of each sample, in one order for all segments.
        num_inference_steps: T.

    Returns:
        A graph with the attribute "num_inference_steps" and edges that carry "errors" (of each
        sample), "mean", "spread" (standard deviation) and "count". Segments of length 1 reuse
        nothing: error 0, count 0.

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
    return graph


def aggregate(
    graph: nx.DiGraph, how: Aggregation = "mean", *, level: float = 0.8, virtual_end: bool = False
) -> NDArray[np.float64]:
    """One error per segment from those of the samples, as `lemica.search.solve` takes them.

    Args:
        graph: of `segment_graph`.
        how: "mean" (as in the paper), "max", "quantile" at `level`, or "cvar": the mean of the
            errors from that quantile up, which looks at the worst prompts.
        level: 0 to 1, for "quantile" and "cvar".
        virtual_end: keep the column of segments that reuse to the end.

    Returns:
        [T, T], or [T + 1, T + 1] with a virtual end; inf where there is no segment.

    Raises:
        PlanError: unknown `how`, or `level` out of range.
    """
    if not 0.0 <= level <= 1.0:
        raise PlanError(f"level: found {level}, expected 0 to 1")

    def tail(errors: NDArray[np.float64]) -> float:
        return float(errors[errors >= np.quantile(errors, level)].mean())

    ways = {
        "mean": lambda errors: float(errors.mean()),
        "max": lambda errors: float(errors.max()),
        "quantile": lambda errors: float(np.quantile(errors, level)),
        "cvar": tail,
    }
    if how not in ways:
        raise PlanError(f"aggregation: found {how!r}, expected one of {', '.join(ways)}")
    nodes = graph.graph["num_inference_steps"] + virtual_end
    matrix = np.full((nodes, nodes), np.inf)
    for start, end, edge in graph.edges(data=True):
        if end < nodes:
            errors = np.asarray(edge["errors"])
            matrix[start, end] = ways[how](errors) if errors.size else 0.0
    return matrix


def stability(
    graph: nx.DiGraph, budget: int, *, rounds: int = 100, seed: int = 0, objective: str = "leximax"
) -> NDArray[np.float64]:
    """How sure the choice of each step is: the bootstrap over samples.

    Args:
        graph: of `segment_graph`, with as many samples on every segment.
        budget: number of computed steps.
        rounds: resamples of the samples, with replacement.
        seed: of the resampling.
        objective: of `lemica.search.solve`.

    Returns:
        [T] the fraction of resamples whose plan computes each step.

    Raises:
        PlanError: unequal numbers of samples, or no plan of that budget.
    """
    measured = {(s, e): d["errors"] for s, e, d in graph.edges(data=True) if d["count"]}
    counts = {len(errors) for errors in measured.values()}
    if len(counts) != 1:
        raise PlanError("stability needs as many samples on every segment")
    (count,) = counts
    segments = list(measured)
    errors = np.array([measured[segment] for segment in segments])  # [segments, samples]
    steps = graph.graph["num_inference_steps"]
    matrix = aggregate(graph)
    starts, ends = np.array(segments).T
    inside = ends < steps
    rng = np.random.default_rng(seed)
    chosen = np.zeros(steps)
    for _ in range(rounds):
        drawn = rng.integers(count, size=count)
        matrix[starts[inside], ends[inside]] = errors[:, drawn].mean(axis=1)[inside]
        plans = solve(matrix, [budget], objective=objective)
        if budget not in plans:
            raise PlanError(f"no plan of {budget} computed steps exists in this graph")
        chosen[list(plans[budget].steps)] += 1
    return chosen / rounds


def to_dict(graph: nx.DiGraph) -> dict[str, Any]:
    """The graph in networkx' node-link form, for JSON."""
    data: dict[str, Any] = nx.node_link_data(graph, edges="edges")
    return data


def from_dict(data: dict[str, Any]) -> nx.DiGraph:
    """The graph of `to_dict`."""
    return nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
