"""Finds the plan of `policy="auto"`: the best that is known of a run, and a good one otherwise.

In this order, and a report says which it was: a policy that is made for the run, the user's own
before those that come with vidaccel; one that was learned from a run of another size or guidance; a
measured one of the same model, carried over to its noise levels; a list published for the same
model, carried over by position; the generic schedule. Runs of few steps are computed whole.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

from vidaccel.errors import PolicyError
from vidaccel.lemica.transfer import transferred
from vidaccel.plans import user_folder
from vidaccel.plans.generic import SHORT_RUN, along_damped_lines, generic_plan
from vidaccel.plans.plan import FEW_STEPS, Plan, RunSettings
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import load_shipped
from vidaccel.plans.wish import Wish

FEW = "every step, since the run has few"
LEARNING = "every step, to learn from this run what reuse costs"
# Errors are carried over to runs of up to so many steps; the search grows with them.
MOST_STEPS = 200
# How much slower than its preset a plan may be that is carried over.
SLOWER = 1.25
# What gives a run of which nothing is known a plan of its own.
_ADVICE = 'policy="learn" learns its own from one run, vidaccel build-policy measures one'


def known_plan(run: RunSettings, wish: Wish) -> Plan | None:
    """Return the plan that follows from what is known of the model of a run; None: nothing is.

    Args:
        run: the run.
        wish: which of its plans.
    """
    if run.num_inference_steps < FEW_STEPS:
        return replace(Plan.every(1, run.num_inference_steps), origin=FEW)
    known = known_policies(run)
    for find in (_made_for, _learned_alike, _transferred, _by_position):
        if find is _learned_alike:
            known = sorted(known, key=lambda one: len(unlike(one.policy, run)))
        for policy in known:
            plan = find(policy, run, wish)
            if plan is not None:
                return plan
    return None


def measured_plan(run: RunSettings, wish: Wish) -> Plan | None:
    """Return the plan of a policy that was measured or learned for exactly such runs, if any."""
    if run.num_inference_steps < FEW_STEPS:
        return replace(Plan.every(1, run.num_inference_steps), origin=FEW)
    for known in known_policies(run):
        if known.policy.provenance in ("measured", "learned"):
            plan = _made_for(known, run, wish)
            if plan is not None:
                return plan
    return None


@dataclass(frozen=True, eq=False)
class Known:
    """A policy that is known by name.

    Attributes:
        name: where it is from, for reports.
        policy: the policy.
    """

    name: str
    policy: CachePolicy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.policy is other.policy

    def __hash__(self) -> int:
        return id(self.policy)


def known_policies(run: RunSettings) -> list[Known]:
    """Return the policies to choose from: those of the user's folder first, then the shipped."""
    own = [Known(f"own {name}", policy) for name, policy in user_folder.policies(run)]
    return own + [Known(name, policy) for name, policy in load_shipped()]


def generic(run: RunSettings, wish: Wish) -> Plan:
    """Return the generic schedule for a run of which nothing is known.

    Raises:
        PolicyError: the wish is one that only measured errors can fulfil.
    """
    total = run.num_inference_steps
    steps = wish.steps_of(total)
    if steps is None:
        (name, value), *_ = wish.given.items()
        raise PolicyError(
            f"{name}: found {value}, but no measured or learned policy fits this run of {total} "
            f"steps, and only its errors tell: {_ADVICE}; or ask for a speedup"
        )
    plan = generic_plan(steps, total, run.sigmas, guided=run.guided)
    return replace(plan, origin=f"generic schedule, {plan}, not calibrated: {_ADVICE}")


def with_doubt(origin: str, policy: CachePolicy, run: RunSettings) -> str:
    """Add to an origin what is not known of the model of the run."""
    return "; ".join(filter(None, (origin, policy.doubt(run))))


def _made_for(known: Known, run: RunSettings, wish: Wish) -> Plan | None:
    """The plan of a policy that is made for this run."""
    policy, name = known.policy, known.name
    learned = policy.provenance == "learned"
    if not policy.fits(run) or (learned and unlike(policy, run)):
        return None
    note = "" if policy.validation or learned else ", not validated here"
    note += f", adapters {', '.join(policy.adapters)} told by name" if policy.adapters else ""
    plan = _filled(policy, wish, run)
    told = f"{name} ({policy.provenance}{note}){_expected(policy, plan) if learned else ''}"
    return replace(plan, origin=with_doubt(told, policy, run))


def _expected(policy: CachePolicy, plan: Plan) -> str:
    """Say how close the clip of a learned plan is to come: by prediction, and as was measured."""
    budget = len(plan.steps)
    predicted = policy.predicted_psnr(budget)
    found = [clip.psnr for clip in user_folder.measured_clips(policy) if clip.budget == budget]
    told = "" if predicted is None else f", {predicted:.0f} dB predicted"
    if found:
        clips = f"{len(found)} clip{'s' * (len(found) > 1)}"
        told += f", {fmean(found):.0f} dB measured on {clips}"
    return told


def _learned_alike(known: Known, run: RunSettings, wish: Wish) -> Plan | None:
    """The plan that was learned from a run of another size or guidance, for the same steps."""
    policy = known.policy
    if policy.provenance != "learned" or policy.adapters != run.adapters or not policy.fits(run):
        return None
    origin = f"{known.name} (learned with {' and '.join(unlike(policy, run))})"
    return replace(wish.of(policy), origin=with_doubt(origin, policy, run))


def unlike(policy: CachePolicy, run: RunSettings) -> list[str]:
    """Return in what a learned policy is of another kind of run, besides its model and steps."""
    found = []
    if policy.latents != run.latents:
        found.append("another size")
    if policy.guidance.scale != run.guidance_scale:
        found.append(f"guidance scale {policy.guidance.scale}")
    if policy.model.precision != run.precision:
        found.append(policy.model.precision or "full precision")
    if policy.adapters != run.adapters:
        found.append(f"adapters {', '.join(policy.adapters) or 'none'}")
    return found


def _transferred(known: Known, run: RunSettings, wish: Wish) -> Plan | None:
    """The plan of measured errors that are carried over to the noise levels of this run."""
    policy, name = known.policy, known.name
    if policy.provenance == "learned" and policy.adapters != run.adapters:
        return None
    if not policy.edges or policy.model.proof(run) is None or run.sigmas is None:
        return None
    # Errors of a longer run say little of the few large steps of a short one.
    if run.num_inference_steps < SHORT_RUN:
        return None
    try:
        policy.check_model(run)
        plan = _plan_on(known, run.scheduler, run.sigmas, wish)
    except PolicyError:  # another model, or a noise grid that errors cannot be carried over to
        return None
    steps = wish.steps_of(run.num_inference_steps)
    if steps is not None and len(plan.steps) > SLOWER * steps:
        return None
    total = policy.num_inference_steps
    origin = f"{plan}, transferred from {name} ({total} steps), not validated"
    return replace(plan, origin=with_doubt(origin, policy, run))


@lru_cache(maxsize=64)
def _plan_on(known: Known, scheduler: str | None, sigmas: tuple[float, ...], wish: Wish) -> Plan:
    """The plan of a policy on another noise grid, searched once per grid."""
    if len(sigmas) > MOST_STEPS:
        raise PolicyError(f"found {len(sigmas)} steps, expected at most {MOST_STEPS}")
    run = RunSettings(len(sigmas), scheduler=scheduler, sigmas=sigmas)
    return wish.of(transferred(known.policy, run))


def _by_position(known: Known, run: RunSettings, wish: Wish) -> Plan | None:
    """The plan of a published list, each step at the same place between first and last."""
    policy, name = known.policy, known.name
    if policy.provenance != "published" or policy.model.proof(run) is None:
        return None
    try:
        policy.check_model(run)
        listed = wish.of(policy)
    except PolicyError:  # another model, or no plan for this wish
        return None
    total = run.num_inference_steps
    stretch = (total - 1) / (policy.num_inference_steps - 1)
    steps = tuple(dict.fromkeys(round(step * stretch) for step in listed.steps))
    plan = Plan(steps, total)
    if run.sigmas is not None:
        plan = along_damped_lines(plan, run.sigmas, guided=run.guided)
    origin = f"{plan}, carried over by position from {name}, not validated: {_ADVICE}"
    return replace(plan, origin=with_doubt(origin, policy, run))


def _filled(policy: CachePolicy, wish: Wish, run: RunSettings) -> Plan:
    """The plan of a policy; along damped lines where only its steps are known."""
    plan = wish.of(policy)
    if policy.edges or plan.orders or plan.errors or run.sigmas is None:
        return plan
    return along_damped_lines(plan, run.sigmas, guided=run.guided)
