"""Plans checked end to end: the errors of single segments say little about several of them at once.

Every candidate runs on prompts that were not used for the errors and is compared with the plain
run of the same prompt and noise; for each budget the best one is kept. Evenly spaced plans are
among the candidates, so what is kept is never worse than they are on these prompts.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import accelerate, restore
from vidaccel.clips.generate import generate
from vidaccel.clips.metrics import load_lpips, summary
from vidaccel.errors import MetricUnavailable
from vidaccel.lemica import search
from vidaccel.lemica.dag import Move
from vidaccel.plans.plan import Plan

OBJECTIVES = ("leximax", "power(2)")

# Gaps of the plans that compute a head of steps and then every so many.
GAPS = (2, 3, 4, 5)

# Longest segments that are tried beside the measured ones, as shares of those.
REACHES = (0.75, 0.5)


@dataclass(frozen=True)
class Score:
    """Means over the prompts, against the plain run.

    Attributes:
        psnr: dB.
        worst_psnr: of the worst prompt, dB.
        ssim, lpips: None where they are not available.
        seconds: of one generation.
    """

    psnr: float
    worst_psnr: float
    ssim: float | None
    lpips: float | None
    seconds: float


def candidates(found: Sequence[Move], budget: int, steps: int) -> dict[str, Plan]:
    """The plans of one budget that are worth a run, by a name that says what they are.

    Args:
        found: as `lemica.search.solve_moves` takes them.
        budget: number of computed steps.
        steps: T.

    Returns:
        The evenly spaced plan and the best path of the paper's objective, each held, half way and
        all the way along the line everywhere, the best path of every objective over all that was
        measured, those of shorter segments only, those of one step fewer or more with a step added
        or taken away, and first steps followed by every 2nd to 5th one, the last three with a line
        in between. Equal plans appear once, by their first name.
    """
    held = [move for move in found if move.order == 0]
    only_held = len(held) == len(found)
    wanted = [("leximax", "leximax", held)]
    wanted += [(name if only_held else f"{name}, lines", name, found) for name in OBJECTIVES]
    plans = {"evenly spaced": Plan.spread(budget, steps)}
    for name, objective, allowed in wanted:
        solved = search.solve_moves(allowed, steps, [budget], objective=objective)
        if budget in solved:
            plans.setdefault(name, solved[budget])
    near = dict(_near_the_path(held, budget, steps))
    if only_held:
        plans |= near
    else:
        for name in ("evenly spaced", "leximax"):
            if name in plans:
                plans[f"{name}, half line"] = plans[name].forecast(1, 0.5)
                plans[f"{name}, line"] = plans[name].forecast(1)
        plans |= {f"{name}, line": plan.forecast(1) for name, plan in near.items()}
        for gap in GAPS:
            if (plan := head_and_gap(budget, steps, gap)) is not None:
                plans[f"first steps, then every {gap}, line"] = plan.forecast(1)
    different: dict[Any, tuple[str, Plan]] = {}
    for name, plan in plans.items():
        different.setdefault((plan.steps, plan.orders, plan.scales), (name, plan))
    return dict(different.values())


def _near_the_path(held: Sequence[Move], budget: int, steps: int) -> Iterator[tuple[str, Plan]]:
    """Plans whose errors are a little worse than those of the best path, for other reasons."""
    errors = {(move.start, move.stop): move.error for move in held}
    longest = max(stop - start for start, stop in errors)
    for reach in (int(longest * share) for share in REACHES):
        short = [move for move in held if move.stop - move.start <= reach]
        for plan in search.solve_moves(short, steps, [budget]).values():
            yield f"leximax, segments up to {reach}", plan
    paths = search.solve_moves(held, steps, [budget - 1, budget + 1])

    def worst_first(computed: tuple[int, ...]) -> list[float]:
        segments = itertools.pairwise(computed)
        return sorted((errors.get(segment, math.inf) for segment in segments), reverse=True)

    for count, path in sorted(paths.items()):
        now = set(path.steps)
        if count < budget:
            name = f"leximax of {count}, one step added"
            changed = [now | {step} for step in range(steps) if step not in now]
        else:
            name = f"leximax of {count}, one step taken away"
            changed = [now - {step} for step in path.steps[1:-1]]
        best = min((tuple(sorted(found)) for found in changed), key=worst_first, default=())
        if best and math.isfinite(max(worst_first(best), default=0.0)):
            yield name, Plan(best, steps)


def head_and_gap(budget: int, steps: int, gap: int) -> Plan | None:
    """The plan that computes its first steps and then every `gap`-th; None when there is none."""
    for head in range(2, budget):
        computed = (*range(head), *range(head - 1 + gap, steps, gap))
        if len(computed) == budget:
            return Plan(computed, steps)
    return None


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
    try:
        model = load_lpips()
    except MetricUnavailable:
        model = None
    found: dict[str, list[tuple[dict[str, Any], float]]] = {}
    plain_seconds = []
    variants: dict[str, tuple[Plan | None, int]] = {
        name: (plan, int(call["num_inference_steps"])) for name, plan in plans.items()
    }
    variants |= {f"{steps} steps": (None, steps) for steps in fewer_steps}
    with tqdm(total=len(samples) * (1 + len(variants)), unit="run", disable=not progress) as bar:
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
                measured = summary(plain.frames, run.frames, model=model)
                found.setdefault(name, []).append((measured, run.seconds))
                bar.update()
    return {name: _mean(rows) for name, rows in found.items()}, fmean(plain_seconds)


def _mean(rows: Sequence[tuple[dict[str, Any], float]]) -> Score:
    def over(metric: str) -> float | None:
        values = [measured[metric] for measured, _ in rows]
        return None if None in values else fmean(values)

    # Equal clips have an infinite PSNR; 99 dB is as good and has a mean.
    decibels = [min(measured["psnr"], 99.0) for measured, _ in rows]
    return Score(
        psnr=fmean(decibels),
        worst_psnr=min(decibels),
        ssim=over("ssim"),
        lpips=over("lpips"),
        seconds=fmean(seconds for _, seconds in rows),
    )
