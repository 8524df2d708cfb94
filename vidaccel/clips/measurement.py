"""Adds what a comparison has shown to the learned policy whose plan was compared."""

from dataclasses import dataclass
from typing import Any

from vidaccel.api import engines_of, report
from vidaccel.automatic import unlike
from vidaccel.errors import PolicyError
from vidaccel.plans import user_folder
from vidaccel.plans.measured import MeasuredClip, digest_of
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import CachePolicy


@dataclass(frozen=True, eq=False)
class LearnedPlan:
    """A plan that has just run, and the learned policy that it is of."""

    plan: Plan
    policy: CachePolicy

    def add(
        self,
        call: dict[str, Any],
        seed: int,
        *,
        psnr: float,
        ssim: float | None,
        speedup: float,
    ) -> list[str]:
        """Add what the clip was like beside the plain one to what is known of the plan.

        Args:
            call: arguments of the pipeline's call.
            seed: seed of the noise.
            psnr: in dB.
            ssim: structural similarity; None where it cannot be computed.
            speedup: against the plain run.

        Returns:
            Notes: one where it could not be kept.
        """
        shown = repr((call.get("prompt"), call.get("negative_prompt")))
        record = MeasuredClip.of(self.plan, shown, seed, psnr=psnr, ssim=ssim, speedup=speedup)
        try:
            user_folder.add_measured(self.policy, record)
        except PolicyError as error:
            return [f"what was measured could not be kept: {error}"]
        return []


def learned_plan(pipe: Any) -> LearnedPlan | None:
    """Return the plan of the run that has just ended, where it is one of a learned policy.

    None where something else changed the clip, too: a block cache had steps computed, or attention
    was sparse.

    Args:
        pipe: the pipeline, still accelerated.
    """
    generations = [engine.generation for engine in engines_of(pipe).values()]
    ran = [generation for generation in generations if generation is not None]
    plans = {generation.plan for generation in ran}
    if len(plans) != 1 or any(generation.cache is not None for generation in ran):
        return None
    (plan,) = plans
    if plan is None or len(plan.steps) == plan.num_inference_steps:
        return None
    attentions = (part.attention for part in report(pipe).transformers)
    if any(attention is not None and attention.sparse_calls for attention in attentions):
        return None
    run = ran[0].run
    for _, policy in user_folder.policies(run):
        stored = policy.plans.get(str(len(plan.steps)))
        if policy.provenance != "learned" or unlike(policy, run) or not policy.fits(run):
            continue
        if stored and digest_of(stored.to_plan(plan.num_inference_steps)) == digest_of(plan):
            return LearnedPlan(plan, policy)
    return None
