"""Plans improved by small changes, each of them run end to end.

The error of a segment is measured in a run that is computed everywhere else. In a plan the segments
before it have left their own errors behind, so the best path is a good plan but rarely the best.
Running the neighbours of a plan as a whole shows what the sum of its parts cannot.
"""

from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm.auto import tqdm

from vidaccel.calibration.runners import Runner
from vidaccel.calibration.task import Task, Trial
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.plans.edge import SCALES
from vidaccel.plans.plan import Plan

# A plan counts as better when it is so on this many samples, or on all where there are fewer.
SAMPLES = 4

Key = TypeVar("Key", bound=Hashable)  # of one of several searches

_Forecast = tuple[int, float]  # order and scale on the reused steps of a segment

# From holding to all the way along the line.
_FORECASTS: tuple[_Forecast, ...] = ((0, 1.0), *((1, scale) for scale in SCALES))


def improved(
    runner: Runner,
    task: Task,
    folder: WorkFolder,
    starts: Mapping[int, Sequence[Plan]],
    runs: int,
    *,
    forced: Collection[int] = (),
    progress: bool,
) -> dict[int, Plan]:
    """Find the plan of each budget that a local search over whole runs ends at.

    Args:
        runner: where the runs are made; those of different budgets are made side by side.
        task: what was measured; its samples are run.
        folder: the shards of the task; what they hold is not run again.
        starts: budget -> plans to start from.
        runs: the most for each budget.
        forced: steps that stay computed.
        progress: a bar in units of runs.
    """
    samples = len(task.samples())
    searches = {
        budget: improving(plans, samples, runs, forced=forced, lines=task.lines)
        for budget, plans in starts.items()
    }
    return searched(runner, folder, searches, runs * len(starts), progress=progress)


def searched(
    runner: Runner,
    folder: WorkFolder,
    searches: Mapping[Key, Generator[Trial, float, Plan]],
    total: int,
    *,
    progress: bool,
) -> dict[Key, Plan]:
    """Run searches side by side, and return what each of them ends at.

    Args:
        runner: where the runs are made.
        folder: keeps them; what it holds is not run again.
        searches: key -> a search that asks for runs as `improving` does.
        total: runs that all of them together may ask for, for the bar.
        progress: show a bar in units of runs.
    """
    found: dict[Key, Plan] = {}
    asked: dict[Key, Trial] = {}
    with tqdm(total=total, unit="run", desc="improving", disable=not progress) as bar:

        def advance(key: Key, error: float | None) -> None:
            """Tell a search an error, and ask it for the next trial."""
            try:
                asked[key] = searches[key].send(error)  # type: ignore[arg-type]
            except StopIteration as end:
                asked.pop(key, None)
                found[key] = end.value

        for key in searches:
            advance(key, None)
        while asked:
            known = {trial: folder.load_trial(*trial) for trial in {*asked.values()}}
            errors = {trial: error for trial, error in known.items() if error is not None}
            for trial, error in runner.trials(t for t in known if t not in errors):
                folder.save_trial(*trial, error)
                errors[trial] = error
            for key, trial in list(asked.items()):
                advance(key, errors[trial])
                bar.update()
    return found


def improving(
    starts: Sequence[Plan],
    samples: int,
    runs: int,
    *,
    forced: Collection[int] = (),
    lines: bool = True,
) -> Generator[Trial, float, Plan]:
    """Ask for runs, and return the plan that came out best of them.

    A local search that takes the first improvement. A plan has to be better over the first sample,
    over the first two together, and so on, so that most plans cost a single run.

    Args:
        starts: where to start; the best of them is taken.
        samples: number of samples, 1 or more.
        runs: the most runs, but for those that the last plan needs.
        forced: steps that stay computed.
        lines: change the forecasts too.

    Yields:
        A sample and a plan, for the error of that run to be sent.

    Returns:
        A plan no neighbour of which is better, or the best when the runs were spent.
    """
    best, bar = starts[0], [float("inf")] * min(samples, SAMPLES)
    made = turn = 0
    tried = set()
    while made < runs:
        waiting = [(0, start) for start in starts if _key(start) not in tried]
        if not waiting:
            # On from the last change, not from the start again: every part gets its turn.
            near = [n for n in neighbours(best, forced, lines=lines) if _key(n[1]) not in tried]
            waiting = sorted(near, key=lambda n: (n[0] - turn) % len(best.steps))
        if not waiting:
            break
        turn, plan = waiting[0]
        tried.add(_key(plan))
        total, totals = 0.0, []
        for sample, least in enumerate(bar):
            made += 1
            total += yield sample, plan
            if total >= least:
                break
            totals.append(total)
        else:
            best, bar = plan, totals
    return best


def neighbours(
    plan: Plan, forced: Collection[int] = (), *, lines: bool = True
) -> Iterator[tuple[int, Plan]]:
    """Yield the plans that differ in one computed step's place, or in one segment's forecast.

    A step moves by one; a forecast goes one scale further along the line or back to holding.

    Args:
        plan: a plan of holds and lines.
        forced: steps that stay computed.
        lines: change the forecasts too.

    Yields:
        Which of the computed steps was changed, as its position, and the plan.
    """
    forecasts, total = _forecasts(plan), plan.num_inference_steps
    ends = (*plan.steps[1:], total)
    for i, (step, end) in enumerate(zip(plan.steps, ends, strict=True)):
        if i == 0:
            continue  # it is always computed, and has nothing before it to draw a line from
        for moved in (step - 1, step + 1):
            if plan.steps[i - 1] < moved < end and step not in forced:
                yield i, _plan((*plan.steps[:i], moved, *plan.steps[i + 1 :]), forecasts, total)
        if lines and end > step + 1:
            at = _FORECASTS.index(forecasts[i])
            for forecast in _FORECASTS[max(0, at - 1) : at] + _FORECASTS[at + 1 : at + 2]:
                changed = (*forecasts[:i], forecast, *forecasts[i + 1 :])
                yield i, _plan(plan.steps, changed, total)


def _forecasts(plan: Plan) -> tuple[_Forecast, ...]:
    """Return the forecast after each computed step; where nothing is reused, the one before."""
    found: list[_Forecast] = []
    before = (int(any(plan.orders)), 1.0)
    ends = (*plan.steps[1:], plan.num_inference_steps)
    for i, (step, end) in enumerate(zip(plan.steps, ends, strict=True)):
        if end > step + 1:
            order = min(plan.orders[i], 1) if plan.orders else 0
            scale = plan.scales[i] if plan.scales and order else 1.0
            before = min(_FORECASTS, key=lambda f: abs(f[0] * f[1] - order * scale))
        found.append(before)
    return tuple(found)


def _plan(steps: tuple[int, ...], forecasts: tuple[_Forecast, ...], total: int) -> Plan:
    used = forecasts[: len(steps) - (steps[-1] == total - 1)]
    ends = (*steps[1:], total)
    # Equal plans have equal fields: nothing is said of segments in which nothing is reused.
    orders = tuple(o * (end > s + 1) for (o, _), s, end in zip(used, steps, ends, strict=False))
    scales = tuple(f[1] if o else 1.0 for f, o in zip(used, orders, strict=True))
    if not any(orders):
        return Plan(steps, total)
    return Plan(steps, total, orders=orders, scales=scales if set(scales) != {1.0} else ())


def _key(plan: Plan) -> tuple[object, ...]:
    same = _plan(plan.steps, _forecasts(plan), plan.num_inference_steps)
    return same.steps, same.orders, same.scales
