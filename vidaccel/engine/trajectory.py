"""The denoising trajectories that run through one transformer, and the branches of each.

A server runs several requests through one transformer, in turns or in several threads, each with a
scheduler of its own. What is kept of one must never reach another: every scheduler and thread has a
trajectory, with its own place in the schedule, its own branches and its own generation.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vidaccel.engine.conditions import Conditions
from vidaccel.engine.state import CallContext, Generation
from vidaccel.engine.step_tracker import StepTracker, read_times
from vidaccel.errors import ScheduleError
from vidaccel.hosts.spec import HostSpec

# Why a call is run as if the transformer were not accelerated.
NOT_IN_TABLE = "their timestep was not among those of the scheduler"
MIXED_TIMES = "the samples of a batch were at different times"

# Why the calls of a generation are computed and nothing of them is kept.
NOT_STEPPED = "the scheduler was not stepped between two timesteps, so these calls are no walk"
BYPASSED = "not every block came through vidaccel: something else skips blocks, another cache say"
WINDOWS = "several unnamed calls of a step have the same prompt and cannot be told apart"


@dataclass
class Trajectory:
    """One scheduler's walk in one thread.

    Attributes:
        tracker: follows the scheduler.
        branch_name: position of a call within its step -> branch, where calls are not named.
        guided_calls: unnamed calls per step that guidance explains.
        generation: the running or last one; None before the first.
        doubt: why nothing of the running generation is reused; empty when there is no reason.
    """

    tracker: StepTracker
    branch_name: Callable[[int], str]
    guided_calls: int
    generation: Generation | None = None
    doubt: str = ""
    _seen: list[str] = field(default_factory=list)
    _seen_before: int = 0
    _conditions: dict[str, Conditions] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def locate(
        self,
        values: tuple[float, ...],
        name: str | None,
        conditions: Conditions,
        shape: tuple[int, ...],
    ) -> CallContext:
        """Place one call.

        Args:
            values: the times that it was given, latest first; the tracker fits them.
            name: the branch as the pipeline names it, or None.
            conditions: what it is given besides.
            shape: shape of the latents.
        """
        place = self.tracker.place(values, self._repeats(name, conditions))
        if place.restarted:
            self._conditions, self._shapes, self.doubt = {}, {}, ""
        if place.moved:
            self._seen_before, self._seen = len(self._seen), []
        # Who names the guidance branches runs a denoising loop, with a sampler of its own maybe.
        if not place.stepped and name is None:
            self.doubt = NOT_STEPPED
        branch = self._named(name) if name is not None else self._unnamed(conditions)
        last = self._conditions.get(branch)
        changed = last is not None and not conditions.same_as(last)
        reshaped = not place.restarted and self._shapes.get(branch, shape) != shape
        if reshaped:
            self._shapes = {}
        self._shapes[branch] = shape
        self._conditions[branch] = conditions
        self._seen.append(branch)
        return CallContext(
            place.step, place.num_inference_steps, branch, place.restarted, reshaped, changed
        )

    @property
    def begins_step(self) -> bool:
        """The running call is the first one of its step."""
        return len(self._seen) == 1

    @property
    def is_over(self) -> bool:
        """The last step has had as many calls as the one before, so no other is to be expected."""
        last = self.tracker.step == self.tracker.length - 1
        return last and len(self._seen) >= self._seen_before > 0

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return 0 if self.generation is None else self.generation.bytes_held

    def forget_tensors(self) -> None:
        """Free what is kept for later steps."""
        self._conditions = {}
        if self.generation is not None:
            self.generation.forget_tensors()

    def forget(self) -> None:
        """Free what is kept, and what has been decided about the running step."""
        self._conditions = {}
        if self.generation is not None:
            self.generation.forget()

    def _repeats(self, name: str | None, conditions: Conditions) -> bool:
        """Tell whether a call is like one that the running step has had."""
        if name is not None:
            return name in self._seen
        return bool(self._seen) and self._was_given(self._seen[0], conditions)

    def _was_given(self, branch: str, conditions: Conditions) -> bool:
        """Tell whether the last call of a branch was given the same."""
        last = self._conditions.get(branch)
        return last is not None and conditions.same_as(last)

    def _named(self, name: str) -> str:
        """The branch of a named call; repeats within a step are branches of their own."""
        repeats = sum(seen == name or seen.startswith(f"{name} ") for seen in self._seen)
        return name if not repeats else f"{name} {repeats + 1}"

    def _unnamed(self, conditions: Conditions) -> str:
        """The branch of an unnamed call, told by what it is given and then by its position.

        Calls may join or leave in the middle of a run, as semantic guidance does, so the position
        alone does not tell.
        """
        position = len(self._seen)
        usual = self.branch_name(position)
        if position >= self.guided_calls and any(
            self._was_given(seen, conditions) for seen in self._seen
        ):
            self.doubt = WINDOWS
        free = [name for name in self._conditions if name not in self._seen]
        free.sort(key=lambda name: name != usual)
        for name in free:
            if self._was_given(name, conditions):
                return name
        if usual not in self._conditions and usual not in self._seen:
            return usual
        taken = {*self._conditions, *self._seen}
        number = position
        while self.branch_name(number) in taken:
            number += 1
        return self.branch_name(number)


class Trajectories:
    """All trajectories through one transformer.

    Args:
        host: the row of the transformer.
        dropped: is told of those that no call will belong to any more.
    """

    def __init__(
        self,
        host: HostSpec,
        dropped: Callable[[Trajectory], None] = lambda past: None,
    ) -> None:
        self._host = host
        self._dropped = dropped
        # Pipelines by scheduler. Weak: a server makes a pipeline per request.
        self._pipelines: list[tuple[weakref.ref[Any], Any]] = []
        self._known: dict[tuple[int, int], Trajectory] = {}
        self._last: dict[int, Trajectory] = {}  # by thread
        self._lock = threading.Lock()

    def serve(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe`."""
        kept = [(ref, s) for ref, s in self._pipelines if ref() not in (None, pipe)]
        self._pipelines = [*kept, (weakref.ref(pipe), pipe.scheduler)]

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines that were given to `serve` and still exist."""
        return [pipe for ref, _ in self._pipelines if (pipe := ref()) is not None]

    def check_schedulers(self) -> None:
        """Raise ScheduleError where a pipeline has another scheduler than it had then."""
        for ref, scheduler in self._pipelines:
            pipe = ref()
            if pipe is not None and pipe.scheduler is not scheduler:
                raise ScheduleError(
                    f"the scheduler of this pipeline was {type(scheduler).__name__} when it was "
                    f"accelerated and is another {type(pipe.scheduler).__name__} now: call "
                    "vidaccel.accelerate(pipe) again after replacing it"
                )

    def of(self, scheduler: Any, thread: int) -> Trajectory | None:
        """Return the one of a scheduler in a thread; None where no call has belonged to it."""
        return self._known.get((thread, id(scheduler)))

    def last(self) -> Trajectory | None:
        """Return the one of the last call in this thread."""
        return self._last.get(threading.get_ident())

    @property
    def _is_running(self) -> bool:
        """The last call of this thread was in the middle of a generation."""
        last = self.last()
        return last is not None and last.generation is not None and not last.is_over

    def all(self) -> list[Trajectory]:
        """Return those that are known."""
        with self._lock:
            return list(self._known.values())

    def find(self, timestep: torch.Tensor) -> tuple[Trajectory, tuple[float, ...]] | str:
        """Find the trajectory of a call, and the times that it was given.

        Args:
            timestep: what the transformer was given. Most pipelines pass a view of one entry of
                their scheduler's table, which says whose it is and is known on the host.

        Returns:
            The reason where the call belongs to none and is to be left alone: the samples of a
            batch are at different times, as in training, or no scheduler has this timestep though
            most of a run may be done.

        Raises:
            ScheduleError: no scheduler has this timestep in its table, and no run is going on.
        """
        thread = threading.get_ident()
        mine = self._of_thread(thread)
        for trajectory in mine:
            tracker = trajectory.tracker
            if tracker.is_set and tracker.index_of(timestep) is not None:
                self._last[thread] = trajectory
                return trajectory, tracker.read(timestep) or ()
        values = read_times(timestep, self._host.levels)
        if values is None:
            return MIXED_TIMES
        for fits in (StepTracker.expects, StepTracker.fits):
            for trajectory in mine:
                if trajectory.tracker.is_set and fits(trajectory.tracker, values):
                    self._last[thread] = trajectory
                    return trajectory, values
        if self._is_running:
            return NOT_IN_TABLE
        lengths = [t.tracker.length for t in mine if t.tracker.is_set]
        raise ScheduleError(
            f"the transformer was called at timestep {values[0]:g}, which is not among the "
            f"{lengths[0] if lengths else 0} timesteps of the accelerated pipeline's scheduler; if "
            "another scheduler or pipeline drives it, accelerate that pipeline too, or undo the "
            "acceleration with vidaccel.restore(pipe)"
        )

    def _of_thread(self, thread: int) -> list[Trajectory]:
        """The trajectories that a call of this thread may belong to, the last one first."""
        schedulers = {id(s): s for ref, s in self._pipelines if ref() is not None}
        with self._lock:
            if not all((thread, key) in self._known for key in schedulers):
                self._drop_the_dead(schedulers, thread)
            for key, scheduler in schedulers.items():
                if (thread, key) not in self._known:
                    self._known[thread, key] = Trajectory(
                        StepTracker(scheduler, self._host.times, self._host.levels),
                        self._host.branch,
                        self._host.guided_calls,
                    )
            mine = [self._known[thread, key] for key in schedulers]
        last = self._last.get(thread)
        return sorted(mine, key=lambda trajectory: trajectory is not last)

    def _drop_the_dead(self, schedulers: dict[int, Any], thread: int) -> None:
        """Let go of what threads that have ended and pipelines that are gone have left."""
        threads = {living.ident for living in threading.enumerate()} | {thread}
        for key in [k for k in self._known if k[0] not in threads or k[1] not in schedulers]:
            self._dropped(self._known.pop(key))
        for gone in self._last.keys() - threads:
            del self._last[gone]
