"""From a pipeline and prompts to a policy: measure every segment, search every budget, validate."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from networkx import DiGraph

from vidaccel.calibration import validate as validation
from vidaccel.calibration.runners import (
    LocalRunner,
    RunInfo,
    Runner,
    Worker,
    announce,
    improved,
    measure,
)
from vidaccel.calibration.task import Task, WorkFolder
from vidaccel.environment import environment
from vidaccel.errors import PlanError
from vidaccel.hosts.registry import config_of, find_transformers
from vidaccel.lemica import search
from vidaccel.lemica.dag import Move
from vidaccel.lemica.graph import Aggregation, aggregator, moves, stability
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import SCHEMA_MAJOR, SCHEMA_MINOR, CachePolicy
from vidaccel.plans.schema import (
    Edge,
    GuidanceInfo,
    ModelInfo,
    SchedulerInfo,
    StoredPlan,
    Validation,
)

# Resamples of the samples that a policy states the stability of its steps from.
STABILITY_ROUNDS = 50

Candidates = dict[int, dict[str, Plan]]  # by budget, then by name


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
    paper, a segment may be filled in along the line through the last two computed residuals, as
    far along it as measured best; the search picks the steps and the fillings together.

    Args:
        pipe: a pipeline that `accelerate` takes. It is left without acceleration.
        prompts: what the clips show; 5 to 20 short, diverse ones are plenty. With `validate`, the
            last fifth, at least one, is kept for that.
        num_inference_steps: T.
        seeds: of the noise; every prompt is run with every seed.
        max_skip: longest segment, in steps.
        method: "exact" runs every held segment, about 140 generations per sample of 50 steps;
            "gain" estimates them within about 7; "lazy" estimates them and then runs those that
            the best plans of the validated budgets use, until the plans stay.
        objective: of `lemica.search.solve`.
        metric: what an error is: "l1" of the final latents, "decoded" (L1 of the frames) or
            "lpips"; the last two decode every run.
        aggregation: of the samples' errors: "mean", "max", "quantile" or "cvar".
        faithful: only hold residuals, as the paper does.
        call_kwargs: further arguments of the pipeline's call, such as the size.
        workdir: folder of the shards, so that a killed build goes on; None for none.
        validate: run plans of three quarters down to a fifth of the steps end to end, beside
            other candidates and plain runs with as many sampling steps; keep the best of each.
        improve: so many runs for each of these budgets, on the prompts that are not kept back,
            improve the best candidate by small changes before it is validated; a run computes no
            more steps than the budget. 100 to 250 are plenty for 50 steps.
        workers: measure on so many Ray workers, each with a pipeline of its own; 0 for here.
        ray_address: of a Ray cluster; None for this machine.
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
    call = {**(call_kwargs or {}), "num_inference_steps": num_inference_steps}
    held_out = max(1, len(prompts) // 5) if validate else 0
    if validate and len(prompts) < 2:
        raise PlanError(
            "prompts: validation needs at least 2, of which one is kept for it; pass more, or "
            "validate=False"
        )
    task = Task(
        tuple(prompts[: len(prompts) - held_out]),
        tuple(seeds),
        num_inference_steps,
        max_skip,
        method,
        call,
        _model_identity(pipe),
        lines=not faithful,
        metric=metric,
    )
    # Wrong names are refused before any work.
    search.solve([[0, 0, 0]] * 3, objective=objective)
    aggregator(aggregation)
    if improve < 0 or (improve and not validate):
        raise PlanError(
            f"improve: found {improve}"
            + (", expected 0 or more" if improve < 0 else "; improved plans need validate=True")
        )
    if workers < 0:
        raise PlanError(f"workers: found {workers}, expected 0 or more")
    remote = workers > 0 or ray_address is not None
    with TemporaryDirectory() as temporary:
        folder = WorkFolder(Path(temporary if workdir is None else workdir), task)
        if progress:
            announce(pipe, task, improve * sum(validated_budgets(num_inference_steps)))

        def work(runner: Runner) -> tuple[CachePolicy, Candidates]:
            """The policy without validation, and what is to be validated."""
            graph, facts = measure(
                runner,
                task,
                folder,
                budgets=validated_budgets(num_inference_steps),
                objective=objective,
                progress=progress,
            )
            found = moves(graph, aggregation, faithful=faithful)
            policy = _policy(pipe, task, graph, found, facts, objective, aggregation)
            tried = _candidates(policy, found)
            if improve:
                best = improved(
                    runner,
                    task,
                    folder,
                    {budget: list(plans.values()) for budget, plans in tried.items()},
                    improve,
                    forced=() if facts.switch is None else (facts.switch,),
                    progress=progress,
                )
                for budget, plan in best.items():
                    if plan not in tried[budget].values():
                        tried[budget]["improved"] = plan
            return policy, tried

        if remote:
            from vidaccel.calibration.ray_runner import ray_runner

            with ray_runner(pipe, task, max(1, workers), address=ray_address, load=load) as runner:
                policy, tried = work(runner)
        else:
            session = Worker(pipe, task)
            try:
                policy, tried = work(LocalRunner(session))
            finally:
                session.close()
    if not validate:
        return policy
    samples = [(prompt, seeds[0]) for prompt in prompts[len(prompts) - held_out :]]
    return _validated(pipe, policy, tried, call, samples, progress)


def validated_budgets(steps: int) -> list[int]:
    """The budgets that are checked end to end: three quarters to a fifth of the steps."""
    shares = (Fraction(3, 4), Fraction(2, 3), *(Fraction(1, n) for n in (2, 3, 4, 5)))
    return sorted({int(steps * share) for share in shares} - {0}, reverse=True)


def _policy(
    pipe: Any,
    task: Task,
    graph: DiGraph,
    found: list[Move],
    facts: RunInfo,
    objective: str,
    aggregation: str,
) -> CachePolicy:
    steps = task.num_inference_steps
    edges = tuple(
        Edge(
            start=move.start,
            end=move.stop,
            order=move.order,
            scale=move.scale,
            previous=move.previous,
            mean=move.error,
            spread=graph.edges[move.start, move.stop]["spread"] if move.order == 0 else None,
            count=graph.edges[move.start, move.stop]["count"],
        )
        for move in sorted(found, key=lambda m: (m.start, m.stop, m.order, m.previous or 0))
        if move.stop > move.start + 1
    )
    plans = search.solve_moves(found, steps, objective=objective)
    certain = stability(
        graph, list(plans), rounds=STABILITY_ROUNDS, objective=objective, faithful=not task.lines
    )
    run_settings = facts.run_settings
    versions = environment()["packages"]
    wanted = {name: task.call.get(name) for name in ("width", "height")}
    return CachePolicy(
        schema_version=f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}",
        model=ModelInfo(
            transformer=str(run_settings.transformer),
            id=run_settings.model_id,
            config_hash=run_settings.config_hash,
        ),
        num_inference_steps=steps,
        scheduler=SchedulerInfo(
            name=run_settings.scheduler,
            shift=getattr(pipe.scheduler.config, "shift", None),
            sigmas=run_settings.sigmas,
        ),
        guidance=GuidanceInfo(
            mode=next(host.guidance for _, host in find_transformers(pipe).values()),
            scale=task.call.get("guidance_scale"),
        ),
        **wanted,
        frames=task.call.get("num_frames"),
        max_skip=task.max_skip,
        edges=edges,
        noise_floor=facts.noise_floor,
        objective=objective,
        plans={str(budget): _stored(plan, certain[budget]) for budget, plan in plans.items()},
        prompts=task.prompts,
        prompts_hash=sha256("\n".join(task.prompts).encode()).hexdigest(),
        seeds=task.seeds,
        attention="dense",
        provenance="measured",
        source=f"vidaccel build-policy, {task.method} errors, {aggregation} of {task.metric}",
        versions=versions,
    )


def _stored(plan: Plan, certain: Any = (), chosen_as: str | None = None) -> StoredPlan:
    return StoredPlan(
        steps=plan.steps,
        errors=plan.errors,
        orders=plan.orders,
        scales=plan.scales,
        stability=tuple(float(certain[step]) for step in plan.steps) if len(certain) else (),
        chosen_as=chosen_as,
    )


def _candidates(policy: CachePolicy, found: list[Move]) -> Candidates:
    """The plans of each validated budget that are worth a run, by name."""
    steps = policy.num_inference_steps
    budgets = [b for b in validated_budgets(steps) if str(b) in policy.plans]
    return {budget: validation.candidates(found, budget, steps) for budget in budgets}


def _validated(
    pipe: Any,
    policy: CachePolicy,
    tried: Candidates,
    call: dict[str, Any],
    samples: list[tuple[str, int]],
    progress: bool,
) -> CachePolicy:
    """The policy with the best candidate of each validated budget, and what all of them gave."""
    budgets = list(tried)
    plans = {f"{b}: {name}": plan for b in budgets for name, plan in tried[b].items()}
    scores, plain_seconds = validation.scores(
        pipe, call, samples, plans, fewer_steps=budgets, progress=progress
    )
    rows, kept = [], dict(policy.plans)
    for budget in budgets:
        scored = {name: scores[f"{budget}: {name}"] for name in tried[budget]}
        best = max(scored, key=lambda name: scored[name].psnr)
        plan = tried[budget][best]
        own = policy.plans[str(budget)]
        same = (plan.steps, plan.orders, plan.scales) == (own.steps, own.orders, own.scales)
        kept[str(budget)] = (
            own.model_copy(update={"chosen_as": best}) if same else _stored(plan, chosen_as=best)
        )
        for name, score in {**scored, "fewer sampling steps": scores[f"{budget} steps"]}.items():
            row = Validation(
                budget=budget,
                candidate=name,
                kept=name == best,
                psnr=score.psnr,
                worst_psnr=score.worst_psnr,
                ssim=score.ssim,
                lpips=score.lpips,
                speedup=plain_seconds / score.seconds,
            )
            rows.append(row)
    return policy.model_copy(update={"plans": kept, "validation": tuple(rows)})


def _model_identity(pipe: Any) -> dict[str, Any]:
    """What tells this pipeline's transformers from others: class, config and some weights."""
    found = {}
    for name, (transformer, _) in find_transformers(pipe).items():
        digest = sha256()
        for key, parameter in _small_parameters(transformer):
            digest.update(key.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        config = {key: str(value) for key, value in config_of(transformer).items()}
        found[name] = {
            "class": type(transformer).__name__,
            "config": config,
            "weights": digest.hexdigest(),
        }
    return found


def _small_parameters(transformer: Any) -> Iterator[tuple[str, Any]]:
    # Hashing billions of weights would take as long as a generation; every layer has small ones.
    return ((k, p) for k, p in transformer.named_parameters() if p.numel() <= 2**16)
