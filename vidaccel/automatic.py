"""Finds the plan of `policy="auto"`: the best that is known of a run, and a good one otherwise.

In this order, and a report says which it was: a policy that is made for the run; a measured one of
the same model, carried over to its noise levels; a list published for the same model, carried over
by position; the generic schedule. Runs of few steps are computed whole.
"""

from dataclasses import replace
from functools import lru_cache

from vidaccel.errors import PolicyError
from vidaccel.lemica.transfer import transferred
from vidaccel.plans.generic import SHORT_RUN, along_damped_lines, generic_plan
from vidaccel.plans.plan import FEW_STEPS, PRESETS, Plan, RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import load_shipped

FEW = "every step, since the run has few"
# Errors are carried over to runs of up to so many steps; the search grows with them.
MOST_STEPS = 200
# How much slower than its preset a plan may be that is carried over.
SLOWER = 1.25
# What makes the plan of a run better of which nothing is known.
_ADVICE = "vidaccel build-policy measures a better one"


def known_plan(run: RunSettings, preset: str) -> Plan | None:
    """Return the plan that follows from what is known of the model of a run; None: nothing is.

    Args:
        run: the run.
        preset: "quality", "balanced" or "fast".
    """
    if run.num_inference_steps < FEW_STEPS:
        return replace(Plan.every(1, run.num_inference_steps), origin=FEW)
    for find in (_made_for, _transferred, _by_position):
        for name, policy in load_shipped():
            plan = find(name, policy, run, preset)
            if plan is not None:
                return plan
    return None


def generic(run: RunSettings, preset: str) -> Plan:
    """Return the generic schedule of a preset for a run of which nothing is known."""
    total = run.num_inference_steps
    plan = generic_plan(-(-total // PRESETS[preset]), total, run.sigmas)
    return replace(plan, origin=f"generic schedule, {plan}, not calibrated: {_ADVICE}")


def with_doubt(origin: str, policy: CachePolicy, run: RunSettings) -> str:
    """Add to an origin what is not known of the model of the run."""
    return "; ".join(filter(None, (origin, policy.doubt(run))))


def _made_for(name: str, policy: CachePolicy, run: RunSettings, preset: str) -> Plan | None:
    """The plan of a policy that is made for this run."""
    if not policy.fits(run):
        return None
    note = "" if policy.validation else ", not validated here"
    origin = with_doubt(f"{name} ({policy.provenance}{note})", policy, run)
    return replace(_filled(policy, preset, run), origin=origin)


def _transferred(name: str, policy: CachePolicy, run: RunSettings, preset: str) -> Plan | None:
    """The plan of measured errors that are carried over to the noise levels of this run."""
    if not policy.edges or policy.model.proof(run) is None or run.sigmas is None:
        return None
    # Errors of a longer run say little of the few large steps of a short one.
    if run.num_inference_steps < SHORT_RUN:
        return None
    try:
        policy.check_model(run)
        plan = _plan_on(name, run.scheduler, run.sigmas, preset)
    except PolicyError:  # another model, or a noise grid that errors cannot be carried over to
        return None
    if len(plan.steps) * PRESETS[preset] > SLOWER * run.num_inference_steps:
        return None
    total = policy.num_inference_steps
    origin = f"{plan}, transferred from {name} ({total} steps), not validated"
    return replace(plan, origin=with_doubt(origin, policy, run))


@lru_cache(maxsize=64)
def _plan_on(name: str, scheduler: str | None, sigmas: tuple[float, ...], preset: str) -> Plan:
    """The plan of a shipped policy on another noise grid, searched once per grid."""
    if len(sigmas) > MOST_STEPS:
        raise PolicyError(f"found {len(sigmas)} steps, expected at most {MOST_STEPS}")
    run = RunSettings(len(sigmas), scheduler=scheduler, sigmas=sigmas)
    return transferred(dict(load_shipped())[name], run).preset(preset)


def _by_position(name: str, policy: CachePolicy, run: RunSettings, preset: str) -> Plan | None:
    """The plan of a published list, each step at the same place between first and last."""
    if policy.provenance != "published" or policy.model.proof(run) is None:
        return None
    try:
        policy.check_model(run)
    except PolicyError:
        return None
    listed, total = policy.preset(preset), run.num_inference_steps
    stretch = (total - 1) / (policy.num_inference_steps - 1)
    steps = tuple(dict.fromkeys(round(step * stretch) for step in listed.steps))
    plan = Plan(steps, total)
    plan = plan if run.sigmas is None else along_damped_lines(plan, run.sigmas)
    origin = f"{plan}, carried over by position from {name}, not validated: {_ADVICE}"
    return replace(plan, origin=with_doubt(origin, policy, run))


def _filled(policy: CachePolicy, preset: str, run: RunSettings) -> Plan:
    """The plan of a preset; along damped lines where only its steps are known."""
    plan = policy.preset(preset)
    if policy.edges or plan.orders or plan.errors or run.sigmas is None:
        return plan
    return along_damped_lines(plan, run.sigmas)
