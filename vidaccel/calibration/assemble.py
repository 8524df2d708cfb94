"""From the errors of work items to the graph of all segments, and to the policy that follows."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from networkx import DiGraph

from vidaccel.calibration.runners import RunInfo
from vidaccel.calibration.segment_errors import Errors
from vidaccel.calibration.task import OneSegment, Task, WorkItem
from vidaccel.environment import environment
from vidaccel.hosts.registry import find_transformers
from vidaccel.lemica.graph import segment_graph, stability
from vidaccel.lemica.search import solve_edges
from vidaccel.plans.edge import Edge, Line, Segment
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import (
    SCHEMA_VERSION,
    GuidanceInfo,
    ModelInfo,
    SchedulerInfo,
    StoredEdge,
    StoredPlan,
)

# Resamples of the samples that a policy states the stability of its steps from.
STABILITY_ROUNDS = 50

Measured = Mapping[int, dict[WorkItem, Errors]]  # by sample


def graph_of(task: Task, measured: Measured) -> DiGraph:
    """Make the graph of all segments, from the errors of the work items of every sample."""
    holds: dict[Segment, list[float]] = defaultdict(list)
    lines: dict[Line, list[tuple[float, ...]]] = defaultdict(list)
    for sample in sorted(measured):
        errors = _of_sample(task, measured[sample])
        for segment, error in errors.holds.items():
            holds[segment].append(error)
        for line, row in errors.lines.items():
            lines[line].append(row)
    return segment_graph(holds, task.num_inference_steps, lines)


def _of_sample(task: Task, measured: Mapping[WorkItem, Errors]) -> Errors:
    """Return the errors of one sample, those of single segments in the place of estimated ones."""
    parts = [measured[item] for item in task.items()]
    errors = Errors(
        {segment: error for part in parts for segment, error in part.holds.items()},
        {line: row for part in parts for line, row in part.lines.items()},
    )
    exact: dict[Segment, float] = {}
    for item, part in measured.items():
        if isinstance(item, OneSegment):
            exact |= part.holds
    return errors.corrected(exact)


def assemble_policy(
    pipe: Any,
    task: Task,
    graph: DiGraph,
    edges: Sequence[Edge],
    info: RunInfo,
    objective: str,
    aggregation: str,
) -> CachePolicy:
    """Make the policy of a measured task, before anything of it was validated.

    Args:
        pipe: the pipeline it was measured on.
        task: what was measured.
        graph: the graph of all its segments.
        edges: the multigraph of the search that follows from it.
        info: what its runs are like.
        objective: what the best path is, see `lemica.search.solve`.
        aggregation: how the errors of the samples became one; for the policy's `source`.
    """
    # The paper's paths compute the last step; without it a step is left for where it does more.
    plans = solve_edges(
        edges, task.num_inference_steps, objective=objective, virtual_end=task.lines
    )
    certain = stability(
        graph,
        list(plans),
        rounds=STABILITY_ROUNDS,
        objective=objective,
        faithful=not task.lines,
        virtual_end=task.lines,
    )
    run = info.run_settings
    return CachePolicy(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo.of(run),
        num_inference_steps=task.num_inference_steps,
        scheduler=SchedulerInfo(
            name=run.scheduler,
            shift=getattr(pipe.scheduler.config, "shift", None),
            sigmas=run.sigmas,
        ),
        guidance=GuidanceInfo(
            mode=next(host.guidance for _, host in find_transformers(pipe).values()),
            scale=task.call.get("guidance_scale"),
        ),
        width=task.call.get("width"),
        height=task.call.get("height"),
        frames=task.call.get("num_frames"),
        max_skip=task.max_skip,
        edges=_stored_edges(graph, edges),
        noise_floor=info.noise_floor,
        objective=objective,
        plans={
            str(budget): StoredPlan.of(
                plan, stability=(float(certain[budget][step]) for step in plan.steps)
            )
            for budget, plan in plans.items()
        },
        prompts=task.prompts,
        prompts_hash=sha256("\n".join(task.prompts).encode()).hexdigest(),
        seeds=task.seeds,
        attention="dense",
        provenance="measured",
        source=f"vidaccel build-policy, {task.method} errors, {aggregation} of {task.metric}",
        versions=environment()["packages"],
    )


def _stored_edges(graph: DiGraph, edges: Sequence[Edge]) -> tuple[StoredEdge, ...]:
    """Return the edges that reuse something, in order, with how their samples differ."""
    found = []
    for edge in sorted(edges, key=lambda e: (e.start, e.end, e.order, e.previous or 0)):
        if edge.end > edge.start + 1:
            of_samples = graph.edges[edge.start, edge.end]
            spread = of_samples["spread"] if edge.order == 0 else None
            found.append(StoredEdge.of(edge, spread=spread, count=of_samples["count"]))
    return tuple(found)
