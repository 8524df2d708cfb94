"""Where the plan of a run comes from: what `accelerate(policy=...)` takes."""

import os
from dataclasses import replace
from functools import cache
from typing import Any

from vidaccel.environment import shipped_policies
from vidaccel.errors import PlanError
from vidaccel.plan import FEW_STEPS, PRESETS, Plan, PlanSource, Setting, plan_source
from vidaccel.policy import CachePolicy


def policy_source(policy: Any, preset: str = "balanced") -> PlanSource:
    """What `accelerate(policy=...)` takes, as a `PlanSource`.

    Args:
        policy: "auto" (a policy that comes with vidaccel and fits the run, otherwise evenly spaced
            steps), a `CachePolicy`, a file, a folder or hub id that holds one, or what
            `vidaccel.plan.plan_source` takes.
        preset: "quality", "balanced" or "fast": a speedup of 2, 3 or 5, as far as a policy goes.

    Raises:
        PlanError, PolicyError: when it is none of these, or cannot be read.
    """
    if preset not in PRESETS:
        raise PlanError(f"preset is one of {', '.join(map(repr, PRESETS))}, found {preset!r}")
    if policy == "auto":
        return PlanSource("auto", lambda setting: _automatic(setting, preset))
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
        chosen.check(setting)
        return plan

    return PlanSource(f"policy {name}: {plan}", resolve)


def _automatic(setting: Setting, preset: str) -> Plan:
    """A policy that comes with vidaccel and is made for this run, or evenly spaced steps."""
    steps = setting.num_inference_steps
    if steps < FEW_STEPS:
        return replace(Plan.every(1, steps), origin="every step, since the run has few")
    for name, policy in _shipped():
        if policy.fits(setting):
            note = "" if policy.validation else ", not validated here"
            return replace(policy.preset(preset), origin=f"{name} ({policy.provenance}{note})")
    n = PRESETS[preset]
    return replace(Plan.every(n, steps), origin=f"every {n}, evenly spaced, not calibrated")


@cache
def _shipped() -> list[tuple[str, CachePolicy]]:
    """The policies that come with vidaccel, measured ones first."""
    found = [(name, CachePolicy.load(path)) for name, path in shipped_policies().items()]
    return sorted(found, key=lambda entry: (entry[1].provenance != "measured", entry[0]))
