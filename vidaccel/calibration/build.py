"""From a pipeline and prompts to a policy: measure every segment, search every budget, validate."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vidaccel.calibration.assemble import assemble_policy
from vidaccel.calibration.candidates import (
    candidates,
    most_validation_forwards,
    priced,
    validated_budgets,
)
from vidaccel.calibration.improve import improved
from vidaccel.calibration.measure import announce, measure, measured_before
from vidaccel.calibration.ray_runner import NO_RAY, ray_runner
from vidaccel.calibration.replay import steps_made
from vidaccel.calibration.runners import LocalRunner, Runner, Worker
from vidaccel.calibration.task import Task, model_identity
from vidaccel.calibration.validate import validated_policy
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.errors import BuildError, PlanError
from vidaccel.lemica import search
from vidaccel.lemica.graph import Aggregation, aggregator, search_edges
from vidaccel.plans.policy import CachePolicy


def build_policy(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    seeds: Sequence[int] = (0,),
    max_skip: int = 8,
    method: str = "exact",
    objective: str = "leximax",
    metric: str = "l1",
    aggregation: Aggregation = "mean",
    faithful: bool = False,
    call_kwargs: dict[str, Any] | None = None,
    workdir: str | Path | None = None,
    validate: bool = True,
    improve: int = 0,
    workers: int = 0,
    ray_address: str | None = None,
    load: Callable[[], Any] | None = None,
    progress: bool = True,
) -> CachePolicy:
    """Measure what reusing each segment costs and find the best plan for every budget.

    The method of LeMiCa (arXiv 2511.00090): errors of single segments, averaged over prompts and
    seeds, and the lexicographically smallest path for each number of computed steps. Beyond the
    paper, the residual of a reused step may be forecast along the line through the last two
    computed ones, as far along it as measured best; the search picks steps and forecasts together.

    Args:
        pipe: a pipeline that `accelerate` takes. It is left without acceleration.
        prompts: what the clips show; 5 to 20 short, diverse ones are plenty. With `validate`, the
            last fifth, at least one, is kept for that.
        num_inference_steps: what a call is asked for. T is what it makes of that: MiniMax-H3 makes
            one step less.
        seeds: seeds of the noise; every prompt is run with every seed.
        max_skip: longest segment, in steps.
        method: "exact" runs every held segment, about 140 generations per sample of 50 steps;
            "gain" estimates them within about 7; "lazy" estimates them and then runs those that
            the best plans of the validated budgets use, until the plans stay.
        objective: what the best path is, see `lemica.search.solve`.
        metric: what an error is: "l1" of the final latents, "decoded" (L1 of the frames) or
            "lpips"; the last two decode every run.
        aggregation: what makes one error of the samples': "mean", "max", "quantile" or "cvar".
        faithful: only hold residuals, as the paper does.
        call_kwargs: further arguments of the pipeline's call, such as the size.
        workdir: folder that keeps what is measured, so that a killed build goes on; None for none.
        validate: run plans of three quarters down to a fifth of the steps end to end, beside
            other candidates and plain runs with as many sampling steps; keep the best of each.
        improve: so many runs for each of these budgets, on the prompts that are not kept back,
            improve the best candidate by small changes before it is validated; a run computes no
            more steps than the budget. 100 to 250 are plenty for 50 steps.
        workers: measure on so many Ray workers, each with a pipeline of its own; 0 for here.
        ray_address: address of a Ray cluster; None for this machine.
        load: gives a worker its pipeline; None sends it a copy of `pipe`.
        progress: print the estimated cost first, and show a bar in units of generations.

    Returns:
        The policy.

    Raises:
        PlanError: an argument is out of range.
        BuildError: the work folder belongs to another build or cannot be written; Ray is missing,
            cannot be reached, or lost all workers.
        MetricUnavailable: the metric needs something that is not here.
        UnsupportedPipelineError: as `accelerate`.
    """
    check_build(
        prompts,
        num_inference_steps=num_inference_steps,
        seeds=seeds,
        max_skip=max_skip,
        method=method,
        objective=objective,
        metric=metric,
        aggregation=aggregation,
        validate=validate,
        improve=improve,
        workers=workers,
    )
    held_out = max(1, len(prompts) // 5) if validate else 0
    call = {**(call_kwargs or {}), "num_inference_steps": num_inference_steps}
    steps = steps_made(pipe, {**call, "prompt": prompts[0]})
    task = Task(
        tuple(prompts[: len(prompts) - held_out]),
        tuple(seeds),
        steps,
        max_skip,
        method,
        call,
        model_identity(pipe),
        lines=not faithful,
        metric=metric,
    )
    budgets = validated_budgets(steps)
    with TemporaryDirectory() as temporary:
        folder = WorkFolder(Path(temporary if workdir is None else workdir), task)
        if progress:
            if held_out:
                print(_split(len(prompts), held_out, len(seeds)), file=sys.stderr)
            of_each = most_validation_forwards(steps, lines=task.lines, improved=improve > 0)
            announce(
                pipe,
                task,
                measured=measured_before(task, folder),
                improving=improve * sum(budgets),
                validating=held_out * of_each,
            )
        with _runner(pipe, task, workers, ray_address, load) as runner:
            graph, info = measure(
                runner, task, folder, budgets=budgets, objective=objective, progress=progress
            )
            edges = search_edges(graph, aggregation, faithful=faithful)
            policy = assemble_policy(pipe, task, graph, edges, info, objective, aggregation)
            if not validate:
                return policy
            plans_of = {
                budget: candidates(
                    edges,
                    budget,
                    steps,
                    policy.scheduler.sigmas,
                    guided=policy.guidance.guided,
                )
                for budget in policy.budgets()
            }
            tried = {budget: plans_of.pop(budget) for budget in budgets if budget in plans_of}
            if improve:
                starts = {budget: list(plans.values()) for budget, plans in tried.items()}
                forced = () if info.switch is None else (info.switch,)
                found = improved(
                    runner, task, folder, starts, improve, forced=forced, progress=progress
                )
                for budget, plan in found.items():
                    if plan not in starts[budget]:
                        tried[budget]["improved"] = priced(plan, edges)
    samples = [(prompt, seeds[0]) for prompt in prompts[len(prompts) - held_out :]]
    return validated_policy(pipe, policy, tried, call, samples, plans_of, progress=progress)


def _split(prompts: int, held_out: int, seeds: int) -> str:
    """Say which prompts are for what."""

    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'s' * (number != 1)}"

    used = prompts - held_out
    return (
        f"{count(prompts, 'prompt')}: {used} x {count(seeds, 'seed')} = "
        f"{count(used * seeds, 'sample')} to measure, {count(held_out, 'prompt')} kept for "
        "validation"
    )


def check_build(
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    seeds: Sequence[int] = (0,),
    max_skip: int = 8,
    method: str = "exact",
    objective: str = "leximax",
    metric: str = "l1",
    aggregation: Aggregation = "mean",
    validate: bool = True,
    improve: int = 0,
    workers: int = 0,
) -> None:
    """Refuse wrong arguments of `build_policy`, which it takes as they are, without a pipeline.

    Raises:
        PlanError: an argument is out of range.
        BuildError: workers need Ray, which is not here.
        MetricUnavailable: the metric needs something that is not here.
    """
    if validate and len(prompts) < 2:
        raise PlanError(
            "prompts: validation needs at least 2, of which one is kept for it; pass more, or "
            "validate=False"
        )
    if workers > 0 and find_spec("ray") is None:
        raise BuildError(NO_RAY)
    Task(tuple(prompts), tuple(seeds), num_inference_steps, max_skip, method, {}, {}, metric=metric)
    search.solve([[0, 0, 0]] * 3, objective=objective)
    aggregator(aggregation)
    if improve < 0:
        raise PlanError(f"improve: found {improve}, expected 0 or more")
    if improve and not validate:
        raise PlanError(f"improve: found {improve}; improved plans need validate=True")
    if workers < 0:
        raise PlanError(f"workers: found {workers}, expected 0 or more")


@contextmanager
def _runner(
    pipe: Any, task: Task, workers: int, address: str | None, load: Callable[[], Any] | None
) -> Iterator[Runner]:
    """Ray workers, where any are asked for; otherwise the pipeline that is here."""
    if workers > 0 or address is not None:
        with ray_runner(pipe, task, max(1, workers), address=address, load=load) as runner:
            yield runner
    else:
        with closing(Worker(pipe, task)) as worker:
            yield LocalRunner(worker)
