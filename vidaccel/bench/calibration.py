"""Benchmarks of building policies: the search's time, and cheap errors held against exact ones."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import gain_errors, segments
from vidaccel.calibration.task import SegmentsFrom, Task, read_task
from vidaccel.calibration.validate import Score, scores
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.environment import environment
from vidaccel.errors import BuildError, PlanError
from vidaccel.lemica.graph import aggregate, segment_graph
from vidaccel.lemica.search import solve, solve_edges
from vidaccel.plans.edge import SCALES, Edge, Segment
from vidaccel.plans.plan import Plan

# What is searched: name, steps, longest segment, budgets (None: every one), and whether with lines.
SEARCHES: tuple[tuple[str, int, int, list[int] | None, bool], ...] = (
    ("every budget of 50 steps", 50, 8, None, False),
    ("every budget of 50 steps, with lines", 50, 8, None, True),
    ("one budget of 1000 steps", 1000, 50, [200], False),
)


@dataclass(frozen=True)
class SearchTimes:
    """The CPU time of one kind of search, on a new random graph in each round.

    Attributes:
        steps: T.
        max_skip: longest segment.
        budgets: how many there are a plan of.
        seconds: CPU seconds of all rounds; then their median and the slowest.
    """

    steps: int
    max_skip: int
    budgets: int
    seconds: list[float]
    median_seconds: float
    slowest_seconds: float


@dataclass(frozen=True)
class SearchResult:
    """The times of every search, by its name, and where they were measured."""

    searches: dict[str, SearchTimes]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)


@dataclass(frozen=True)
class PlanPair:
    """The plans of one budget from exact and from estimated errors, and what they gave.

    Attributes:
        exact_steps, gain_steps: computed steps.
        exact_psnr, gain_psnr: mean over the held-out prompts, dB.
        lost_db: how much the estimated errors lose.
    """

    exact_steps: list[int]
    gain_steps: list[int]
    exact_psnr: float
    gain_psnr: float
    lost_db: float


@dataclass(frozen=True)
class CalibrationResult:
    """Estimated errors against exact ones.

    Attributes:
        settings: arguments of the pipeline's call, "max_skip" and "held_out".
        samples: prompts whose exact errors are complete.
        generations_per_sample: what both ways cost: "exact" and "gain".
        rank_correlation: Spearman's, of the "mean" errors and of those of each of the "samples".
        plans: budget -> the plans of both.
        environment: where it was measured.
    """

    settings: dict[str, Any]
    samples: list[str]
    generations_per_sample: dict[str, float]
    rank_correlation: dict[str, Any]
    plans: dict[str, PlanPair]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)


def surface(steps: int, max_skip: int, seed: int) -> NDArray[np.float64]:
    """Make random errors shaped like measured ones: falling over the run, growing with length.

    Returns:
        [steps, steps] errors as `solve` takes them, no two alike.
    """
    rng = np.random.default_rng(seed)
    errors = np.full((steps, steps), np.inf)
    for start in range(steps - 1):
        errors[start, start + 1] = 0.0
        early = np.exp(-4.0 * start / steps) + 0.02
        for end in range(start + 2, min(start + max_skip, steps - 1) + 1):
            errors[start, end] = early * (end - start - 1) ** 1.5 * rng.uniform(0.8, 1.25)
    return errors


def multigraph(errors: NDArray[np.float64], max_skip: int, seed: int) -> list[Edge]:
    """Return the segments of `errors` and, after every previous step, a line of random error."""
    rng = np.random.default_rng(seed)
    edges = []
    for start, end in zip(*np.nonzero(np.isfinite(errors)), strict=True):
        error = float(errors[start, end])
        edges.append(Edge(int(start), int(end), error))
        if error > 0.0:
            for previous in range(max(0, start - max_skip), start):
                of_line = error * float(rng.uniform(0.3, 1.5))
                scale = float(rng.choice(SCALES))
                edges.append(Edge(int(start), int(end), of_line, 1, scale, previous))
    return edges


def search_times(rounds: int = 9) -> SearchResult:
    """Time the search on random graphs, a new one in each round."""
    found = {}
    for name, steps, max_skip, budgets, lines in SEARCHES:
        seconds = []
        for seed in range(rounds):
            errors = surface(steps, max_skip, seed)
            edges = multigraph(errors, max_skip, seed) if lines else []
            # It runs on one core and waits for nothing: other work on the machine does not count.
            started = time.process_time()
            plans = solve_edges(edges, steps) if lines else solve(errors, budgets)
            seconds.append(time.process_time() - started)
            if not plans:
                raise PlanError(f"{name}: found no plan")
        found[name] = SearchTimes(
            steps, max_skip, len(plans), seconds, statistics.median(seconds), max(seconds)
        )
    return SearchResult(found, environment())


def search_table(result: SearchResult) -> str:
    """Return the times of searches as a table for people."""
    lines = ["search                                    median  slowest"]
    lines += [
        f"{name:40}  {times.median_seconds * 1e3:5.0f} ms  {times.slowest_seconds * 1e3:5.0f} ms"
        for name, times in result.searches.items()
    ]
    return "\n".join(lines)


def calibration(
    pipe: Any,
    folder: Path,
    held_out: Sequence[str],
    budgets: Sequence[int],
    *,
    progress: bool = True,
) -> CalibrationResult:
    """Estimated errors against the exact ones of a build's work folder, and the plans of both.

    Args:
        pipe: the pipeline of the build; it is left without acceleration.
        folder: the work folder of `build_policy(method="exact", workdir=...)`; samples that are not
            complete are left out.
        held_out: prompts that the build did not use, for the plans.
        budgets: numbers of computed steps of the plans.
        progress: show a bar for the plans.

    Raises:
        BuildError: no such folder, or no complete sample in it.
        PlanError: a budget without a plan.
    """
    task = read_task(folder)
    exact, steps = _exact(WorkFolder(folder, task), task), task.num_inference_steps
    if not exact:
        raise BuildError(f"{folder} holds no complete sample of exact errors")
    gain, forwards = {}, []
    for sample in exact:
        prompt, seed = task.samples()[sample]
        with Replayer(pipe, {**task.call, "prompt": prompt}, seed) as replayer:
            gain[sample] = gain_errors(replayer, task.max_skip).holds
            forwards.append(replayer.forwards)
    edges = sorted(exact[next(iter(exact))])
    errors = {
        name: np.array([[found[sample][edge] for edge in edges] for sample in exact])
        for name, found in (("exact", exact), ("gain", gain))
    }
    plans = {name: _plans(edges, rows, steps, budgets) for name, rows in errors.items()}
    runs = {f"{budget} {name}": plans[name][budget] for name in plans for budget in budgets}
    samples = [(prompt, 0) for prompt in held_out]
    found, _ = scores(pipe, task.call, samples, runs, progress=progress)
    full = steps + sum(steps - end for _, end in segments(steps, task.max_skip))
    return CalibrationResult(
        settings={**task.call, "max_skip": task.max_skip, "held_out": list(held_out)},
        samples=[task.samples()[sample][0] for sample in exact],
        generations_per_sample={
            "exact": full / steps,
            "gain": statistics.fmean(forwards) / steps,
        },
        rank_correlation={
            "mean": _correlation(errors["exact"].mean(axis=0), errors["gain"].mean(axis=0)),
            "samples": [_correlation(*rows) for rows in zip(*errors.values(), strict=True)],
        },
        plans={str(budget): _pair(budget, plans, found) for budget in budgets},
        environment=environment(),
    )


def _plans(
    edges: Sequence[Segment], errors: NDArray[np.float64], steps: int, budgets: Sequence[int]
) -> dict[int, Plan]:
    """Return the plan of each budget, from the errors [samples, edges]."""
    graph = segment_graph(dict(zip(edges, errors.T.tolist(), strict=True)), steps)
    plans = solve(aggregate(graph), budgets)
    for budget in budgets:
        if budget not in plans:
            raise PlanError(f"no plan of {budget} computed steps exists in this graph")
    return plans


def _pair(
    budget: int, plans: Mapping[str, Mapping[int, Plan]], found: Mapping[str, Score]
) -> PlanPair:
    exact, gain = found[f"{budget} exact"].psnr, found[f"{budget} gain"].psnr
    return PlanPair(
        exact_steps=list(plans["exact"][budget].steps),
        gain_steps=list(plans["gain"][budget].steps),
        exact_psnr=exact,
        gain_psnr=gain,
        lost_db=exact - gain,
    )


def calibration_table(result: CalibrationResult) -> str:
    """Return a result as a table for people."""
    cost, ranks = result.generations_per_sample, result.rank_correlation
    lines = [
        f"{len(result.samples)} samples: exact {cost['exact']:.0f}, gain {cost['gain']:.1f} "
        "generations each",
        f"rank correlation of the errors {ranks['mean']:.4f}, of single samples "
        f"{min(ranks['samples']):.4f} to {max(ranks['samples']):.4f}",
        "",
        "computed     exact      gain      lost",
    ]
    lines += [
        f"{budget:>8}  {pair.exact_psnr:5.2f} dB  {pair.gain_psnr:5.2f} dB  {pair.lost_db:+5.2f} dB"
        for budget, pair in result.plans.items()
    ]
    return "\n".join(lines)


def _exact(folder: WorkFolder, task: Task) -> dict[int, dict[Segment, float]]:
    """Return the exact errors of held segments, of every complete sample."""
    items = [item for item in task.items() if isinstance(item, SegmentsFrom)]
    found = {}
    for sample in range(len(task.samples())):
        parts = [part for item in items if (part := folder.load(sample, item)) is not None]
        if parts and len(parts) == len(items):
            found[sample] = {k: v for part in parts for k, v in part.holds.items()}
    return found


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(spearmanr(first, second).statistic)
