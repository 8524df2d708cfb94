"""Which denoising steps are computed. No torch, no diffusers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vidaccel.errors import PlanError

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

    Raises:
        PlanError: when the steps are not such a list.
    """

    steps: tuple[int, ...]
    num_inference_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checked(self.steps))
        total = self.num_inference_steps
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise PlanError(f"a plan needs num_inference_steps >= 1, found {total!r}")
        if self.steps[-1] >= total:
            raise PlanError(
                f"the plan computes step {self.steps[-1]}, but the run has {total} steps "
                f"(0 to {total - 1}): use a plan made for {total} steps"
            )

    @classmethod
    def every(cls, n: int, num_inference_steps: int) -> "Plan":
        """Compute steps 0, n, 2n, ...: evenly spaced over `num_inference_steps` steps."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise PlanError(f"'every N' needs a whole number N >= 1, found {n!r}")
        return cls(tuple(range(0, num_inference_steps, n)), num_inference_steps)

    @cached_property
    def _computed(self) -> frozenset[int]:
        return frozenset(self.steps)

    def computes(self, step: int) -> bool:
        """Whether the plan computes `step`."""
        return step in self._computed

    def anchor(self, step: int) -> int:
        """The computed step that `step` reuses, or `step` itself when it is computed."""
        return max(s for s in self.steps if s <= step)

    def reuses_after(self, step: int) -> bool:
        """Whether the step after `step` is reused, so that something of `step` must be kept."""
        return step + 1 < self.num_inference_steps and step + 1 not in self._computed

    def __str__(self) -> str:
        return f"{len(self.steps)} of {self.num_inference_steps} steps computed"


@dataclass(frozen=True)
class PlanSource:
    """A plan that may wait for the number of steps of the run.

    Attributes:
        description: how a report names it.
        resolve: number of inference steps -> Plan; raises PlanError when it does not fit.
    """

    description: str
    resolve: Callable[[int], Plan]


def plan_source(policy: Any, preset: str = "balanced") -> PlanSource:
    """What `accelerate(policy=...)` takes, as a `PlanSource`.

    Args:
        policy: "auto", None (compute every step), "every N", a sequence of computed steps, or a
            `Plan`.
        preset: "quality", "balanced" or "fast"; used by "auto".

    Raises:
        PlanError: when it is none of these.
    """
    if preset not in PRESETS:
        raise PlanError(f"preset is one of {', '.join(map(repr, PRESETS))}, found {preset!r}")
    if policy is None:
        return PlanSource("every step", lambda total: Plan.every(1, total))
    if isinstance(policy, Plan):
        return PlanSource(str(policy), lambda total: _fitting(policy, total))
    if policy == "auto":
        n = PRESETS[preset]
        return PlanSource(
            f"auto: every {n} (evenly spaced, not calibrated)",
            lambda total: Plan.every(1 if total < FEW_STEPS else n, total),
        )
    if isinstance(policy, str):
        match = re.fullmatch(r"every[ :]?(\d{1,6})", policy.strip())
        if match is None:
            raise PlanError(f"policy is 'auto', 'every N' or a list of steps, found {policy!r}")
        n = int(match[1])
        Plan.every(n, 1)
        return PlanSource(f"every {n}", lambda total: Plan.every(n, total))
    if isinstance(policy, Sequence):
        steps = _checked(policy)
        return PlanSource(f"{len(steps)} listed steps", lambda total: Plan(steps, total))
    raise PlanError(
        "policy is 'auto', None, 'every N', a list of computed steps or a Plan, "
        f"found {type(policy).__name__}"
    )


def _checked(steps: Sequence[Any]) -> tuple[int, ...]:
    """`steps` as a tuple, or a PlanError that names the first entry that is wrong."""
    if len(steps) == 0 or steps[0] != 0:
        found = "an empty list" if len(steps) == 0 else f"{steps[0]!r} first"
        raise PlanError(f"a plan starts at step 0, since nothing can be reused yet; found {found}")
    previous = -1
    for position, step in enumerate(steps):
        if not isinstance(step, int) or isinstance(step, bool):
            raise PlanError(f"plan entry {position} is {step!r}; step indices are whole numbers")
        if step <= previous:
            raise PlanError(
                f"plan entry {position} is {step} after {previous}; steps must strictly increase"
            )
        previous = step
    return tuple(steps)


def _fitting(plan: Plan, total: int) -> Plan:
    if plan.num_inference_steps != total:
        raise PlanError(
            f"the plan is made for {plan.num_inference_steps} steps, but this run has {total}: "
            f"pass num_inference_steps={plan.num_inference_steps} or another plan"
        )
    return plan
