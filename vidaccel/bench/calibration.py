"""Benchmarks of building policies: the search's time, and cheap errors held against exact ones."""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from vidaccel.calibration import validate as validation
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import gain_errors, segments
from vidaccel.calibration.task import Task, WorkFolder
from vidaccel.environment import environment
from vidaccel.errors import BuildError, PlanError
from vidaccel.lemica.dag import SCALES, Move
from vidaccel.lemica.graph import aggregate, segment_graph
from vidaccel.lemica.search import solve, solve_moves


def surface(steps: int, max_skip: int, seed: int) -> NDArray[np.float64]:
    """Random errors with the shape of measured ones: falling over the run, growing with length.

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


def multigraph(errors: NDArray[np.float64], max_skip: int, seed: int) -> list[Move]:
    """The segments of `errors` and, after every possible previous step, a line of random error."""
    rng = np.random.default_rng(seed)
    moves = []
    for start, end in zip(*np.nonzero(np.isfinite(errors)), strict=True):
        error = float(errors[start, end])
        moves.append(Move(int(start), int(end), error))
        if error > 0.0:
            for previous in range(max(0, start - max_skip), start):
                factor = float(rng.uniform(0.3, 1.5))
                moves.append(
                    Move(
                        int(start), int(end), error * factor, 1, float(rng.choice(SCALES)), previous
                    )
                )
    return moves


def search_times(rounds: int = 9) -> dict[str, Any]:
    """How long the search takes on random graphs, a new one in each round.

    Returns:
        "searches": what -> steps, longest segment, number of budgets, and the CPU seconds of all
        rounds, their median and the slowest; "environment".
    """
    found = {}
    for name, steps, skip, budgets, lines in (
        ("every budget of 50 steps", 50, 8, None, False),
        ("every budget of 50 steps, with lines", 50, 8, None, True),
        ("one budget of 1000 steps", 1000, 50, [200], False),
    ):
        seconds = []
        for seed in range(rounds):
            errors = surface(steps, skip, seed)
            moves = multigraph(errors, skip, seed) if lines else []
            # It runs on one core and waits for nothing: other work on the machine does not count.
            started = time.process_time()
            plans = solve_moves(moves, steps) if lines else solve(errors, budgets)
            seconds.append(time.process_time() - started)
            if not plans:
                raise PlanError(f"{name}: found no plan")
        found[name] = {
            "steps": steps,
            "max_skip": skip,
            "budgets": len(plans),
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "slowest_seconds": max(seconds),
        }
    return {"searches": found, "environment": environment()}


def search_table(result: dict[str, Any]) -> str:
    """The result of `search_times` for people."""
    lines = ["search                                    median  slowest"]
    lines += [
        f"{name:40}  {row['median_seconds'] * 1e3:5.0f} ms  {row['slowest_seconds'] * 1e3:5.0f} ms"
        for name, row in result["searches"].items()
    ]
    return "\n".join(lines)


def calibration(
    pipe: Any,
    folder: Path,
    held_out: Sequence[str],
    budgets: Sequence[int],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Estimated errors against the exact ones of a build's work folder, and the plans of both.

    Args:
        pipe: the pipeline of the build; it is left without acceleration.
        folder: of `build_policy(method="exact", workdir=...)`; samples that are not complete are
            left out.
        held_out: prompts that the build did not use, for the plans.
        budgets: of the plans.
        progress: show a bar for the plans.

    Returns:
        "settings", "samples", "generations_per_sample" of both, "rank_correlation" (Spearman's, of
        the mean errors, and of each sample's), "plans" (budget -> steps, and PSNR of both on the
        held-out prompts, and how much the estimated errors lose) and "environment".

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
    table = {
        name: np.array([[errors[sample][edge] for edge in edges] for sample in exact])
        for name, errors in (("exact", exact), ("gain", gain))
    }
    solved = {
        name: solve(
            aggregate(segment_graph(dict(zip(edges, rows.T.tolist(), strict=True)), steps)), budgets
        )
        for name, rows in table.items()
    }
    for budget, plans in itertools.product(budgets, solved.values()):
        if budget not in plans:
            raise PlanError(f"no plan of {budget} computed steps exists in this graph")
    runs = {f"{b} {name}": plans[b] for name, plans in solved.items() for b in budgets}
    samples = [(prompt, 0) for prompt in held_out]
    scores, _ = validation.scores(pipe, task.call, samples, runs, progress=progress)
    full = steps + sum(steps - end for _, end in segments(steps, task.max_skip))
    return {
        "settings": {**task.call, "max_skip": task.max_skip, "held_out": list(held_out)},
        "samples": [task.samples()[sample][0] for sample in exact],
        "generations_per_sample": {
            "exact": full / steps,
            "gain": statistics.fmean(forwards) / steps,
        },
        "rank_correlation": {
            "mean": _correlation(table["exact"].mean(axis=0), table["gain"].mean(axis=0)),
            "samples": [_correlation(*rows) for rows in zip(*table.values(), strict=True)],
        },
        "plans": {
            str(budget): {
                **{f"{name}_steps": list(plans[budget].steps) for name, plans in solved.items()},
                **{f"{name}_psnr": scores[f"{budget} {name}"].psnr for name in solved},
                "lost_db": scores[f"{budget} exact"].psnr - scores[f"{budget} gain"].psnr,
            }
            for budget in budgets
        },
        "environment": environment(),
    }


def calibration_table(result: dict[str, Any]) -> str:
    """The result of `calibration` for people."""
    cost, ranks = result["generations_per_sample"], result["rank_correlation"]
    lines = [
        f"{len(result['samples'])} samples: exact {cost['exact']:.0f}, gain {cost['gain']:.1f} "
        "generations each",
        f"rank correlation of the errors {ranks['mean']:.4f}, of single samples "
        f"{min(ranks['samples']):.4f} to {max(ranks['samples']):.4f}",
        "",
        "computed     exact      gain      lost",
    ]
    lines += [
        f"{budget:>8}  {row['exact_psnr']:5.2f} dB  {row['gain_psnr']:5.2f} dB  "
        f"{row['lost_db']:+5.2f} dB"
        for budget, row in result["plans"].items()
    ]
    return "\n".join(lines)


def read_task(folder: Path) -> Task:
    """The task of a work folder; raises BuildError when there is none."""
    try:
        found = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        return Task(**{**found, "prompts": tuple(found["prompts"]), "seeds": tuple(found["seeds"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BuildError(f"{folder} is no work folder of a build: {error}") from error


def _exact(folder: WorkFolder, task: Task) -> dict[int, dict[tuple[int, int], float]]:
    """The exact errors of held segments, of every complete sample."""
    found = {}
    for sample in range(len(task.samples())):
        parts = [folder.load(sample, unit) for unit in task.units() if unit is not None]
        if parts and all(part is not None for part in parts):
            found[sample] = {k: v for part in parts if part for k, v in part.holds.items()}
    return found


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(spearmanr(first, second).statistic)
