"""A method at one setting, and the run that it is made for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from vidaccel.api import accelerate, restore
from vidaccel.bench.records import VariantSetting
from vidaccel.errors import PolicyError
from vidaccel.plans.generic import generic_plan
from vidaccel.plans.plan import Plan, RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.resolve import Resolver

# Plans compute the number of steps divided by these.
SPEEDUPS = (1.3, 2, 3, 4, 5, 6)
# A plan with a guard: steps over the plan's computed ones, threshold.
GUARDS = ((2, 0.12), (3, 0.2), (5, 0.4))


@dataclass(frozen=True)
class Variant:
    """One method at one setting.

    Attributes:
        method: its name.
        setting: what tells this variant from the others of the method; goes into the results.
        enabled: function of a pipeline that returns a context in which the method is on; the
            pipeline is exactly as before afterwards.
        steps: sampling steps, where they are not those of the call.
        foreign: it is another library's: what it raises is noted, and the others go on.
    """

    method: str
    setting: VariantSetting
    enabled: Callable[[Any], AbstractContextManager[None]] = field(repr=False, compare=False)
    steps: int | None = None
    foreign: bool = False


@dataclass(frozen=True)
class MethodContext:
    """The run that variants are made for.

    Attributes:
        steps: T, the sampling steps of the call.
        policy: policy for the methods that need one.
        ratios: what MagCache needs, see `vidaccel.bench.baselines.magnitude_ratios`.
        chosen: numbers of computed steps; empty for those of `SPEEDUPS`.
        searched: method -> budget -> plan, of methods that search by whole runs, see
            `vidaccel.bench.plan_searches`.
    """

    steps: int
    policy: CachePolicy | None = None
    ratios: tuple[float, ...] | None = None
    chosen: tuple[int, ...] = ()
    searched: Mapping[str, Mapping[int, Plan]] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """Numbers of computed steps, from careful to fast."""
        budgets = set(self.chosen) or {int(self.steps / speedup) for speedup in SPEEDUPS}
        return sorted((budget for budget in budgets if budget >= 2), reverse=True)

    def known_policy(self) -> CachePolicy:
        """Return the policy; raises PolicyError when there is none, or none for this run."""
        if self.policy is None:
            raise PolicyError("found no policy for this model and number of steps; pass one")
        if self.policy.num_inference_steps != self.steps:
            raise PolicyError(
                f"num_inference_steps: the policy is for {self.policy.num_inference_steps}, this "
                f"run has {self.steps}"
            )
        return self.policy

    def guarded_plans(self) -> Iterator[tuple[Plan, float]]:
        """Return the policy's plans of the guarded speedups with their thresholds."""
        policy = self.known_policy()
        for speedup, threshold in GUARDS:
            budget = int(self.steps / speedup)
            if budget in policy.budgets():
                yield policy.plan(budget=budget), threshold


# Makes the variants of a method of that name; raises PolicyError or UnsupportedPipelineError where
# it cannot run.
MakeVariants = Callable[[str, MethodContext], list[Variant]]


def accelerated(name: str, setting: VariantSetting, **options: Any) -> Variant:
    """Make a variant from arguments of `accelerate`."""

    @contextmanager
    def enabled(pipe: Any) -> Iterator[None]:
        accelerate(pipe, **{"attention": None, **options})
        try:
            yield
        finally:
            restore(pipe)

    return Variant(name, setting, enabled)


class GenericSchedule(Resolver):
    """Decides for the generic schedule of one budget, whatever is known of the run."""

    def __init__(self, budget: int, held: bool) -> None:
        super().__init__("auto", None)
        self._budget, self._held = budget, held

    def plan(self, run: RunSettings) -> Plan:
        """Return the schedule on the noise levels of a run."""
        sigmas = None if self._held else run.sigmas
        return generic_plan(self._budget, run.num_inference_steps, sigmas, guided=run.guided)
