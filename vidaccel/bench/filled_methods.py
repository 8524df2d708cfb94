"""The methods of `vidaccel bench quality` that fill reused steps as others do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from vidaccel.bench.fillings import average_velocity, chebyshev_features, widening_steps
from vidaccel.bench.records import VariantSetting
from vidaccel.bench.variants import (
    GenericSchedule,
    MakeVariants,
    MethodContext,
    Variant,
    accelerated,
)
from vidaccel.plans.plan import Plan
from vidaccel.resolve import Resolver

RIDGES = (0.1, 0.001)  # of Spectrum: that of the paper, and one that hardly holds down
SPANS = (2, 4)  # of MeanCache's average velocity, in steps


def spectrum(own_steps: bool) -> MakeVariants:
    """Features forecast by Chebyshev polynomials, in Spectrum's steps or the generic ones."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        """Make one for each budget and ridge."""
        found = []
        for budget in context.budgets:
            for ridge in RIDGES:
                steps = widening_steps(budget, context.steps) if own_steps else None
                policy = (
                    GenericSchedule(budget, held=False)
                    if steps is None
                    else Plan(steps, context.steps)
                )
                setting = {"budget": budget, "ridge": ridge}
                filling = partial(chebyshev_features, ridge=ridge)
                found.append(_filled(name, setting, policy, filling))
        return found

    return make


def make_average_velocity(name: str, context: MethodContext) -> list[Variant]:
    """Make the generic steps with MeanCache's average velocity, for each budget and span."""
    return [
        _filled(
            name,
            {"budget": budget, "span": span},
            GenericSchedule(budget, held=False),
            partial(average_velocity, span=span),
        )
        for budget in context.budgets
        for span in SPANS
    ]


def _filled(
    name: str,
    setting: VariantSetting,
    policy: Plan | Resolver,
    filling: Callable[[Any], AbstractContextManager[None]],
) -> Variant:
    """Make a variant of a plan whose reused steps are filled by another method."""
    plain = accelerated(name, setting, policy=policy, cache=None)

    @contextmanager
    def enabled(pipe: Any) -> Iterator[None]:
        with plain.enabled(pipe), filling(pipe):
            yield

    return Variant(name, setting, enabled)
