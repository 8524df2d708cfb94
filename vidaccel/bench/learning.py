"""Bench of learning: what it costs on top of a plain run, and how good the learned plans are.

Each prompt teaches, and the plans that follow are tried on the next one: learned, beside the
generic schedule, the policy that comes with vidaccel, and plans from the estimated errors of
`build-policy --method gain` on the same sample. The PSNR that a learned policy predicts is held
against the real one.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.calibration.fidelity import fit_fidelity
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import gain_errors
from vidaccel.clips import metrics
from vidaccel.clips.generate import generate
from vidaccel.environment import environment
from vidaccel.errors import BenchError, MetricUnavailable
from vidaccel.lemica.graph import search_edges, segment_graph
from vidaccel.lemica.search import solve_edges
from vidaccel.plans import user_folder
from vidaccel.plans.generic import generic_plan
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import load_shipped
from vidaccel.resolve import Resolver

METHODS = ("learned", "generic", "stored", "gain")


@dataclass(frozen=True)
class Lesson:
    """The plans that one prompt has taught, tried on another.

    Attributes:
        prompt: the prompt.
        tried_on: the prompt of the other clips.
        share: time that learning took, over that of the rest of the run.
        psnr: method -> budget -> PSNR to the plain clip in dB; infinite for equal clips.
        predicted: budget -> PSNR that the learned policy predicts.
        errors: budget -> sum of the errors of the learned plan, over the size of the latents.
    """

    prompt: str
    tried_on: str
    share: float
    psnr: dict[str, dict[int, float]]
    predicted: dict[int, float | None]
    errors: dict[int, float]


@dataclass(frozen=True)
class LearningResult:
    """The lessons of every prompt.

    Attributes:
        settings: arguments of the pipeline's call, and the budgets.
        lessons: one for each prompt.
        curve: the points (relative error, PSNR) that are fitted to all lessons.
        environment: where it was measured.
    """

    settings: dict[str, Any]
    lessons: list[Lesson]
    curve: tuple[tuple[float, float], ...]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)


def learning(
    pipe: Any,
    call: dict[str, Any],
    prompts: Sequence[str],
    *,
    budgets: Sequence[int] = (25, 17, 12, 10),
    gain: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> LearningResult:
    """Learn from each prompt in turn, and try what was learned on the next one.

    Args:
        pipe: the pipeline; left without acceleration.
        call: arguments of its call.
        prompts: at least two.
        budgets: computed steps of the plans that are tried.
        gain: so many of the prompts also give plans from estimated errors.
        seed: seed of the noise that is learned from; what is tried has the next one.
        progress: show a bar.

    Raises:
        BenchError: fewer than two prompts, or nothing could be learned.
    """
    if len(prompts) < 2:
        raise BenchError(f"prompts: found {len(prompts)}, expected at least 2")
    lessons = []
    plain: dict[str, Any] = {}
    for number, prompt in enumerate(tqdm(prompts, desc="lessons", disable=not progress)):
        with _own_folder():
            policy, share = _learn(pipe, {**call, "prompt": prompt}, seed)
        other = prompts[(number + 1) % len(prompts)]
        trial = {**call, "prompt": other}
        if other not in plain:
            plain[other] = generate(pipe, trial, seed=seed + 1, progress=False).frames
        taught = {**call, "prompt": prompt}
        plans = _plans(pipe, policy, budgets, taught if number < gain else None, seed)
        psnr: dict[str, dict[int, float]] = {}
        for (method, budget), plan in plans.items():
            accelerate(pipe, policy=plan, cache=None, attention=None)
            frames = generate(pipe, trial, seed=seed + 1, progress=False).frames
            restore(pipe)
            found = metrics.psnr(plain[other], frames)
            psnr.setdefault(method, {})[budget] = found
        errors = {b: sum(policy.plan(budget=b).errors) / _level(policy) for b in budgets}
        predicted = {b: policy.predicted_psnr(b) for b in budgets}
        lessons.append(Lesson(prompt, other, share, psnr, predicted, errors))
    pairs = [
        (one.errors[budget], psnr)
        for one in lessons
        for budget, psnr in one.psnr["learned"].items()
    ]
    settings = {**call, "budgets": list(budgets), "seed": seed}
    return LearningResult(settings, lessons, fit_fidelity(pairs), environment())


def _level(policy: CachePolicy) -> float:
    """The size of the latents that the errors of a learned policy are over."""
    assert policy.level is not None  # it was learned
    return policy.level


def _learn(pipe: Any, call: dict[str, Any], seed: int) -> tuple[CachePolicy, float]:
    """Run once whole; return what was learned, and the share of the time that this took."""
    accelerate(pipe, policy=Resolver("learn", anew=True), cache=None, attention=None)
    try:
        run = generate(pipe, call, seed=seed, progress=False)
        (observer,) = {engine.observer for engine in list(engines_of(pipe).values())[:1]}
        files = user_folder.files()
        if not files:
            raise BenchError("; ".join(observer.notes) or "nothing was learned")
        seconds: float = observer.seconds  # type: ignore[attr-defined]
    finally:
        restore(pipe)
    taken = (run.denoising_seconds or run.seconds) - seconds
    return CachePolicy.load(files[0]), seconds / taken


def _plans(
    pipe: Any,
    policy: CachePolicy,
    budgets: Sequence[int],
    gain_call: dict[str, Any] | None,
    seed: int,
) -> dict[tuple[str, int], Plan]:
    """Return the plans to try, by method and budget."""
    total, sigmas = policy.num_inference_steps, policy.scheduler.sigmas
    found = {}
    for budget in budgets:
        found["learned", budget] = policy.plan(budget=budget)
        found["generic", budget] = generic_plan(
            budget, total, sigmas, guided=policy.guidance.guided
        )
    same = [
        known
        for _, known in load_shipped()
        if known.provenance == "measured"
        and known.model.config_hash == policy.model.config_hash
        and known.scheduler.sigmas == sigmas
    ]
    for budget in budgets if same else ():
        found["stored", budget] = same[0].plan(budget=budget)
    if gain_call is not None:
        with Replayer(pipe, gain_call, seed) as replayer:
            errors = gain_errors(replayer, policy.max_skip or 8, lines=True)
        holds = {segment: [error] for segment, error in errors.holds.items()}
        lines = {line: [row] for line, row in errors.lines.items()}
        edges = search_edges(segment_graph(holds, total, lines))
        for budget, plan in solve_edges(edges, total, budgets).items():
            found["gain", budget] = plan
    return found


@contextmanager
def _own_folder() -> Iterator[None]:
    """Keep what is learned out of the user's folder."""
    before = os.environ.get("VIDACCEL_HOME")
    with TemporaryDirectory() as folder:
        os.environ["VIDACCEL_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["VIDACCEL_HOME"]
            else:
                os.environ["VIDACCEL_HOME"] = before


def learning_table(result: LearningResult) -> str:
    """Return the result for people: mean and worst PSNR by method and budget, and the cost."""
    lines = ["computed  " + "  ".join(f"{method:>14}" for method in METHODS)]
    for budget in result.settings["budgets"]:
        cells = []
        for method in METHODS:
            found = [one.psnr[method][budget] for one in result.lessons if method in one.psnr]
            cells.append(f"{statistics.fmean(found):5.1f} ({min(found):4.1f})" if found else "-")
        lines.append(f"{budget:>8}  " + "  ".join(f"{cell:>14}" for cell in cells))
    shares = [one.share for one in result.lessons]
    off = [
        abs(predicted - one.psnr["learned"][budget])
        for one in result.lessons
        for budget, predicted in one.predicted.items()
        if predicted is not None
    ]
    lines += [
        "",
        f"mean (worst) PSNR in dB, {len(result.lessons)} prompts",
        f"learning took {statistics.median(shares):.1%} of a plain run (median)",
    ]
    if off:
        lines.append(f"the predicted PSNR was off by {statistics.fmean(off):.1f} dB in the mean")
    return "\n".join(lines)


def draw_learning(result: LearningResult, path: Path) -> None:
    """Draw predicted against real PSNR, a point for each prompt and budget.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetricUnavailable("figures need matplotlib: pip install 'vidaccel[plot]'") from error
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = []
    for budget in result.settings["budgets"]:
        pairs = [
            (predicted, one.psnr["learned"][budget])
            for one in result.lessons
            if (predicted := one.predicted[budget]) is not None
        ]
        axes.plot(*zip(*pairs, strict=True), "o", label=f"{budget} steps computed")
        ends += [value for pair in pairs for value in pair]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.7", zorder=0)
    axes.set_xlabel("predicted PSNR (dB)")
    axes.set_ylabel("PSNR of another prompt (dB)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
