"""The wish of a user for a plan: a preset, a number of steps, a speedup, an error or a PSNR."""

import math
from dataclasses import dataclass, fields
from typing import Any

from vidaccel.errors import PlanError, PolicyError
from vidaccel.plans.plan import PRESETS, Plan
from vidaccel.plans.policy import CachePolicy


@dataclass(frozen=True)
class Wish:
    """One wish; the preset counts where there is no other.

    Attributes:
        preset: "quality", "balanced" or "fast": 2, 3 or 5 times fewer steps, as far as a policy
            goes.
        budget: computed steps.
        speedup: so many times fewer steps, or more.
        max_error: the largest error of a segment, as measured.
        psnr: the least PSNR to the plain clip that is predicted, in dB.

    Raises:
        PlanError: no such preset, or several wishes.
        PolicyError: a value that nothing can fulfil.
    """

    preset: str = "balanced"
    budget: int | None = None
    speedup: float | None = None
    max_error: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            known = ", ".join(map(repr, PRESETS))
            raise PlanError(f"preset is one of {known}, found {self.preset!r}")
        if len(self.given) > 1:
            raise PlanError(f"one wish at a time, found {' and '.join(self.given)}")
        for name, value in self.given.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
                raise PlanError(f"{name} is a number, found {value!r}")

    @property
    def given(self) -> dict[str, Any]:
        """The wish beside the preset, if there is one: name -> value."""
        others = (field.name for field in fields(self) if field.name != "preset")
        return {name: value for name in others if (value := getattr(self, name)) is not None}

    def of(self, policy: CachePolicy) -> Plan:
        """Return the plan of a policy; raises PolicyError where it has none for this wish."""
        return policy.plan(**self.given) if self.given else policy.preset(self.preset)

    def steps_of(self, total: int) -> int | None:
        """Return how many of `total` steps this wish computes; None where errors have to tell.

        Raises:
            PolicyError: not so many, or none.
        """
        if self.max_error is not None or self.psnr is not None:
            return None
        if self.budget is not None:
            steps = self.budget
        else:
            speedup = PRESETS[self.preset] if self.speedup is None else self.speedup
            steps = math.floor(total / speedup) if self.speedup else -(-total // int(speedup))
        if not 1 <= steps <= total:
            (name, value), *_ = self.given.items()
            raise PolicyError(f"{name}: found {value}, expected 1 to {total} of {total} steps")
        return steps
