"""The methods that `vidaccel bench quality` compares, each at settings from careful to fast."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np

from vidaccel.bench.baselines import (
    BASELINE_METHODS,
    BASELINES,
    BLOCK_CACHE_LAYOUTS,
    BLOCK_CACHE_SETTINGS,
    BaselineMethod,
)
from vidaccel.bench.filled_methods import make_average_velocity, spectrum
from vidaccel.bench.plan_searches import SEARCHES
from vidaccel.bench.records import VariantSetting
from vidaccel.bench.variants import (
    GUARDS,
    GenericSchedule,
    MakeVariants,
    MethodContext,
    Variant,
    accelerated,
)
from vidaccel.dbcache import DBCache
from vidaccel.errors import PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.lemica import search
from vidaccel.plans.plan import PRESETS, Plan
from vidaccel.plans.shipped import shipped_policies
from vidaccel.svg2.settings import SVG2

WIDENING = 1.8  # exponent of the position of a dense start's steps; 1 is evenly spaced
TOP_P = 0.9  # of sparse attention, its default


def variants(
    names: Sequence[str] | None, context: MethodContext
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants of the named methods, or of all that can run here.

    Returns:
        The variants, and method -> reason why it was left out, which happens only to methods that
        were not asked for by name.

    Raises:
        PlanError: no such method.
        PolicyError, UnsupportedPipelineError: a named method needs what is not there.
    """
    check_names(names or ())
    found: list[Variant] = []
    left_out = {}
    for name in names or METHODS:
        try:
            found += METHODS[name](name, context)
        except (PolicyError, UnsupportedPipelineError) as error:
            if names:
                raise
            left_out[name] = str(error)
    return found, left_out


def check_names(names: Sequence[str]) -> None:
    """Raise PlanError when one is no method."""
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise PlanError(f"methods: found {', '.join(unknown)}, expected {', '.join(METHODS)}")


def _plan_setting(plan: Plan) -> VariantSetting:
    """Describe a plan: its steps, and orders and scales where it forecasts."""
    setting: VariantSetting = {"steps": list(plan.steps)}
    for part, values in (("orders", plan.orders), ("scales", plan.scales)):
        if any(values):
            setting[part] = list(values)
    return setting


def planned(name: str, plan: Plan) -> Variant:
    """Make a variant from a plan alone."""
    return accelerated(name, _plan_setting(plan), policy=plan, cache=None)


def _stored(name: str, context: MethodContext) -> list[Variant]:
    """Make the plans of the policy, as far as there is one for each budget."""
    policy = context.known_policy()
    return [planned(name, policy.plan(budget=b)) for b in context.budgets if b in policy.budgets()]


def _solved(objective: str, order: int = 0) -> MakeVariants:
    """Plans searched anew in the errors of the policy's held segments."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        """Make one plan for each budget that has a path; raises PolicyError without errors."""
        policy = context.known_policy()
        if not policy.edges:
            raise PolicyError("edges: found none, so no path through them can be searched")
        errors = np.full((context.steps, context.steps), np.inf)
        for step in range(context.steps - 1):
            errors[step, step + 1] = 0.0
        for edge in policy.edges:
            if not edge.order and edge.end < context.steps:
                errors[edge.start, edge.end] = edge.mean
        plans = search.solve(errors, context.budgets, objective=objective)
        found = [plans[budget] for budget in context.budgets if budget in plans]
        return [planned(name, plan.forecast(order) if order else plan) for plan in found]

    return make


def _even(order: int) -> MakeVariants:
    """Computed steps at equal distances."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        plans = [Plan.spread(budget, context.steps) for budget in context.budgets]
        return [planned(name, plan.forecast(order) if order else plan) for plan in plans]

    return make


def generic(name: str, budget: int, *, held: bool = False) -> Variant:
    """Make a variant of what `policy="auto"` takes where nothing is known of a run."""
    return accelerated(name, {"budget": budget}, policy=GenericSchedule(budget, held))


def _generic(held: bool) -> MakeVariants:
    """The steps that `policy="auto"` takes where nothing is known of a run."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        """Make one schedule for each budget."""
        return [generic(name, budget, held=held) for budget in context.budgets]

    return make


def _searched(name: str, context: MethodContext) -> list[Variant]:
    """Make the plans that a search by whole runs has found."""
    if name not in context.searched:
        raise PolicyError(f"{name} searches by whole runs: allow some with --search-runs")
    return [planned(name, context.searched[name][budget]) for budget in context.budgets]


def _dense_start(name: str, context: MethodContext) -> list[Variant]:
    """Make plans without a measurement: gaps that widen from start to end, a line over each."""
    found = []
    for budget in context.budgets:
        steps = [0]
        for i in range(1, budget):
            wanted = round((context.steps - 1) * (i / (budget - 1)) ** WIDENING)
            steps.append(max(wanted, steps[-1] + 1))
        found.append(planned(name, Plan(tuple(steps), context.steps).forecast(1)))
    return found


def fewer_steps(name: str, steps: int) -> Variant:
    """Make a variant of a shorter run of the plain pipeline."""

    @contextmanager
    def plain(pipe: Any) -> Iterator[None]:
        yield

    return Variant(name, {"steps": steps}, plain, steps=steps)


def _fewer_steps(name: str, context: MethodContext) -> list[Variant]:
    """Make shorter runs of the plain pipeline."""
    return [fewer_steps(name, budget) for budget in context.budgets]


def baseline(name: str, library: str, setting: VariantSetting, context: MethodContext) -> Variant:
    """Make a variant of a cache of another library.

    Args:
        name: the method.
        library: the cache, a name in `BASELINES`.
        setting: its arguments.
        context: the run.

    Raises:
        UnsupportedPipelineError: it is not installed, or was not calibrated for this run.
    """
    row = BASELINES[library]
    if row.unavailable is not None:
        raise UnsupportedPipelineError(row.unavailable)
    needed: VariantSetting = {}
    shown: VariantSetting = {}
    if row.ratios:
        if context.ratios is None:
            raise UnsupportedPipelineError(f"{library} was not calibrated on this model")
        needed = {"mag_ratios": list(context.ratios), "num_inference_steps": context.steps}
        # A calibration belongs to the setting: shards of another one are others.
        shown = {"mag_ratios": _digest(context.ratios)}
    enabled = partial(row.enabled, setting=setting | needed)
    return Variant(name, setting | shown, enabled, foreign=True)


def _baseline(method: BaselineMethod) -> MakeVariants:
    """A cache of another library at its settings."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        return [baseline(name, method.baseline, s, context) for s in method.settings]

    return make


def block_cache(name: str, setting: VariantSetting) -> Variant:
    """Make a variant of the block cache by itself, from arguments of `DBCache`."""
    return accelerated(name, setting, policy=None, cache=DBCache(**setting))


def _dbcache(probe: int, corrector: int, order: int) -> MakeVariants:
    """The block cache by itself, at each threshold."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        found = []
        for threshold, warmup, run in BLOCK_CACHE_SETTINGS:
            setting: VariantSetting = {
                "threshold": threshold,
                "probe_blocks": probe,
                "corrector_blocks": corrector,
                "warmup_steps": warmup,
                "max_consecutive": None if run < 0 else run,
                "forecast_order": order,
            }
            found.append(block_cache(name, setting))
        return found

    return make


def _guarded(probe: int, corrector: int) -> MakeVariants:
    """The stored plans, with a threshold that has more steps computed where they drift."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        found = []
        for plan, threshold in context.guarded_plans():
            cache: VariantSetting = {"probe_blocks": probe, "corrector_blocks": corrector}
            if probe:
                cache["threshold"] = threshold
            setting = _plan_setting(plan) | cache
            found.append(accelerated(name, setting, policy=plan, cache=DBCache(**cache)))
        return found

    return make


def _sparse(*, plan: bool = False, probe: int = 0) -> MakeVariants:
    """Sparse attention: alone, or with the stored plans, the block cache or both."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        """Make one for each guarded speedup; alone, a single one."""
        plans: list[tuple[Plan | None, float]] = [(None, threshold) for _, threshold in GUARDS]
        if plan:
            plans = list(context.guarded_plans())
        elif not probe:
            plans = plans[:1]
        found = []
        for stored, threshold in plans:
            setting: VariantSetting = {"top_p": TOP_P}
            if stored is not None:
                setting |= _plan_setting(stored)
            cache: VariantSetting = {}
            if probe:
                cache = {"probe_blocks": probe, "threshold": threshold}
            found.append(
                accelerated(
                    name,
                    setting | cache,
                    policy=stored,
                    cache=DBCache(**cache) if cache else None,
                    attention=SVG2(top_p=TOP_P, min_tokens=0),
                )
            )
        return found

    return make


def _preset(preset: str) -> MakeVariants:
    """The choice that `accelerate` makes by itself, whatever the budgets."""

    def make(name: str, context: MethodContext) -> list[Variant]:
        # What it comes to depends on the policies that are there.
        policies = [path.read_text("utf-8") for path in shipped_policies().values()]
        setting: VariantSetting = {"preset": preset, "policies": _digest(policies)}
        return [accelerated(name, setting, preset=preset, attention="auto")]

    return make


def _digest(values: Sequence[float] | Sequence[str]) -> str:
    """Return a short name of a calibration, or of policies."""
    return sha256(json.dumps(values).encode()).hexdigest()[:8]


METHODS: dict[str, MakeVariants] = {
    **{f"preset {preset}": _preset(preset) for preset in PRESETS},
    "vidaccel plan": _stored,
    "LeMiCa leximax": _solved("leximax"),
    "LeMiCa leximax + line": _solved("leximax", order=1),
    "LeMiCa sum": _solved("sum"),
    "LeMiCa power(2)": _solved("power(2)"),
    **{
        f"DBCache F{probe}B{corrector}{' + line' if order else ''}": _dbcache(
            probe, corrector, order
        )
        for probe, corrector in BLOCK_CACHE_LAYOUTS
        for order in (0, 1)
    },
    **{
        f"plan + DBCache F{probe}B{corrector}": _guarded(probe, corrector)
        for probe, corrector in (*BLOCK_CACHE_LAYOUTS, (0, 1))
    },
    "SVG2": _sparse(),
    "DBCache F1B0 + SVG2": _sparse(probe=1),
    "plan + SVG2": _sparse(plan=True),
    "plan + DBCache F1B0 + SVG2": _sparse(plan=True, probe=1),
    "generic schedule": _generic(held=False),
    "generic schedule (held)": _generic(held=True),
    **dict.fromkeys(SEARCHES, _searched),
    "Spectrum (re-implemented)": spectrum(own_steps=True),
    "generic schedule + Chebyshev (Spectrum)": spectrum(own_steps=False),
    "generic schedule + average velocity (MeanCache)": make_average_velocity,
    "evenly spaced": _even(0),
    "evenly spaced + line": _even(1),
    "dense start + line": _dense_start,
    "fewer sampling steps": _fewer_steps,
    **{name: _baseline(method) for name, method in BASELINE_METHODS.items()},
}
