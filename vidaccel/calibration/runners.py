"""Measures all segments of a task: units of work done here or by workers, and kept as they come."""

import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from networkx import DiGraph
from tqdm.auto import tqdm

from vidaccel.calibration.improve import Trial, improving
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import Errors, exact_unit, gain_errors
from vidaccel.calibration.task import Task, Unit, WorkFolder
from vidaccel.lemica.graph import moves, segment_graph
from vidaccel.lemica.search import solve_moves
from vidaccel.plans.plan import Plan, RunSettings

# More rounds of "lazy" than ever seen; each of them measures at least one new segment.
LAZY_ROUNDS = 50


@dataclass(frozen=True)
class RunInfo:
    """What the first generation tells of all of them.

    Attributes:
        setting: of the runs.
        noise_floor: the error of a replay that reuses nothing.
        switch: first step of the second transformer of a pipeline that has two.
    """

    run_settings: RunSettings
    noise_floor: float
    switch: int | None


class Worker:
    """Measures units on one pipeline, and keeps the reference of the sample it is at.

    Args:
        pipe: the pipeline; it is left without acceleration by `close`.
        task: what is measured.
    """

    def __init__(self, pipe: Any, task: Task) -> None:
        self._pipe, self._task = pipe, task
        self._sample: int | None = None
        self._replayer: Replayer | None = None
        self._finished: dict[int, Replayer] = {}  # know how each sample ends, and little more

    def facts(self) -> RunInfo:
        """The setting of the runs and the error of a replay that reuses nothing."""
        replayer = self._open(0)
        return RunInfo(replayer.run_settings, replayer.noise_floor(), replayer.reference.switch)

    def measure(self, sample: int, unit: Unit) -> Errors:
        """The errors of one unit."""
        replayer, task = self._open(sample), self._task
        if unit is None:
            return gain_errors(replayer, task.max_skip, lines=task.lines)
        if isinstance(unit, tuple):
            return Errors({unit: replayer.error(*unit)})
        return exact_unit(replayer, task.max_skip, unit, lines=task.lines)

    def trial(self, sample: int, plan: Plan) -> float:
        """The error of one sample run with a plan."""
        if sample not in self._finished:
            replayer = self._open(sample)
            replayer.forget_steps()
            self._finished[sample], self._replayer = replayer, None
        return self._finished[sample].error_of(plan)

    def close(self) -> None:
        """Leave the pipeline without acceleration."""
        for replayer in self._finished.values():
            replayer.__exit__()
        self._finished.clear()
        self._leave()

    def _leave(self) -> None:
        if self._replayer is not None:
            self._replayer.__exit__()
        self._sample = self._replayer = None

    def _open(self, sample: int) -> Replayer:
        if self._replayer is None or self._sample != sample:
            self._leave()
            prompt, seed = self._task.samples()[sample]
            call = {**self._task.call, "prompt": prompt}
            self._replayer = Replayer(self._pipe, call, seed, self._task.metric)
            self._sample = sample
        return self._replayer


class Runner(Protocol):
    """Does units of work somewhere."""

    def facts(self) -> RunInfo:
        """What the first generation tells."""

    def run(self, todo: Iterable[tuple[int, Unit]]) -> Iterator[tuple[int, Unit, Errors]]:
        """Measure (sample, unit)s, in any order, each once."""

    def trials(self, todo: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
        """Run samples with plans, in any order, each once, and give the errors."""


class LocalRunner:
    """Does them here, one after another."""

    def __init__(self, session: Worker) -> None:
        self._session = session

    def facts(self) -> RunInfo:
        return self._session.facts()

    def run(self, todo: Iterable[tuple[int, Unit]]) -> Iterator[tuple[int, Unit, Errors]]:
        for sample, unit in todo:
            yield sample, unit, self._session.measure(sample, unit)

    def trials(self, todo: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
        for sample, plan in todo:
            yield (sample, plan), self._session.trial(sample, plan)


def measure(
    runner: Runner,
    task: Task,
    folder: WorkFolder,
    *,
    budgets: Iterable[int],
    objective: str,
    progress: bool,
) -> tuple[DiGraph, RunInfo]:
    """The graph of all segments of a task.

    Args:
        runner: where the work is done.
        task: what is measured.
        folder: its shards; what they hold is not measured again.
        budgets: with the method "lazy", the segments of the best plans of these are measured
            exactly, until the plans stay.
        objective: of those plans.
        progress: a bar in units of generations.
    """
    steps = task.num_inference_steps
    samples = range(len(task.samples()))
    form = "{l_bar}{bar}| {n:.1f}/{total:.0f} generations [{elapsed}<{remaining}]"
    with tqdm(total=task.forwards() / steps, bar_format=form, disable=not progress) as bar:
        facts = runner.facts()
        bar.update(2 - steps // 2 / steps)
        references = {0}
        done: dict[int, dict[Unit, Errors]] = defaultdict(dict)

        def finish(units: Iterable[tuple[int, Unit]]) -> None:
            """Load or measure (sample, unit)s into `done`."""
            todo = []
            for sample, unit in units:
                known = folder.load(sample, unit)
                if known is None:
                    todo.append((sample, unit))
                else:
                    done[sample][unit] = known
                    bar.update(task.cost(unit) / steps)
            for sample, unit, errors in runner.run(todo):
                folder.save(sample, unit, errors)
                done[sample][unit] = errors
                bar.update(task.cost(unit) / steps + (sample not in references))
                references.add(sample)

        finish((sample, unit) for sample in samples for unit in task.units())
        graph = _graph(task, done)
        if task.method != "lazy":
            return graph, facts
        exact: set[tuple[int, int]] = set()
        for _ in range(LAZY_ROUNDS):
            plans = solve_moves(
                moves(graph, faithful=not task.lines), steps, budgets, objective=objective
            )
            used = {segment for plan in plans.values() for segment in plan.segments()}
            new = sorted(used - exact)
            if not new:
                break
            finish((sample, segment) for sample in samples for segment in new)
            exact |= set(new)
            graph = _graph(task, done)
        return graph, facts


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
    """The plan of each budget that a local search over whole runs ends at.

    Args:
        runner: where the runs are made; those of different budgets are made side by side.
        task, folder: as `measure` takes them; what the shards hold is not run again.
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
    found: dict[int, Plan] = {}
    asked: dict[int, Trial] = {}
    with tqdm(total=runs * len(starts), unit="run", desc="improving", disable=not progress) as bar:

        def advance(budget: int, error: float | None) -> None:
            try:
                asked[budget] = searches[budget].send(error)  # type: ignore[arg-type]
            except StopIteration as end:
                asked.pop(budget, None)
                found[budget] = end.value

        for budget in starts:
            advance(budget, None)
        while asked:
            known = {trial: folder.load_trial(*trial) for trial in {*asked.values()}}
            errors = {trial: error for trial, error in known.items() if error is not None}
            for trial, error in runner.trials(t for t in known if t not in errors):
                folder.save_trial(*trial, error)
                errors[trial] = error
            for budget, trial in list(asked.items()):
                advance(budget, errors[trial])
                bar.update()
    return found


def _graph(task: Task, done: dict[int, dict[Unit, Errors]]) -> DiGraph:
    holds: dict[tuple[int, int], list[float]] = defaultdict(list)
    lines: dict[tuple[int, int, int], list[tuple[float, ...]]] = defaultdict(list)
    for sample in sorted(done):
        parts = [done[sample][unit] for unit in task.units()]
        errors = Errors(
            {key: value for part in parts for key, value in part.holds.items()},
            {key: value for part in parts for key, value in part.lines.items()},
        )
        single = {unit: part for unit, part in done[sample].items() if isinstance(unit, tuple)}
        errors = errors.corrected({unit: part.holds[unit] for unit, part in single.items()})
        for segment, error in errors.holds.items():
            holds[segment].append(error)
        for line, row in errors.lines.items():
            lines[line].append(row)
    return segment_graph(holds, task.num_inference_steps, lines)


def announce(pipe: Any, task: Task, improving: int = 0) -> None:
    """Say on stderr what a task will cost, from three steps of its first sample.

    Args:
        pipe: the pipeline.
        task: what is measured.
        improving: the most forwards that improving its plans takes.
    """
    steps, samples = task.num_inference_steps, task.samples()
    prompt, seed = samples[0]
    call = {**task.call, "prompt": prompt, "num_inference_steps": 3}
    started = time.perf_counter()
    with Replayer(pipe, call, seed) as replayer:
        seconds = (time.perf_counter() - started) / 3
        held = replayer.reference.tape.bytes_held / 3 * steps
    forwards = task.forwards()
    about = "about " if task.method == "lazy" else ""
    print(
        f"{len(samples)} samples, {task.method}: {about}{forwards:,} forwards, "
        f"{forwards / steps:.0f} generations, {duration(forwards * seconds)} at {seconds:.3g} s "
        f"per step; {held / 2**30:.2f} GiB of host memory",
        file=sys.stderr,
    )
    if improving:
        print(
            f"improving the plans: at most {improving:,} forwards, {improving / steps:.0f} "
            f"generations, {duration(improving * seconds)}",
            file=sys.stderr,
        )


def duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
