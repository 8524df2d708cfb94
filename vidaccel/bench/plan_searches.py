"""Searches for plans by whole runs, in a race: each may make equally many.

The search of `build-policy --improve`, from the generic schedule, and that of BudCache.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vidaccel.bench.budcache import annealing
from vidaccel.calibration.improve import improving, searched
from vidaccel.calibration.runners import LocalRunner, Worker
from vidaccel.calibration.task import Task, Trial, model_identity
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.plans.generic import along_damped_lines, generic_plan
from vidaccel.plans.plan import Plan

IMPROVED = "improved generic schedule"
BUDCACHE = "BudCache (re-implemented)"
BUDCACHE_LINE = "BudCache (re-implemented) + damped line"
SEARCHES = (IMPROVED, BUDCACHE, BUDCACHE_LINE)

# Method -> budget -> what its search has found.
Found = Mapping[str, Mapping[int, Plan]]


def searched_plans(
    pipe: Any,
    call: dict[str, Any],
    prompts: Sequence[str],
    budgets: Sequence[int],
    methods: Sequence[str],
    runs: int,
    *,
    seed: int = 0,
    workdir: Path | None = None,
    progress: bool = True,
) -> Found:
    """Search a plan of each budget by each method.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: arguments of its call but the prompt, with `num_inference_steps`.
        prompts: those that the plans are searched on.
        budgets: computed steps.
        methods: names of `SEARCHES`.
        runs: whole runs that each search of one budget may make.
        seed: seed of the noise.
        workdir: folder of the runs, so that a killed search goes on; None for none.
        progress: show a bar.

    Raises:
        BuildError: the folder belongs to another search.
    """
    steps = int(call["num_inference_steps"])
    task = Task(
        tuple(prompts), (seed,), steps, 2, "gain", dict(call), model_identity(pipe), lines=True
    )
    with TemporaryDirectory() as temporary, closing(Worker(pipe, task)) as worker:
        folder = WorkFolder(Path(temporary) if workdir is None else workdir / "searches", task)
        run = worker.run_info().run_settings
        assert run.sigmas is not None  # of a run that was just made
        along = partial(along_damped_lines, sigmas=run.sigmas, guided=run.guided)

        def search(method: str, budget: int) -> Generator[Trial, float, Plan]:
            """Begin the search of one method and budget."""
            if method == IMPROVED:
                start = generic_plan(budget, steps, run.sigmas, guided=run.guided)
                return improving([start], len(prompts), runs)
            if method == BUDCACHE:
                return annealing(budget, steps, len(prompts), runs)
            return annealing(budget, steps, len(prompts), runs, filled=along)

        wanted = {
            (method, budget): search(method, budget) for method in methods for budget in budgets
        }
        total = runs * len(wanted)
        plans = searched(LocalRunner(worker), folder, wanted, total, progress=progress)
    found: dict[str, dict[int, Plan]] = {method: {} for method in methods}
    for (method, budget), plan in plans.items():
        found[method][budget] = plan
    return found
