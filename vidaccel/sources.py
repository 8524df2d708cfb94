"""What decides about the steps of a run: what `accelerate(policy=..., cache=...)` takes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vidaccel.dbcache import DBCache
from vidaccel.environment import shipped_policies
from vidaccel.errors import PlanError, PolicyError, UnsupportedPipelineError
from vidaccel.hosts import HostSpec
from vidaccel.plan import FEW_STEPS, PRESETS, Plan, PlanSource, Setting, plan_source
from vidaccel.policy import CachePolicy

# How much of the threshold of a model's row each preset allows.
_TOLERANCE = {"quality": 0.5, "balanced": 1.0, "fast": 2.0}


@dataclass(frozen=True)
class Course:
    """What decides about the steps of one generation.

    Attributes:
        plan: the computed steps; None lets the cache decide alone.
        cache: the block cache, with a threshold; None leaves the plan alone.
        origin: where that comes from, for reports.
    """

    plan: Plan | None
    cache: DBCache | None
    origin: str = ""


@dataclass(frozen=True)
class CourseSource:
    """A course that may wait for the run it is used in.

    Attributes:
        description: how a report names it.
        resolve: the run and the model's row -> the course; raises PlanError when none fits.
        cache: the block cache that was asked for, if any.
    """

    description: str
    resolve: Callable[[Setting, HostSpec], Course]
    cache: DBCache | None = None

    def check(self, transformer: Any, host: HostSpec) -> None:
        """Hold the block cache against the blocks of a transformer.

        Raises:
            PlanError: there are too few blocks for its probe and corrector blocks.
            UnsupportedPipelineError: the model cannot have corrector blocks.
        """
        if self.cache is None:
            return
        probe, corrector = self.cache.probe_blocks, self.cache.corrector_blocks
        name = type(transformer).__name__
        first, last = (len(getattr(transformer, host.blocks[i].name)) for i in (0, -1))
        total = host.block_count(transformer) // host.unit
        if probe + corrector >= total:
            raise PlanError(
                f"probe_blocks + corrector_blocks is {probe} + {corrector}, but {name} has {total} "
                f"blocks: leave at least one between them"
            )
        if probe >= first and len(host.blocks) > 1 and not host.interleaved:
            raise PlanError(
                f"probe_blocks is {probe}, but {host.blocks[0].name} of {name} has {first} blocks: "
                f"probe {first - 1} at most"
            )
        if corrector > last:
            raise PlanError(
                f"corrector_blocks is {corrector}, but {host.blocks[-1].name} of {name} has "
                f"{last} blocks: correct {last} at most"
            )
        if corrector and host.no_corrector:
            raise UnsupportedPipelineError(f"{name} {host.no_corrector}: set corrector_blocks=0")


def course_source(
    policy: Any, cache: Any, preset: str = "balanced", *, allow_transfer: bool = False
) -> CourseSource:
    """What `accelerate(policy=..., cache=...)` takes, as a `CourseSource`.

    Args:
        policy: as `policy_source`.
        cache: None; a `DBCache`, which guards the plan of a policy and decides alone where there
            is none (policy=None, or "auto" without one that fits); or "auto": a `DBCache` where the
            policy is "auto", none fits, and the model's row has a threshold.
        preset, allow_transfer: as `policy_source`.

    Raises:
        PlanError, PolicyError: when it is none of these, or cannot be read.
    """
    source = policy_source(policy, preset, allow_transfer=allow_transfer)
    if cache is not None and cache != "auto" and not isinstance(cache, DBCache):
        raise PlanError(f"cache is 'auto', None or a DBCache, found {type(cache).__name__}")
    given = cache if isinstance(cache, DBCache) else None
    alone = given is not None and policy is None
    if given is not None and not given.probe_blocks and (alone or policy == "auto"):
        raise PlanError("probe_blocks=0 leaves nothing to decide by: use it with a plan or policy")

    def resolve(setting: Setting, host: HostSpec) -> Course:
        """What decides in this run; raises PlanError or PolicyError when nothing fits it."""
        if given is not None and policy is None:
            return _deciding(given, setting, host)
        if policy == "auto":
            plan = _automatic(setting, preset)
            if plan is None and given is not None:
                return _deciding(given, setting, host)
            if plan is None and cache == "auto" and host.threshold is not None:
                threshold = host.threshold * _TOLERANCE[preset]
                return _deciding(DBCache(threshold=threshold), setting, host)
            plan = plan or _evenly(setting, preset)
        else:
            plan = source.resolve(setting)
        guard = None if given is None else given.with_threshold(host.threshold)
        return Course(plan, guard, plan.origin)

    named = [] if alone else [source.description]
    named += [] if given is None else [str(given)]
    return CourseSource(" with ".join(named), resolve, given)


def _deciding(cache: DBCache, setting: Setting, host: HostSpec) -> Course:
    """A block cache that decides alone."""
    cache, steps = cache.with_threshold(host.threshold), setting.num_inference_steps
    if cache.warmup_interval == 1 and cache.warmup_steps >= steps:
        raise PlanError(
            f"warmup_steps is {cache.warmup_steps}, but this run has {steps} steps, so nothing "
            f"could be reused: set it below {steps}"
        )
    return Course(None, cache, str(cache))


def policy_source(
    policy: Any, preset: str = "balanced", *, allow_transfer: bool = False
) -> PlanSource:
    """What `accelerate(policy=...)` takes, as a `PlanSource`.

    Args:
        policy: "auto" (a policy that comes with vidaccel and fits the run, otherwise evenly spaced
            steps), a `CachePolicy`, a file, a folder or hub id that holds one, or what
            `vidaccel.plan.plan_source` takes.
        preset: "quality", "balanced" or "fast": a speedup of 2, 3 or 5, as far as a policy goes.
        allow_transfer: carry a policy that was given over to another number of steps, scheduler or
            noise grid of the same model; without it such a run is refused.

    Raises:
        PlanError, PolicyError: when it is none of these, or cannot be read.
    """
    if preset not in PRESETS:
        raise PlanError(f"preset is one of {', '.join(map(repr, PRESETS))}, found {preset!r}")
    if policy == "auto":
        return PlanSource(
            "auto", lambda setting: _automatic(setting, preset) or _evenly(setting, preset)
        )
    name = "given"
    if isinstance(policy, os.PathLike) or (
        isinstance(policy, str) and ("/" in policy or policy.endswith(".json"))
    ):
        name = os.fspath(policy)
        policy = CachePolicy.from_pretrained(policy)
    if not isinstance(policy, CachePolicy):
        return plan_source(policy)
    plan, chosen = policy.preset(preset), policy

    def resolve(setting: Setting) -> Plan:
        """The plan of the policy for this run; raises PolicyError when it is for another."""
        try:
            chosen.check(setting)
        except PolicyError:
            if not allow_transfer:
                raise
            from vidaccel.lemica.transfer import transferred

            moved = transferred(chosen, setting).preset(preset)
            total = chosen.num_inference_steps
            return replace(moved, origin=f"{moved}, transferred from {total} steps, not validated")
        return plan

    return PlanSource(f"policy {name}: {plan}", resolve)


def _automatic(setting: Setting, preset: str) -> Plan | None:
    """The plan of a policy that comes with vidaccel and is made for this run, if there is one."""
    steps = setting.num_inference_steps
    if steps < FEW_STEPS:
        return replace(Plan.every(1, steps), origin="every step, since the run has few")
    for name, policy in _shipped():
        if policy.fits(setting):
            note = "" if policy.validation else ", not validated here"
            return replace(policy.preset(preset), origin=f"{name} ({policy.provenance}{note})")
    return None


def _evenly(setting: Setting, preset: str) -> Plan:
    n, steps = PRESETS[preset], setting.num_inference_steps
    return replace(Plan.every(n, steps), origin=f"every {n}, evenly spaced, not calibrated")


@cache
def _shipped() -> list[tuple[str, CachePolicy]]:
    """The policies that come with vidaccel, measured ones first."""
    found = [(name, CachePolicy.load(path)) for name, path in shipped_policies().items()]
    return sorted(found, key=lambda entry: (entry[1].provenance != "measured", entry[0]))
