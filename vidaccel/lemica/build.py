"""From a pipeline and prompts to a policy: measure every segment, search every budget, validate."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from networkx import DiGraph
from tqdm.auto import tqdm

from vidaccel.environment import environment
from vidaccel.errors import PlanError
from vidaccel.hosts import find_transformers
from vidaccel.lemica import search
from vidaccel.lemica import validate as validation
from vidaccel.lemica.calibrate import Replayer, exact_errors, gain_errors
from vidaccel.lemica.graph import aggregate, segment_graph
from vidaccel.lemica.work import Errors, Task, WorkFolder
from vidaccel.plan import Setting
from vidaccel.policy import CachePolicy
from vidaccel.schema import Edge, GuidanceInfo, ModelInfo, SchedulerInfo, StoredPlan, Validation


def build_policy(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    seeds: Sequence[int] = (0,),
    max_skip: int = 8,
    method: str = "exact",
    objective: str = "leximax",
    call_kwargs: dict[str, Any] | None = None,
    workdir: str | Path | None = None,
    validate: bool = True,
    progress: bool = True,
) -> CachePolicy:
    """Measure what reusing each segment costs and find the best plan for every budget.

    The method of LeMiCa (arXiv 2511.00090): errors of single segments, averaged over prompts and
    seeds, and the lexicographically smallest path for each number of computed steps.

    Args:
        pipe: a pipeline that `accelerate` takes. It is left without acceleration.
        prompts: what the clips show; 5 to 20 short, diverse ones are plenty. With `validate`, the
            last fifth, at least one, is kept for that.
        num_inference_steps: T.
        seeds: of the noise; every prompt is run with every seed.
        max_skip: longest segment, in steps.
        method: "exact" runs every segment, about T * (max_skip - 1) / 2 generations per sample of
            which a third is computed; "gain" estimates them within about 8 generations.
        objective: of `lemica.search.solve`.
        call_kwargs: further arguments of the pipeline's call, such as the size.
        workdir: folder of the shards, so that a killed build goes on; None for none.
        validate: run the plans of a half, third, quarter and fifth of the steps end to end, beside
            other candidates and plain runs with as many sampling steps; keep the best of each.
        progress: a bar in units of generations.

    Returns:
        The policy.

    Raises:
        PlanError: an argument is out of range.
        BuildError: the work folder belongs to another build or cannot be written.
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
    )
    search.solve([[0, 0, 0]] * 3, objective=objective)  # refuses an unknown one before any work
    with TemporaryDirectory() as temporary:
        folder = WorkFolder(Path(temporary if workdir is None else workdir), task)
        measured, facts = _measure(pipe, task, folder, progress)
    graph = segment_graph(measured, num_inference_steps)
    policy = _policy(pipe, task, graph, facts, objective)
    if not validate:
        return policy
    samples = [(prompt, seeds[0]) for prompt in prompts[len(prompts) - held_out :]]
    return _validated(pipe, policy, aggregate(graph), call, samples, progress)


def _measure(
    pipe: Any, task: Task, folder: WorkFolder, progress: bool
) -> tuple[dict[tuple[int, int], list[float]], dict[str, Any]]:
    """The errors of each segment over the samples, and what the first run told of the setting."""
    measured: dict[tuple[int, int], list[float]] = defaultdict(list)
    facts: dict[str, Any] = {}
    steps = task.num_inference_steps
    total = len(task.samples()) * (steps + sum(map(task.cost, task.starts())))
    form = "{l_bar}{bar}| {n:.1f}/{total:.0f} generations [{elapsed}<{remaining}]"
    with tqdm(total=total / steps, bar_format=form, disable=not progress) as bar:
        for index, (prompt, seed) in enumerate(task.samples()):
            known = {start: folder.load(index, start) for start in task.starts()}
            if index == 0 or None in known.values():
                with Replayer(pipe, {**task.call, "prompt": prompt}, seed) as replayer:
                    facts = facts or _facts(replayer)
                    bar.update(1)
                    for start in (s for s, errors in known.items() if errors is None):
                        known[start] = _unit(replayer, task, start)
                        folder.save(index, start, known[start] or {})
                        bar.update(task.cost(start) / steps)
            for errors in known.values():
                for segment, error in (errors or {}).items():
                    measured[segment].append(error)
    return measured, facts


def _unit(replayer: Replayer, task: Task, start: int | None) -> Errors:
    if start is None:
        return gain_errors(replayer, task.max_skip)
    return exact_errors(replayer, task.max_skip, [start])


def _facts(replayer: Replayer) -> dict[str, Any]:
    return {"setting": replayer.setting, "noise_floor": replayer.noise_floor()}


def _policy(
    pipe: Any,
    task: Task,
    graph: DiGraph,
    facts: dict[str, Any],
    objective: str,
) -> CachePolicy:
    steps = task.num_inference_steps
    edges = tuple(
        Edge(start=s, end=e, mean=edge["mean"], spread=edge["spread"], count=edge["count"])
        for s, e, edge in sorted(graph.edges(data=True))
        if edge["count"]
    )
    plans = search.solve(aggregate(graph), objective=objective)
    setting: Setting = facts["setting"]
    versions = environment()["packages"]
    wanted = {name: task.call.get(name) for name in ("width", "height")}
    return CachePolicy(
        schema_version="1.0",
        model=ModelInfo(
            transformer=str(setting.transformer),
            id=setting.model_id,
            config_hash=setting.config_hash,
        ),
        num_inference_steps=steps,
        scheduler=SchedulerInfo(
            name=setting.scheduler,
            shift=getattr(pipe.scheduler.config, "shift", None),
            sigmas=setting.sigmas,
        ),
        guidance=GuidanceInfo(
            mode=next(host.guidance for _, host in find_transformers(pipe).values()),
            scale=task.call.get("guidance_scale"),
        ),
        **wanted,
        frames=task.call.get("num_frames"),
        max_skip=task.max_skip,
        edges=edges,
        noise_floor=facts["noise_floor"],
        objective=objective,
        plans={
            str(budget): StoredPlan(steps=plan.steps, errors=plan.errors)
            for budget, plan in plans.items()
        },
        prompts=task.prompts,
        prompts_hash=sha256("\n".join(task.prompts).encode()).hexdigest(),
        seeds=task.seeds,
        attention="dense",
        provenance="measured",
        source=f"vidaccel build-policy, {task.method} errors",
        versions=versions,
    )


def _validated(
    pipe: Any,
    policy: CachePolicy,
    errors: Any,
    call: dict[str, Any],
    samples: list[tuple[str, int]],
    progress: bool,
) -> CachePolicy:
    """The policy with the best candidate of each validated budget, and what all of them gave."""
    steps = policy.num_inference_steps
    budgets = sorted({steps // n for n in (2, 3, 4, 5)} & set(policy.budgets()), reverse=True)
    tried = {budget: validation.candidates(errors, budget, steps) for budget in budgets}
    plans = {f"{b}: {name}": plan for b in budgets for name, plan in tried[b].items()}
    found, plain_seconds = validation.scores(
        pipe, call, samples, plans, fewer_steps=budgets, progress=progress
    )
    rows, kept = [], dict(policy.plans)
    for budget in budgets:
        scored = {name: found[f"{budget}: {name}"] for name in tried[budget]}
        best = max(scored, key=lambda name: scored[name].psnr)
        plan = tried[budget][best]
        kept[str(budget)] = StoredPlan(
            steps=plan.steps, errors=plan.errors, orders=plan.orders, chosen_as=best
        )
        for name, score in {**scored, "fewer sampling steps": found[f"{budget} steps"]}.items():
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
        config = {k: str(v) for k, v in transformer.config.items() if not k.startswith("_")}
        found[name] = {
            "class": type(transformer).__name__,
            "config": config,
            "weights": digest.hexdigest(),
        }
    return found


def _small_parameters(transformer: Any) -> Iterator[tuple[str, Any]]:
    # Hashing billions of weights would take as long as a generation; every layer has small ones.
    return ((k, p) for k, p in transformer.named_parameters() if p.numel() <= 2**16)
