"""The queue of jobs: each waits for its turn on the one worker, and tells how far it is."""

import logging
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vidaccel.clips.video import Clip
from vidaccel.demo.run_store import RunStore, SavedRun
from vidaccel.demo.settings import Limits, Settings
from vidaccel.demo.worker import Stopped, Worker, in_words
from vidaccel.errors import QueueFullError, VidaccelError

logger = logging.getLogger(__name__)

# Seconds without anyone asking for a run that still waits. A browser lets a tab that is behind
# others ask once a minute.
ABANDONED_AFTER = 180.0
REMEMBERED = 200  # ended jobs


@dataclass(frozen=True)
class Progress:
    """The progress of one job.

    Attributes:
        state: "waiting", "running", "done", "stopped" or "failed".
        ahead: number of jobs before it, while it waits.
        phase: "warm-up", "accelerated", "original" or "comparing" while it runs.
        step, steps: number of ended steps of the phase, and of all its steps; 0 when not known.
        timeline: the `StepKind` of each ended step; "" without acceleration.
        eta: seconds left in the phase.
        preview: the latents as a picture in a data URI.
        message: why it stopped or failed.
        saved: the run as far as it is in its files: first the accelerated clip, then all.
        number: how often it has changed, which tells what somebody has seen of it.
        saves: how often `saved` has.
    """

    state: str = "waiting"
    ahead: int = 0
    phase: str = ""
    step: int = 0
    steps: int = 0
    timeline: str = ""
    eta: float | None = None
    preview: str = ""
    message: str = ""
    saved: SavedRun | None = None
    number: int = 0
    saves: int = 0

    @property
    def final(self) -> bool:
        """True when nothing more will happen."""
        return self.state in ("done", "stopped", "failed")


class Job:
    """One run that was asked for.

    Args:
        owner: token of the browser that asked.
        settings: what it asked for.

    Attributes:
        id: names the job; cannot be guessed.
        progress: how far it is.
        stop: when set, the job ends within a step.
        seen: when somebody asked for it last, in seconds on the monotonic clock.
    """

    def __init__(self, owner: str, settings: Settings) -> None:
        self.id = secrets.token_hex(16)
        self.owner = owner
        self.settings = settings
        self.progress = Progress()
        self.stop = threading.Event()
        self.seen = time.monotonic()


class JobQueue:
    """Run jobs on one worker, one after the other, in a thread of its own.

    That thread begins at once to load the model.

    Args:
        worker: runs a job.
        store: where results go.
        limits: the largest run.
        queue_size: number of jobs that may wait.
    """

    def __init__(
        self, worker: Worker, store: RunStore, limits: Limits, queue_size: int = 8
    ) -> None:
        self.worker = worker
        self.store = store
        self.limits = limits
        self.queue_size = queue_size
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._closed = False
        self._thread = threading.Thread(target=self._run_jobs, name="job-queue", daemon=True)
        self._thread.start()

    def submit(self, owner: str, settings: Settings) -> Job:
        """Put a run into the queue and return its job.

        Raises:
            SettingsError: it is beyond the limits of this page.
            PlanError, PolicyError: what it wants to accelerate with is none.
            QueueFullError: too many runs wait.
        """
        self.limits.check(settings)
        settings.acceleration_arguments()
        with self._changed:
            if len(self._waiting) >= self.queue_size:
                raise QueueFullError(
                    f"{len(self._waiting)} runs are waiting already: try again in a while"
                )
            job = Job(owner, settings)
            self._waiting.append(job)
            self._jobs[job.id] = job
            for old in [j for j in self._jobs.values() if j.progress.final][:-REMEMBERED]:
                del self._jobs[old.id]
            self._renumber()
        return job

    def job(self, owner: str, job_id: str) -> Job | None:
        """Return a job of an owner, as long as it is remembered; None otherwise."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    def stop(self, job: Job) -> None:
        """Have a job end: at once when it waits, within a step when it runs."""
        with self._changed:
            job.stop.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._publish(job, state="stopped", message="taken out of the queue")
                self._renumber()

    def look(self, job: Job) -> Progress:
        """Return the progress of a job, and take note that somebody waits for it."""
        job.seen = time.monotonic()
        return job.progress

    def close(self, timeout: float = 60.0) -> None:
        """Stop what runs, drop what waits, and end the thread."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                self.stop(job)
            self._changed.notify_all()
        self._thread.join(timeout)

    def _publish(self, job: Job, **changes: Any) -> None:
        with self._changed:
            job.progress = replace(job.progress, **changes, number=job.progress.number + 1)
            self._changed.notify_all()

    def _renumber(self) -> None:
        for index, job in enumerate(self._waiting):
            self._publish(job, ahead=index + (self._running is not None))

    def _run_jobs(self) -> None:
        with suppress(Exception):  # the first job tries again, and shows the error to its owner
            self.worker.load()
        while (job := self._next()) is not None:
            try:
                self._run(job)
                self._publish(job, state="done")
            except Stopped as stopped:
                at = job.progress
                where = f"stopped at step {at.step} of {at.steps}" if at.steps else "stopped"
                self._publish(job, state="stopped", message=str(stopped) or where)
            except VidaccelError as error:
                logger.warning("a run was refused: %s", error)
                self._publish(job, state="failed", message=in_words(error, job.settings))
            # Whatever a pipeline raises ends that run, not the page.
            except Exception as error:
                logger.exception("a run failed")
                self._publish(job, state="failed", message=in_words(error, job.settings))

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._renumber()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            job = self._running = self._waiting.pop(0)
            self._publish(job, state="running", phase="loading the model")
            self._renumber()
            return job

    def _run(self, job: Job) -> None:
        if time.monotonic() - job.seen > ABANDONED_AFTER:
            raise Stopped("nobody was waiting for it any more")
        # What was left to the model is known only now, and bounded as what was asked for.
        self.limits.check(self.worker.resolved(job.settings))
        run_id: str | None = None

        def save(result: dict[str, Any], clips: dict[str, Clip]) -> None:
            nonlocal run_id
            saved = self.store.save(job.owner, job.settings, result, clips, run_id)
            run_id = saved.id
            self._publish(job, saved=saved, saves=job.progress.saves + 1)

        self.worker.run(
            job.settings, on_progress=partial(self._publish, job), stop=job.stop, save=save
        )
