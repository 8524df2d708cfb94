"""Measured errors carried over to another noise grid: other steps, another shift or scheduler.

Holding the residual of step i until step j goes wrong by about the sum, over the reused steps s, of
how far s is from i times how far the sampler goes in s, both in noise level. What a measured error
is beside that sum changes slowly over the grid, so it is interpolated between the measured steps,
and multiplied with the sum of the new grid. On an unchanged grid this gives the measured errors.
"""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from vidaccel.errors import PolicyError
from vidaccel.lemica.search import solve_edges
from vidaccel.plans.edge import Edge, without_reuse
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import SCHEMA_VERSION, SchedulerInfo, StoredEdge, StoredPlan


def transferred(policy: CachePolicy, run: RunSettings) -> CachePolicy:
    """Carry a policy over to another number of steps or noise grid of the same model.

    Args:
        policy: a measured one.
        run: the run.

    Returns:
        The policy with errors and plans of the new grid, marked as transferred and not validated.

    Raises:
        PolicyError: another model, or a policy or run without what it takes.
    """
    policy.check_model(run)
    grid, other = policy.scheduler.sigmas, run.sigmas
    if grid is None or not policy.edges:
        raise PolicyError(
            "edges: found none with noise levels, and without them a policy cannot be transferred "
            f"from {policy.num_inference_steps} to {run.num_inference_steps} steps"
        )
    if other is None:
        raise PolicyError("scheduler.sigmas: this run has none to transfer the policy to")
    for whose, levels in (("policy", grid), ("run", other)):
        if (np.diff([*levels, 0.0]) >= 0.0).any():
            raise PolicyError(f"scheduler.sigmas: those of the {whose} do not fall step by step")
    steps = run.num_inference_steps
    edges = _edges(policy, np.append(grid, 0.0), np.append(other, 0.0))
    objective = policy.objective or "leximax"
    lines = any(edge.order for edge in edges)  # else of a policy as in the paper
    plans = solve_edges(
        [*without_reuse(steps), *edges], steps, objective=objective, virtual_end=lines
    )
    if not plans or not edges:
        raise PolicyError(f"no plan of {steps} steps follows from this policy")
    return policy.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "num_inference_steps": steps,
            "scheduler": SchedulerInfo(name=run.scheduler, sigmas=other),
            "max_skip": max(edge.end - edge.start for edge in edges),
            "edges": tuple(map(StoredEdge.of, edges)),
            "plans": {str(budget): StoredPlan.of(plan) for budget, plan in plans.items()},
            "validation": None,
            "provenance": "transferred",
            "source": f"{len(grid)} steps of: {policy.source or policy.provenance}",
        }
    )


def _edges(
    policy: CachePolicy, grid: NDArray[np.float64], other: NDArray[np.float64]
) -> list[Edge]:
    """Return the edges of the new grid, `other`, by how they lie on that of the policy, `grid`."""
    held: dict[int, dict[int, float]] = defaultdict(dict)  # start -> end -> error beside the sum
    lines: dict[tuple[int, int, int], tuple[float, float]] = {}  # -> share of holding, scale
    errors = {
        (e.start, e.end): e.mean for e in policy.edges if e.order == 0 and e.end > e.start + 1
    }
    for (start, end), error in errors.items():
        held[start][end] = error / _reach(grid, start, end)
    for edge in policy.edges:
        base = errors.get((edge.start, edge.end), 0.0)
        if edge.order == 1 and edge.previous is not None and base > 0.0:
            lines[edge.start, edge.end, edge.previous] = (edge.mean / base, edge.scale)
    # Where each new step lies on the old grid, in steps; both fall with the step.
    places = np.interp(-other, -grid, np.arange(len(grid)))
    longest = policy.max_skip or max(end - start for start, end in errors)
    steps = len(other) - 1
    found = []
    for start in range(steps - 1):
        for end in range(start + 2, steps + 1):
            if places[end] - places[start] > longest + 1e-9:
                break
            ratio = _between(held, grid, places[start], other[end])
            error = ratio * _reach(other, start, end)
            found.append(Edge(start, end, error))
            for previous in range(start):
                key = tuple(round(places[step]) for step in (start, end, previous))
                share, scale = lines.get((key[0], key[1], key[2]), (1.0, 1.0))
                if share < 1.0:
                    found.append(Edge(start, end, error * share, 1, scale, previous))
    return found


def _reach(grid: NDArray[np.float64], start: int, end: int) -> float:
    """Sum how far each reused step is from `start` times how far the sampler goes in it."""
    reused = np.arange(start + 1, end)
    return float(((grid[start] - grid[reused]) * (grid[reused] - grid[reused + 1])).sum())


def _between(
    held: dict[int, dict[int, float]], grid: NDArray[np.float64], place: float, sigma: float
) -> float:
    """Interpolate the ratio at a start between two measured ones and an end at noise `sigma`."""
    starts = sorted(held)
    left = max((s for s in starts if s <= place), default=starts[0])
    right = min((s for s in starts if s >= place), default=starts[-1])
    values = []
    for start in (left, right):
        ends = sorted(held[start])
        values.append(np.interp(-sigma, -grid[ends], [held[start][end] for end in ends]))
    share = 0.0 if left == right else (place - left) / (right - left)
    return float((1 - share) * values[0] + share * values[1])
