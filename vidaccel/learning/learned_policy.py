"""The policy that follows from the deviations of one generation."""

from collections.abc import Mapping, Sequence

import numpy as np

from vidaccel.lemica.search import solve_edges
from vidaccel.plans.edge import Edge, Line, Segment, without_reuse
from vidaccel.plans.fidelity import scaled
from vidaccel.plans.forecast import damped_scales
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import (
    SCHEMA_VERSION,
    GuidanceInfo,
    ModelInfo,
    SchedulerInfo,
    StoredEdge,
    StoredPlan,
)

# How many times a deviation in the first step grows until the end; one in the last does not:
# log-linear over the share of noise. Of 2, 4, 8, 15 and 30, with sums, squares and the largest
# error, tried on eight captions of the embedded model: squares with a gain of 8 were within 0.1 dB
# of the best at 10 and 12 steps of 50, where sums lost 1 to 3 dB, and 0.6 dB behind it at 17.
GAIN = 8.0
OBJECTIVE = "power(2)"

# The PSNR of plans over the sum of their errors, which is over the size of the latents: fitted to
# lessons on eight captions of the embedded model by `vidaccel bench learning`.
FIDELITY = (
    (0.0363, 58.5),
    (0.0411, 58.1),
    (0.0475, 58.1),
    (0.0815, 51.7),
    (0.0911, 50.3),
    (0.118, 46.7),
    (0.166, 44.4),
    (0.205, 43.3),
    (0.249, 41.0),
    (0.297, 41.0),
    (0.369, 35.7),
    (0.524, 35.7),
)


def learned_edges(
    holds: Mapping[Segment, float],
    lines: Mapping[Line, float],
    sigmas: Sequence[float],
    noise: Sequence[float],
    *,
    guided: bool = True,
) -> list[Edge]:
    """Return the edges of the search: each segment along the damped line from each earlier step.

    Which part of a line would have been best for the one sample is no guide: damped lines gave
    better clips than those of the smallest deviation at every budget tried.

    Args:
        holds: the deviation of each held segment.
        lines: the deviation of each along a damped line; those from earlier steps in between are
            interpolated.
        sigmas: noise level of each step.
        noise: share of noise in the latents of each step.
        guided: as `damped_scales` takes it.
    """
    total = len(sigmas)
    top = max(noise[0], 1e-6)
    gains = [GAIN ** (level / top) for level in [*noise, 0.0]]
    known: dict[Segment, dict[int, float]] = {}
    for (start, end, previous), deviation in lines.items():
        known.setdefault((start, end), {})[previous] = deviation
    found = without_reuse(total)
    for (start, end), held in sorted(holds.items()):
        along = known.get((start, end))
        if not along:  # the first step, or the first one of a second transformer
            found.append(Edge(start, end, held * gains[end]))
            continue
        points = sorted(along)
        errors = np.interp(np.arange(points[0], start), points, [along[p] for p in points])
        for previous, deviation in enumerate(errors.tolist(), points[0]):
            steps = (previous, start) if end == total else (previous, start, end)
            scale = damped_scales(steps, sigmas, guided=guided)[1]
            error = deviation * gains[end]
            found.append(Edge(start, end, error, int(scale > 0.0), scale or 1.0, previous))
    return found


def learned_policy(
    run: RunSettings,
    edges: Sequence[Edge],
    *,
    level: float,
    shift: float | None,
    versions: Mapping[str, str],
) -> CachePolicy:
    """Return the policy that follows from the edges of one run.

    Args:
        run: the run.
        edges: as `learned_edges` makes them.
        level: mean size of its latents near the end.
        shift: that of its scheduler.
        versions: those of the packages at work.
    """
    plans = solve_edges(edges, run.num_inference_steps, objective=OBJECTIVE, virtual_end=True)
    reused = [edge for edge in edges if edge.end > edge.start + 1]
    return CachePolicy(
        schema_version=SCHEMA_VERSION,
        model=ModelInfo.of(run),
        num_inference_steps=run.num_inference_steps,
        scheduler=SchedulerInfo(name=run.scheduler, shift=shift, sigmas=run.sigmas),
        guidance=GuidanceInfo(scale=run.guidance_scale),
        latents=run.latents,
        adapters=run.adapters,
        level=level,
        fidelity=scaled(FIDELITY, level),
        max_skip=max(edge.end - edge.start for edge in reused),
        edges=tuple(map(StoredEdge.of, reused)),
        objective=OBJECTIVE,
        plans={str(budget): StoredPlan.of(plan) for budget, plan in plans.items()},
        provenance="learned",
        source="vidaccel, policy='learn', one generation",
        versions=dict(versions),
    )
