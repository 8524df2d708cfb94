"""Plans: the denoising steps that are computed. No torch, no diffusers."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vidaccel.errors import PlanError
from vidaccel.plans.forecast import MAX_ORDER, MAX_SCALE, is_guided

# Below this many steps each one changes the sample so much that reusing any is visible.
FEW_STEPS = 8

# Evenly spaced plans for a pipeline that nobody has calibrated: compute every n-th step.
PRESETS = {"quality": 2, "balanced": 3, "fast": 5}


@dataclass(frozen=True)
class Plan:
    """The computed steps of one generation; every other step reuses the last computed one.

    Attributes:
        steps: strictly increasing step indices, the first of them 0.
        num_inference_steps: T, the number of denoising steps the plan is made for.
        errors: the measured error of each segment, in step order, or empty when none was measured.
            Every computed step starts a segment, except step T - 1, after which nothing is reused.
        orders: the forecast order of each segment (0 hold, 1 line, 2 parabola over sigma), or
            empty to hold in all of them.
        scales: how far each segment goes from holding (0) to the forecast of its order (1), or
            empty to go all the way in all of them.
        origin: where the plan comes from, for reports.

    Raises:
        PlanError: when the steps, errors, orders or scales are not such a list.
    """

    steps: tuple[int, ...]
    num_inference_steps: int
    errors: tuple[float, ...] = ()
    orders: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", self.check_steps(self.steps))
        total = self.num_inference_steps
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise PlanError(f"a plan needs num_inference_steps >= 1, found {total!r}")
        if self.steps[-1] >= total:
            raise PlanError(
                f"the plan computes step {self.steps[-1]}, but the run has {total} steps "
                f"(0 to {total - 1}): use a plan made for {total} steps"
            )
        object.__setattr__(self, "errors", tuple(self.errors))
        segments = len(self.steps) - (self.steps[-1] == total - 1)
        if self.errors and len(self.errors) != segments:
            raise PlanError(f"the plan has {segments} segments, found {len(self.errors)} errors")
        for position, error in enumerate(self.errors):
            if not isinstance(error, int | float) or not 0 <= error < math.inf:
                raise PlanError(
                    f"error {position} is {error!r}; the error of a segment is a finite number >= 0"
                )

        object.__setattr__(self, "orders", tuple(self.orders))
        if self.orders and len(self.orders) != segments:
            raise PlanError(f"the plan has {segments} segments, found {len(self.orders)} orders")
        for position, order in enumerate(self.orders):
            if isinstance(order, bool) or order not in range(MAX_ORDER + 1):
                raise PlanError(f"order {position} is {order!r}; a forecast has order 0, 1 or 2")

        object.__setattr__(self, "scales", tuple(self.scales))
        if self.scales and len(self.scales) != segments:
            raise PlanError(f"the plan has {segments} segments, found {len(self.scales)} scales")
        for position, scale in enumerate(self.scales):
            if not isinstance(scale, int | float) or not 0 <= scale <= MAX_SCALE:
                raise PlanError(f"scale {position} is {scale!r}; it is 0 to {MAX_SCALE:g}")

    @staticmethod
    def check_steps(steps: Sequence[Any]) -> tuple[int, ...]:
        """`steps` as a tuple; raises PlanError that names the first entry that is wrong."""
        if len(steps) == 0 or steps[0] != 0:
            found = "an empty list" if len(steps) == 0 else f"{steps[0]!r} first"
            raise PlanError(
                f"a plan starts at step 0, since nothing can be reused yet; found {found}"
            )
        previous = -1
        for position, step in enumerate(steps):
            if not isinstance(step, int) or isinstance(step, bool):
                raise PlanError(
                    f"plan entry {position} is {step!r}; step indices are whole numbers"
                )
            if step <= previous:
                raise PlanError(
                    f"plan entry {position} is {step} after {previous}; "
                    "steps must strictly increase"
                )
            previous = step
        return tuple(steps)

    @classmethod
    def every(cls, n: int, num_inference_steps: int) -> "Plan":
        """Compute steps 0, n, 2n, ...: evenly spaced over `num_inference_steps` steps."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PlanError(f"'every N' needs a whole number N >= 1, found {n!r}")
        return cls(tuple(range(0, num_inference_steps, n)), num_inference_steps)

    @classmethod
    def spread(cls, budget: int, num_inference_steps: int) -> "Plan":
        """Compute `budget` steps as evenly spaced as whole steps allow."""
        if not 1 <= budget <= num_inference_steps:
            raise PlanError(f"found a budget of {budget} for {num_inference_steps} steps")
        steps = tuple(i * num_inference_steps // budget for i in range(budget))
        return cls(steps, num_inference_steps)

    def forecast(self, order: int, scale: float = 1.0) -> "Plan":
        """The same steps with every segment forecast at `order`; its errors are not known."""
        segments = len(self.steps) - (self.steps[-1] == self.num_inference_steps - 1)
        scales = () if scale == 1.0 else (scale,) * segments
        return Plan(self.steps, self.num_inference_steps, orders=(order,) * segments, scales=scales)

    @cached_property
    def _computed(self) -> frozenset[int]:
        return frozenset(self.steps)

    @cached_property
    def _segments(self) -> tuple[int, ...]:
        """For each step, the position in `steps` of the last computed step up to it."""
        return tuple(bisect_right(self.steps, s) - 1 for s in range(self.num_inference_steps))

    @cached_property
    def _keeps(self) -> tuple[int, ...]:
        later = [0] * self.num_inference_steps
        for s in reversed(range(1, self.num_inference_steps)):
            wanted = 0 if self.computes(s) else self.order(s) + 1
            # A held residual is of no use before its own computed step; a slope needs older ones.
            after = later[s] if later[s] > 1 or not self.computes(s) else 0
            later[s - 1] = max(wanted, after)
        return tuple(later)

    def segments(self) -> list[tuple[int, int]]:
        """The (start, end) between which steps are reused; T as end reuses to the end."""
        ends = (*self.steps[1:], self.num_inference_steps)
        return [
            (start, end) for start, end in zip(self.steps, ends, strict=True) if end > start + 1
        ]

    def computes(self, step: int) -> bool:
        """Tell whether the plan computes `step`."""
        return step in self._computed

    def anchor(self, step: int) -> int:
        """The computed step that `step` reuses, or `step` itself when it is computed."""
        return self.steps[self._segments[step]]

    def order(self, step: int) -> int:
        """The forecast order with which the reused `step` is filled in."""
        return self.orders[self._segments[step]] if self.orders else 0

    def scale(self, step: int) -> float:
        """Return how far the reused `step` goes from holding to its forecast."""
        return self.scales[self._segments[step]] if self.scales else 1.0

    def keeps(self, step: int) -> int:
        """Return how many of the last residuals, that of `step` included, later steps may want."""
        return self._keeps[step]

    def __str__(self) -> str:
        return f"{len(self.steps)} of {self.num_inference_steps} steps computed"


@dataclass(frozen=True)
class RunSettings:
    """The run that a plan is for. What is None is not known.

    Attributes:
        num_inference_steps: T.
        transformer: class name.
        model_id: hub id that the pipeline was loaded from.
        config_hash: SHA-256 of what the transformer's config has that is no default of its class.
        full_config_hash: that of all its entries, as policies of before have it.
        scheduler: class name.
        shift: shift of its noise levels, where that is the same in every run.
        sigmas: noise level of each step, T of them.
        adapters: names of the adapters (LoRA) that are at work.
        config: the whole numbers, words and switches of the transformer's config; an entry that is
            None is none of them there.
        pipeline: class name of the pipeline.
        experts: number of transformers of the pipeline, which take turns along the noise levels.
        guidance_scale: that of the pipeline's call.
        latents: the shape of the latents of one sample, without its batch.
        precision: the low precision that its linear layers are in.
    """

    num_inference_steps: int
    transformer: str | None = None
    model_id: str | None = None
    config_hash: str | None = None
    full_config_hash: str | None = None
    scheduler: str | None = None
    shift: float | None = None
    sigmas: tuple[float, ...] | None = None
    adapters: tuple[str, ...] = ()
    config: Mapping[str, int | str | None] | None = field(default=None, hash=False)
    pipeline: str | None = None
    experts: int | None = None
    guidance_scale: float | None = None
    latents: tuple[int, ...] | None = None
    precision: str | None = None

    @property
    def guided(self) -> bool:
        """Tell whether outputs with and without the prompt are combined, see `is_guided`."""
        return is_guided(self.guidance_scale)
