"""Where work items are done: on a pipeline in this process, or wherever a `Runner` does them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import Errors
from vidaccel.calibration.task import Task, Trial, WorkItem
from vidaccel.plans.plan import Plan, RunSettings


@dataclass(frozen=True)
class RunInfo:
    """The part of all runs that their first generation tells.

    Attributes:
        run_settings: what every run is like.
        noise_floor: the error of a replay that reuses nothing.
        switch: first step of the second transformer of a pipeline that has two.
    """

    run_settings: RunSettings
    noise_floor: float
    switch: int | None


class Worker:
    """Does work items on one pipeline, and keeps the reference of the sample it is at.

    Args:
        pipe: the pipeline; it is left without acceleration by `close`.
        task: what is measured.
    """

    def __init__(self, pipe: Any, task: Task) -> None:
        self._pipe, self._task = pipe, task
        self._sample: int | None = None
        self._replayer: Replayer | None = None
        self._finished: dict[int, Replayer] = {}  # know how each sample ends, and little more

    def run_info(self) -> RunInfo:
        """Return what the runs are like, and the error of a replay that reuses nothing."""
        replayer = self._open(0)
        return RunInfo(replayer.run_settings, replayer.noise_floor(), replayer.reference.switch)

    def measure(self, sample: int, item: WorkItem) -> Errors:
        """Return the errors of one work item."""
        return item.measure(self._open(sample), self._task)

    def trial(self, sample: int, plan: Plan) -> float:
        """Return the error of one sample run with a plan."""
        if sample not in self._finished:
            replayer = self._open(sample)
            replayer.forget_steps()
            self._finished[sample], self._replayer = replayer, None
        return self._finished[sample].error_of(plan)

    def close(self) -> None:
        """Leave the pipeline without acceleration."""
        for replayer in self._finished.values():
            replayer.close()
        self._finished.clear()
        self._leave()

    def _leave(self) -> None:
        if self._replayer is not None:
            self._replayer.close()
        self._sample = self._replayer = None

    def _open(self, sample: int) -> Replayer:
        if self._replayer is None or self._sample != sample:
            self._leave()
            prompt, seed = self._task.samples()[sample]
            call = {**self._task.call, "prompt": prompt}
            steps = self._task.num_inference_steps
            self._replayer = Replayer(self._pipe, call, seed, self._task.metric, steps)
            self._sample = sample
        return self._replayer


class Runner(Protocol):
    """Does work items somewhere."""

    def run_info(self) -> RunInfo:
        """Return what the first generation tells."""

    def run(self, todo: Iterable[tuple[int, WorkItem]]) -> Iterator[tuple[int, WorkItem, Errors]]:
        """Measure (sample, item)s, in any order, each once."""

    def trials(self, todo: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
        """Run samples with plans, in any order, each once, and give the errors."""


class LocalRunner:
    """Does work items here, one after another."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run_info(self) -> RunInfo:
        """As `Runner.run_info`."""
        return self._worker.run_info()

    def run(self, todo: Iterable[tuple[int, WorkItem]]) -> Iterator[tuple[int, WorkItem, Errors]]:
        """As `Runner.run`."""
        for sample, item in todo:
            yield sample, item, self._worker.measure(sample, item)

    def trials(self, todo: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
        """As `Runner.trials`."""
        for sample, plan in todo:
            yield (sample, plan), self._worker.trial(sample, plan)
