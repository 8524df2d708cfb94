"""Fillings of reused steps that other methods have, written anew from their descriptions.

Spectrum (arXiv 2603.01623) forecasts the features of the last block by Chebyshev polynomials that a
ridge regression fits to all computed steps; MeanCache (arXiv 2601.19961) goes on with an average
velocity. Both run on a pipeline that a plan accelerates already, in the place of what it would do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from vidaccel.api import engines_of
from vidaccel.engine.engine import Engine
from vidaccel.errors import UnsupportedPipelineError

# Spectrum's own: degree of the polynomials, steps before the first gap, and length of that gap.
DEGREE, WARM_UP, FIRST_GAP = 4, 5, 2


def chebyshev_weights(
    known: Sequence[float], level: float, *, ridge: float, degree: int = DEGREE
) -> NDArray[np.float64]:
    """Return the coefficients of computed features whose sum is the forecast.

    Args:
        known: noise levels of the computed steps, as shares of the largest of the run.
        level: that of the reused step.
        ridge: how much large coefficients of the polynomials are held down.
        degree: that of the polynomials.
    """
    basis = chebyshev.chebvander(2.0 * np.asarray(known) - 1.0, degree)  # [N, degree + 1]
    at = chebyshev.chebvander(np.asarray([2.0 * level - 1.0]), degree)[0]
    inner = basis.T @ basis + ridge * np.eye(degree + 1)
    return (basis @ np.linalg.solve(inner, at)).astype(np.float64)


def widening_steps(budget: int, num_inference_steps: int) -> tuple[int, ...]:
    """Return the computed steps of Spectrum: a warm-up, then gaps that grow by the same each time.

    The growth is what gives the budget; where none does, the warm-up is longer.
    """
    total = num_inference_steps
    for warm_up in range(min(WARM_UP, budget), budget + 1):
        for growth in np.arange(0.0, total, 0.01):
            steps, gap = list(range(warm_up)), float(FIRST_GAP)
            while steps[-1] + int(gap) < total:
                steps.append(steps[-1] + int(gap))
                gap += growth
            if len(steps) == budget:
                return tuple(steps)
            if len(steps) < budget:
                break
    return tuple(range(budget))


@contextmanager
def chebyshev_features(pipe: Any, ridge: float) -> Iterator[None]:
    """Forecast what goes into the head of the reused steps of an accelerated pipeline.

    Args:
        pipe: the pipeline.
        ridge: as `chebyshev_weights` takes it.

    Raises:
        UnsupportedPipelineError: its transformer has not one head.
    """
    handles = []
    for engine in engines_of(pipe).values():
        if len(engine.host.heads) != 1:
            name = type(engine.transformer).__name__
            raise UnsupportedPipelineError(f"{name} has {len(engine.host.heads)} heads, not one")
        head = engine.transformer.get_submodule(engine.host.heads[0].module)
        # After the hook of the engine, whose work this takes the place of.
        handles.append(head.register_forward_pre_hook(_Features(engine, ridge)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Features:
    """The features of the computed steps, by branch: noise level and tensor."""

    def __init__(self, engine: Engine, ridge: float) -> None:
        self._engine, self._ridge = engine, ridge
        self._kept: dict[str, list[tuple[float, torch.Tensor]]] = {}

    def __call__(self, head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep the features of a computed step, or give those of a reused one."""
        call = self._engine.running
        if call is None or call.generation is None or not call.generation.run.sigmas:
            return None
        sigmas, context = call.generation.run.sigmas, call.context
        kept = self._kept.setdefault(context.branch, [])
        level = sigmas[context.step] / sigmas[0]
        if not call.reused:
            if context.step == 0:
                kept.clear()
            kept.append((level, args[0].detach()))
            return None
        weights = chebyshev_weights([known for known, _ in kept], level, ridge=self._ridge)
        total = sum(w * features.float() for w, (_, features) in zip(weights, kept, strict=True))
        assert isinstance(total, torch.Tensor)  # the first step is computed
        return (total.to(args[0].dtype), *args[1:])


@contextmanager
def average_velocity(pipe: Any, span: int) -> Iterator[None]:
    """Give the sampler of a flow MeanCache's average velocity in the reused steps.

    Between the latents of `span` steps ago, z_r, and those of now, z_t, the velocity was on average
    u = (z_t - z_r) / (t - r), and began as v_r. How it changes follows from both: (v_r - u) /
    (r - t). A reused step goes on from the velocity of the step before by that much times its own
    length. With a span of 1 the velocity is held.

    Args:
        pipe: a pipeline that a plan accelerates.
        span: steps, 1 or more.

    Raises:
        UnsupportedPipelineError: its scheduler samples no flow.
    """
    scheduler = pipe.scheduler
    if "FlowMatch" not in type(scheduler).__name__:
        raise UnsupportedPipelineError(f"{type(scheduler).__name__} samples no flow")
    step_on, attributes = scheduler.step, vars(scheduler)
    previous = attributes.get("step")
    engine = next(iter(engines_of(pipe).values()))
    latents: list[torch.Tensor] = []
    velocities: list[torch.Tensor] = []

    def step(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        """Take a step of the scheduler, with the average velocity where the plan reuses."""
        calls = engine.stats.calls
        at = calls[-1].step
        del latents[at:], velocities[at:]  # of a run before
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        if calls[-1].reused:
            start = max(0, at - span)
            moved = (sample.float() - latents[start]) / (sigmas[at] - sigmas[start])
            change = (velocities[start] - moved) / (sigmas[start] - sigmas[at])
            velocity = velocities[-1] + change * (sigmas[at + 1] - sigmas[at])
            velocity = velocity.to(sample.dtype)
        latents.append(sample.detach().float())
        velocities.append(velocity.detach().float())
        return step_on(velocity, timestep, sample, **options)

    attributes["step"] = step
    try:
        yield
    finally:
        del attributes["step"]
        if previous is not None:
            attributes["step"] = previous
