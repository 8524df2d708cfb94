"""Plans checked end to end: the errors of single segments say little about several of them at once.

Every candidate runs on prompts that were not used for the errors and is compared with the plain
run of the same prompt and noise; for each budget the best one is kept. Evenly spaced plans are
among the candidates, so what is kept is never worse than they are on these prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import accelerate, restore
from vidaccel.calibration.fidelity import fit_fidelity
from vidaccel.clips.fidelity import summary
from vidaccel.clips.generate import generate
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import StoredPlan, Validation, check_errors

MOST_DECIBELS = 99.0


@dataclass(frozen=True)
class Score:
    """Means over the prompts, against the plain run.

    Attributes:
        psnr: dB.
        worst_psnr: that of the worst prompt, dB.
        worst_frame_psnr: that of the worst frame of all prompts, dB.
        ssim, lpips, vmaf, cvvdp: None where they are not available.
        flicker: grey levels more than those of the plain run.
        seconds: time of one generation.
    """

    psnr: float
    worst_psnr: float
    worst_frame_psnr: float
    ssim: float | None
    lpips: float | None
    vmaf: float | None
    cvvdp: float | None
    flicker: float
    seconds: float


def scores(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[tuple[str, int]],
    plans: Mapping[str, Plan],
    fewer_steps: Iterable[int] = (),
    *,
    progress: bool = True,
) -> tuple[dict[str, Score], float]:
    """Run every plan on every sample.

    Args:
        pipe: the pipeline; it is left without acceleration.
        call: arguments of its call but the prompt.
        samples: (prompt, seed) of each generation.
        plans: name -> plan.
        fewer_steps: plain runs with so many sampling steps are scored as "B steps".
        progress: show a bar.

    Returns:
        Name -> score, and the seconds of a plain run.
    """
    found: dict[str, list[tuple[dict[str, Any], float]]] = {}
    plain_seconds = []
    whole = int(call["num_inference_steps"])
    # Some pipelines are asked for one more than they make.
    more = max((whole - plan.num_inference_steps for plan in plans.values()), default=0)
    variants: dict[str, tuple[Plan | None, int]] = {
        name: (plan, whole) for name, plan in plans.items()
    }
    variants |= {f"{steps} steps": (None, steps + more) for steps in fewer_steps}
    runs = len(samples) * (1 + len(variants))
    with tqdm(total=runs, unit="run", desc="validation", disable=not progress) as bar:
        for prompt, seed in samples:
            call = {**call, "prompt": prompt}
            plain = generate(restore(pipe), call, seed=seed, progress=False)
            plain_seconds.append(plain.seconds)
            bar.update()
            for name, (plan, steps) in variants.items():
                if plan is not None:
                    accelerate(pipe, policy=plan, cache=None, attention=None)
                asked = {**call, "num_inference_steps": steps}
                run = generate(pipe, asked, seed=seed, progress=False)
                restore(pipe)
                measured = summary(plain.frames, run.frames)
                found.setdefault(name, []).append((measured, run.seconds))
                bar.update()
    return {name: _mean(rows) for name, rows in found.items()}, fmean(plain_seconds)


def _mean(rows: Sequence[tuple[dict[str, Any], float]]) -> Score:
    def over(metric: str) -> float | None:
        values = [measured[metric] for measured, _ in rows]
        return None if None in values else fmean(values)

    # Equal clips have an infinite PSNR; 99 dB is as good and has a mean.
    decibels = [min(measured["psnr"], MOST_DECIBELS) for measured, _ in rows]
    frames = [measured["worst"]["psnr"]["value"] for measured, _ in rows]
    return Score(
        psnr=fmean(decibels),
        worst_psnr=min(decibels),
        worst_frame_psnr=min(MOST_DECIBELS, *frames),
        ssim=over("ssim"),
        lpips=over("lpips"),
        vmaf=over("vmaf"),
        cvvdp=over("cvvdp"),
        flicker=fmean(measured["flicker"] for measured, _ in rows),
        seconds=fmean(seconds for _, seconds in rows),
    )


def validated_policy(
    pipe: Any,
    policy: CachePolicy,
    candidates: Mapping[int, Mapping[str, Plan]],
    call: dict[str, Any],
    samples: Sequence[tuple[str, int]],
    elsewhere: Mapping[int, Mapping[str, Plan]] | None = None,
    *,
    progress: bool = True,
) -> CachePolicy:
    """Keep the best candidate of each budget, and note what all of them gave.

    From the errors of plans and what they gave follows the PSNR that the policy predicts.

    Args:
        pipe, call, samples, progress: as `scores` takes them.
        policy: what was measured.
        candidates: budget -> name -> plan. Plain runs with as many sampling steps stand beside
            them, and are not kept.
        elsewhere: the same for budgets that are not run: each takes the plan that has the name of
            the best one at the next budgets that are, on both sides.
    """
    budgets = list(candidates)
    tried = {f"{b}: {name}": plan for b in budgets for name, plan in candidates[b].items()}
    found, plain_seconds = scores(
        pipe, call, samples, tried, fewer_steps=budgets, progress=progress
    )
    rows, kept = [], dict(policy.plans)
    psnr: dict[int, dict[str, float]] = {}
    for budget in budgets:
        scored = {name: found[f"{budget}: {name}"] for name in candidates[budget]}
        psnr[budget] = {name: score.psnr for name, score in scored.items()}
        best = max(scored, key=lambda name: scored[name].psnr)
        kept[str(budget)] = _kept(policy, budget, candidates[budget][best], best)
        for name, score in {**scored, "fewer sampling steps": found[f"{budget} steps"]}.items():
            row = Validation(
                budget=budget,
                candidate=name,
                kept=name == best,
                psnr=score.psnr,
                worst_psnr=score.worst_psnr,
                worst_frame_psnr=score.worst_frame_psnr,
                ssim=score.ssim,
                lpips=score.lpips,
                vmaf=score.vmaf,
                cvvdp=score.cvvdp,
                flicker=score.flicker,
                speedup=plain_seconds / score.seconds,
            )
            rows.append(row)
    for budget, plans in (elsewhere or {}).items():
        if (nearby := _best_nearby(budget, plans, psnr)) is not None:
            kept[str(budget)] = _kept(policy, budget, plans[nearby], nearby)
    fidelity = fit_fidelity(
        (sum(plan.errors), found[f"{budget}: {name}"].psnr)
        for budget in budgets
        for name, plan in candidates[budget].items()
        if plan.errors
    )
    update = {"plans": kept, "validation": tuple(rows), "fidelity": fidelity}
    return policy.model_copy(update=update)


def _best_nearby(
    budget: int, plans: Mapping[str, Plan], psnr: Mapping[int, Mapping[str, float]]
) -> str | None:
    """Return the name of the plan that was best at the next budgets on both sides; None of none."""
    nearby = {
        *sorted(run for run in psnr if run <= budget)[-1:],
        *sorted(run for run in psnr if run >= budget)[:1],
    }
    names = [name for name in plans if nearby and all(name in psnr[run] for run in nearby)]
    return max(names, key=lambda name: sum(psnr[run][name] for run in nearby), default=None)


def _kept(policy: CachePolicy, budget: int, best: Plan, name: str) -> StoredPlan:
    """Return the plan of a budget whose best candidate has this name."""
    own = policy.plans[str(budget)]  # the search's
    if (best.steps, best.orders, best.scales) == (own.steps, own.orders, own.scales):
        return own.model_copy(update={"chosen_as": name})
    try:
        check_errors(str(budget), best, {edge.action: edge.error for edge in policy.search_edges()})
    except ValueError:  # of lines whose own scales were not measured
        best = replace(best, errors=())
    return StoredPlan.of(best, chosen_as=name)
