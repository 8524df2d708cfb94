"""Measuring on several workers through Ray: one pipeline each, the work items shared out to them.

The driver hands out items one at a time and writes every shard itself, so workers share no disk and
the merged result is the one of a single machine. An item whose worker died goes to another worker,
and a new worker takes the place of the dead one a few times.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vidaccel.calibration.runners import RunInfo, Worker
from vidaccel.calibration.segment_errors import Errors
from vidaccel.calibration.task import Task, Trial, WorkItem
from vidaccel.errors import BuildError, VidaccelError
from vidaccel.plans.plan import Plan

# How many new workers may take the place of dead ones, for each worker asked for.
REPLACEMENTS = 2

NO_RAY = 'workers need Ray: pip install "vidaccel[ray]"'

_Request = tuple[int, Any]  # a sample, and a work item or plan

Result = TypeVar("Result")


class RayWorker:
    """A `Worker` in a process of its own, with a pipeline of its own.

    An error of the task itself comes back as a value: Ray would wrap what is raised.

    Args:
        load: gives the pipeline.
        task: what is measured.
    """

    def __init__(self, load: Callable[[], Any], task: Task) -> None:
        import torch

        torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        self._worker = Worker(pipe, task)

    def run_info(self) -> RunInfo | VidaccelError:
        """As `Worker.run_info`."""
        return _result_or_error(self._worker.run_info)

    def measure(self, sample: int, item: WorkItem) -> Errors | VidaccelError:
        """As `Worker.measure`."""
        return _result_or_error(self._worker.measure, sample, item)

    def trial(self, sample: int, plan: Plan) -> float | VidaccelError:
        """As `Worker.trial`."""
        return _result_or_error(self._worker.trial, sample, plan)


def _result_or_error(function: Callable[..., Result], *arguments: Any) -> Result | VidaccelError:
    try:
        return function(*arguments)
    except VidaccelError as error:
        return error


@contextmanager
def ray_runner(
    pipe: Any,
    task: Task,
    workers: int,
    *,
    address: str | None = None,
    load: Callable[[], Any] | None = None,
) -> Iterator["RayRunner"]:
    """Workers for a task, until the context ends.

    A Ray that this process is connected to already is used and left running.

    Args:
        pipe: the pipeline that is copied to the workers when there is no `load`.
        task: what is measured.
        workers: how many. Each takes a CPU core, and a GPU when `pipe` is on one.
        address: address of a Ray cluster, as `ray.init` takes it; None starts one on this machine.
        load: gives a worker its pipeline.

    Raises:
        BuildError: Ray is not installed, cannot be reached or has no room for a worker.
    """
    try:
        import ray
    except ImportError as error:
        raise BuildError(NO_RAY) from error
    started = not ray.is_initialized()
    if started:
        here: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BuildError(
                f"cannot reach Ray at {address or 'this machine'}: {reason}"
            ) from error
    runner = RayRunner(ray, pipe, task, workers, load)
    try:
        yield runner
    finally:
        runner.close()
        if started:
            ray.shutdown()


class RayRunner:
    """Does work items on Ray workers.

    Args:
        ray: the module, connected.
        pipe, task, workers, load: as `ray_runner` takes them.
    """

    def __init__(
        self, ray: Any, pipe: Any, task: Task, workers: int, load: Callable[[], Any] | None
    ) -> None:
        self._ray, self._task = ray, task
        self._replacements = REPLACEMENTS * workers
        on_gpu = getattr(pipe, "device", None) is not None and pipe.device.type == "cuda"
        needs = {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0}
        if needs["num_gpus"] and load is None:
            raise BuildError("workers on GPUs need `load`: a function that gives each its pipeline")
        room = min(ray.cluster_resources().get(n[4:-1].upper(), 0) for n, k in needs.items() if k)
        if room < 1:
            raise BuildError(f"the Ray cluster has no room for a worker, which needs {needs}")
        self._load = ray.put(load) if load is not None else ray.put(_Copy(pipe))
        self._class = ray.remote(RayWorker).options(**needs, max_restarts=0)
        self._idle: list[Any] = [self._new() for _ in range(min(workers, int(room)))]
        self._at: dict[Any, int] = {}  # worker -> the sample whose reference it holds

    def _new(self) -> Any:
        return self._class.remote(_Fetch(self._load), self._task)

    def run_info(self) -> RunInfo:
        """Return what the first generation of the first sample tells."""
        ((_, found),) = self._shared_out([(0, None)], lambda worker, _: worker.run_info.remote())
        info: RunInfo = found
        return info

    def run(self, todo: Iterable[tuple[int, WorkItem]]) -> Iterator[tuple[int, WorkItem, Errors]]:
        """Measure (sample, item)s on whichever worker is free; samples stay together if they can.

        Raises:
            BuildError: all workers died.
        """
        for (sample, item), errors in self._shared_out(
            todo, lambda worker, request: worker.measure.remote(*request)
        ):
            yield sample, item, errors

    def trials(self, todo: Iterable[Trial]) -> Iterator[tuple[Trial, float]]:
        """Run samples with plans on whichever worker is free.

        Raises:
            BuildError: all workers died.
        """
        yield from self._shared_out(todo, lambda worker, request: worker.trial.remote(*request))

    def _shared_out(
        self, requests: Iterable[_Request], start: Callable[[Any, _Request], Any]
    ) -> Iterator[tuple[_Request, Any]]:
        """Give out requests, which `start` sends to a worker, and yield each with its result."""
        waiting = deque(requests)
        running: dict[Any, tuple[Any, _Request]] = {}
        while waiting or running:
            while waiting and self._idle:
                worker, request = self._next(waiting)
                running[start(worker, request)] = worker, request
            (done, *_), _ = self._ray.wait(list(running))
            worker, request = running.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                self._at.pop(worker, None)
                waiting.appendleft(request)
                if self._replacements:
                    self._replacements -= 1
                    self._idle.append(self._new())
                elif not running and not self._idle:
                    reason = str(error).strip().partition("\n")[0]
                    raise BuildError(f"all workers died: {reason}; run again to go on") from error
                continue
            except self._ray.exceptions.RayTaskError as error:
                reason = str(error).strip().splitlines()[-1]
                raise BuildError(f"a worker failed: {reason}") from error
            self._idle.append(worker)
            if isinstance(result, VidaccelError):
                raise result
            yield request, result

    def _next(self, waiting: deque[_Request]) -> tuple[Any, _Request]:
        """Pick a free worker, and go on with its sample or else one that no other is at."""
        for worker in self._idle:
            for request in waiting:
                if self._at.get(worker) == request[0]:
                    self._idle.remove(worker)
                    waiting.remove(request)
                    return worker, request
        worker = self._idle.pop(0)
        taken = set(self._at.values())
        request = next((request for request in waiting if request[0] not in taken), waiting[-1])
        waiting.remove(request)
        self._at[worker] = request[0]
        return worker, request

    def close(self) -> None:
        """End the workers."""
        for worker in {*self._idle, *self._at}:
            self._ray.kill(worker)
        self._idle, self._at = [], {}


class _Copy:
    """A pipeline that travels to the workers as it is."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __call__(self) -> Any:
        return self._pipe


class _Fetch:
    """Gets the loader out of Ray's store in the worker."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def __call__(self) -> Any:
        import ray

        return ray.get(self._reference)()
