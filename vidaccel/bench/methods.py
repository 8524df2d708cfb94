"""The methods that `vidaccel bench quality` compares, each at settings from careful to fast."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np

from vidaccel.api import accelerate, restore
from vidaccel.bench.baselines import BASELINES, BaselineSetting
from vidaccel.dbcache import DBCache
from vidaccel.errors import PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.lemica import search
from vidaccel.plans.plan import PRESETS, Plan
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies
from vidaccel.svg2.settings import SVG2

# Plans compute the number of steps divided by these.
SPEEDUPS = (1.3, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Variant:
    """One method at one setting.

    Attributes:
        method: its name.
        setting: what tells this variant from the others of the method; goes into the results.
        enabled: pipe -> a context in which it is on; the pipeline is exactly as before afterwards.
        steps: sampling steps, where they are not those of the call.
        foreign: from another library: what it raises is noted, and the others go on.
    """

    method: str
    setting: BaselineSetting
    enabled: Callable[[Any], AbstractContextManager[None]] = field(repr=False, compare=False)
    steps: int | None = None
    foreign: bool = False


@dataclass(frozen=True)
class MethodContext:
    """What the variants are made for.

    Attributes:
        steps: T, the sampling steps of the call.
        policy: for the methods that need one.
        ratios: what MagCache needs, see `vidaccel.bench.baselines.magnitude_ratios`.
    """

    steps: int
    policy: CachePolicy | None = None
    ratios: tuple[float, ...] | None = None

    @property
    def budgets(self) -> list[int]:
        """Numbers of computed steps, from careful to fast."""
        budgets = {int(self.steps / speedup) for speedup in SPEEDUPS}
        return sorted((budget for budget in budgets if budget >= 2), reverse=True)

    def known_policy(self) -> CachePolicy:
        """The policy; raises PolicyError when there is none, or none for this run."""
        if self.policy is None:
            raise PolicyError("found no policy for this model and number of steps; pass one")
        if self.policy.num_inference_steps != self.steps:
            raise PolicyError(
                f"num_inference_steps: the policy is for {self.policy.num_inference_steps}, this "
                f"run has {self.steps}"
            )
        return self.policy


def variants(
    names: Sequence[str] | None, contest: MethodContext
) -> tuple[list[Variant], dict[str, str]]:
    """The variants of the named methods, or of all that can run here.

    Returns:
        The variants, and method -> why it was left out, which happens only to methods that were
        not asked for by name.

    Raises:
        PlanError: no such method.
        PolicyError, UnsupportedPipelineError: a named method needs what is not there.
    """
    check_names(names or ())
    found: list[Variant] = []
    left_out = {}
    for name in names or METHODS:
        try:
            found += METHODS[name](name, contest)
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


def _accelerated(name: str, setting: BaselineSetting, **options: Any) -> Variant:
    @contextmanager
    def enabled(pipe: Any) -> Iterator[None]:
        accelerate(pipe, **{"attention": None, **options})
        try:
            yield
        finally:
            restore(pipe)

    return Variant(name, setting, enabled)


def _planned(name: str, plan: Plan) -> Variant:
    setting: BaselineSetting = {"steps": list(plan.steps)}
    for part, values in (("orders", plan.orders), ("scales", getattr(plan, "scales", ()))):
        if any(values):
            setting[part] = list(values)
    return _accelerated(name, setting, policy=plan, cache=None)


def _stored(name: str, contest: MethodContext) -> list[Variant]:
    """The plans of the policy, as far as there is one for each budget."""
    policy = contest.known_policy()
    return [_planned(name, policy.plan(budget=b)) for b in contest.budgets if b in policy.budgets()]


def _solved(objective: str, order: int = 0) -> "Method":
    """Plans searched anew in the errors of the policy's held segments."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One plan for each budget that has a path; raises PolicyError without errors."""
        policy = contest.known_policy()
        if not policy.edges:
            raise PolicyError("edges: found none, so no path through them can be searched")
        errors = np.full((contest.steps, contest.steps), np.inf)
        for step in range(contest.steps - 1):
            errors[step, step + 1] = 0.0
        for edge in policy.edges:
            held = not getattr(edge, "order", 0)
            if held and edge.end < contest.steps:
                errors[edge.start, edge.end] = edge.mean
        plans = search.solve(errors, contest.budgets, objective=objective)
        found = [plans[budget] for budget in contest.budgets if budget in plans]
        return [_planned(name, plan.forecast(order) if order else plan) for plan in found]

    return made


def _even(order: int) -> "Method":
    """Computed steps at equal distances."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One plan for each budget."""
        plans = [Plan.spread(budget, contest.steps) for budget in contest.budgets]
        return [_planned(name, plan.forecast(order) if order else plan) for plan in plans]

    return made


def _dense_start(name: str, contest: MethodContext) -> list[Variant]:
    """Nothing measured: gaps that widen from the start to the end, and a line over each."""
    found = []
    for budget in contest.budgets:
        steps = [0]
        for i in range(1, budget):
            wanted = round((contest.steps - 1) * (i / (budget - 1)) ** WIDENING)
            steps.append(max(wanted, steps[-1] + 1))
        found.append(_planned(name, Plan(tuple(steps), contest.steps).forecast(1)))
    return found


def _fewer_steps(name: str, contest: MethodContext) -> list[Variant]:
    """Shorter runs of the plain pipeline."""

    @contextmanager
    def plain(pipe: Any) -> Iterator[None]:
        """The pipeline as it is."""
        yield

    return [Variant(name, {"steps": b}, plain, steps=b) for b in contest.budgets]


def _peer(peer: str, *settings: BaselineSetting) -> "Method":
    """What others accelerate with, in some settings."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One for each setting; raises UnsupportedPipelineError where it cannot run."""
        row = BASELINES[peer]
        if row.unavailable is not None:
            raise UnsupportedPipelineError(row.unavailable)
        needed: BaselineSetting = {}
        if row.ratios:
            if contest.ratios is None:
                raise UnsupportedPipelineError(f"{peer} was not calibrated on this model")
            needed = {"mag_ratios": list(contest.ratios), "num_inference_steps": contest.steps}
        # What was calibrated belongs to the setting: shards of another calibration are others.
        shown = {"mag_ratios": _digest(contest.ratios)} if row.ratios else {}
        return [
            Variant(name, s | shown, partial(row.enabled, setting=s | needed), foreign=True)
            for s in settings
        ]

    return made


def _dbcache(probe: int, corrector: int, order: int) -> "Method":
    """The block cache by itself."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One for each threshold."""
        found = []
        for threshold, warmup, run in DBCACHE:
            setting: BaselineSetting = {
                "threshold": threshold,
                "probe_blocks": probe,
                "corrector_blocks": corrector,
                "warmup_steps": warmup,
                "max_consecutive": None if run < 0 else run,
                "forecast_order": order,
            }
            found.append(_accelerated(name, setting, policy=None, cache=DBCache(**setting)))
        return found

    return made


def _guarded(probe: int, corrector: int) -> "Method":
    """The stored plans, with a threshold that has more steps computed where they drift."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One for each guarded speedup that the policy has a plan for."""
        policy, found = contest.known_policy(), []
        for speedup, threshold in GUARDS:
            budget = int(contest.steps / speedup)
            if budget not in policy.budgets():
                continue
            cache: BaselineSetting = {"probe_blocks": probe, "corrector_blocks": corrector}
            if probe:
                cache["threshold"] = threshold
            plan = policy.plan(budget=budget)
            setting = {**_planned(name, plan).setting, **cache}
            found.append(_accelerated(name, setting, policy=plan, cache=DBCache(**cache)))
        return found

    return made


def _sparse(*, plan: bool = False, probe: int = 0) -> "Method":
    """Sparse attention, alone or with the stored plans, the block cache or both."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """One for each guarded speedup; alone, a single one."""
        attention = SVG2(top_p=TOP_P, min_tokens=0)
        found = []
        # Alone it has one setting, and the others the speeds of the guarded plans.
        for speedup, threshold in GUARDS if plan or probe else GUARDS[:1]:
            setting: BaselineSetting = {"top_p": TOP_P}
            options: dict[str, Any] = {"policy": None, "cache": None, "attention": attention}
            if plan:
                policy, budget = contest.known_policy(), int(contest.steps / speedup)
                if budget not in policy.budgets():
                    continue
                options["policy"] = policy.plan(budget=budget)
                setting |= _planned(name, options["policy"]).setting
            if probe:
                cache: BaselineSetting = {"probe_blocks": probe, "threshold": threshold}
                options["cache"] = DBCache(**cache)
                setting |= cache
            found.append(_accelerated(name, setting, **options))
        return found

    return made


def _preset(preset: str) -> "Method":
    """What `accelerate` does by itself."""

    def made(name: str, contest: MethodContext) -> list[Variant]:
        """The preset, whatever the budgets."""
        # What it comes to depends on the policies that are there.
        policies = [path.read_text("utf-8") for path in shipped_policies().values()]
        setting: BaselineSetting = {"preset": preset, "policies": _digest(policies)}
        return [_accelerated(name, setting, preset=preset, attention="auto")]

    return made


def _digest(values: Sequence[float] | Sequence[str] | None) -> str:
    """A short name of a calibration, or of policies."""
    return sha256(json.dumps(values).encode()).hexdigest()[:8]


def _cache_dit(probe: int, corrector: int, order: int) -> "Method":
    """The same settings for all."""
    return _peer(
        "cache-dit",
        *(
            {
                "Fn_compute_blocks": probe,
                "Bn_compute_blocks": corrector,
                "residual_diff_threshold": threshold,
                "max_warmup_steps": warmup,
                "max_continuous_cached_steps": run,
                "taylorseer_order": order,
            }
            for threshold, warmup, run in DBCACHE
        ),
    )


Method = Callable[[str, MethodContext], list[Variant]]

WIDENING = 1.8  # exponent of the position of a dense start's steps; 1 is evenly spaced

# DBCache: threshold on the relative change of the probe, warm-up steps, longest run of reused steps
# (-1: any). The one with 0.12 is what cache-dit's own command line starts from.
DBCACHE = ((0.05, 8, -1), (0.12, 8, 3), (0.2, 4, 4), (0.4, 4, -1))

# A plan with a guard: steps over the plan's computed ones, threshold.
GUARDS = ((2, 0.12), (3, 0.2), (5, 0.4))

TOP_P = 0.9  # of sparse attention, its default

METHODS: dict[str, Method] = {
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
        for probe, corrector in ((1, 0), (1, 1), (2, 2))
        for order in (0, 1)
    },
    **{
        f"plan + DBCache F{probe}B{corrector}": _guarded(probe, corrector)
        for probe, corrector in ((1, 0), (1, 1), (2, 2), (0, 1))
    },
    "SVG2": _sparse(),
    "DBCache F1B0 + SVG2": _sparse(probe=1),
    "plan + SVG2": _sparse(plan=True),
    "plan + DBCache F1B0 + SVG2": _sparse(plan=True, probe=1),
    "evenly spaced": _even(0),
    "evenly spaced + line": _even(1),
    "dense start + line": _dense_start,
    "fewer sampling steps": _fewer_steps,
    "FirstBlockCache": _peer(
        "FirstBlockCache",
        *({"threshold": t} for t in (0.03, 0.05, 0.08, 0.12, 0.3)),
    ),
    "MagCache": _peer(
        "MagCache",
        *(
            {"threshold": threshold, "max_skip_steps": skip, "retention_ratio": retention}
            for threshold, skip, retention in (
                (0.02, 1, 0.2),
                (0.02, 2, 0.2),
                (0.06, 3, 0.2),
                (0.12, 4, 0.2),
                (0.24, 5, 0.1),
                (0.8, 10, 0.1),
            )
        ),
    ),
    "TaylorSeer": _peer(
        "TaylorSeer",
        {"cache_interval": 2, "disable_cache_before_step": 24},
        *({"cache_interval": n} for n in (2, 4, 6)),
    ),
    "TaylorSeer lite": _peer(
        "TaylorSeer lite",
        {"cache_interval": 2, "disable_cache_before_step": 24},
        *({"cache_interval": n} for n in (2, 3, 5, 8)),
    ),
    "SeaCache": _peer(
        "SeaCache",
        *(
            {"threshold": threshold, "max_consecutive_cached": run}
            for threshold, run in (
                (0.03, 1),
                (0.06, 1),
                (0.1, 2),
                (0.15, 4),
                (0.5, 5),
                (1.0, 6),
                (2.0, 8),
            )
        ),
    ),
    **{
        f"cache-dit F{probe}B{corrector}{' TaylorSeer' if order else ''}": _cache_dit(
            probe, corrector, order
        )
        for probe, corrector in ((1, 0), (1, 1), (2, 2))
        for order in (0, 1)
    },
}
