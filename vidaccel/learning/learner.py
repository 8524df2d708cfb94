"""Looks on while a generation runs whole, and learns what reuse would have cost.

After each call the embedding and the head run once or a few times more around earlier residuals, at
a sample of the tokens (`token_slots`); what that changes in the output is added up over the steps
(`deviations`). At the end of the run a policy follows from it, which is kept in the user's folder.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vidaccel.engine.block_proxies import Argument
from vidaccel.engine.engine import Engine
from vidaccel.engine.observer import Observer
from vidaccel.engine.parallel import sequence_parallel_mode
from vidaccel.engine.run_settings import guidance_scale
from vidaccel.engine.state import CallContext, RunningCall
from vidaccel.engine.stats import elapsed
from vidaccel.engine.timing import moment
from vidaccel.environment import environment
from vidaccel.errors import VidaccelError
from vidaccel.learning.deviations import Deviations
from vidaccel.learning.guidance import branch_parts, branch_weights
from vidaccel.learning.learned_policy import learned_edges, learned_policy
from vidaccel.learning.sampler import noise_share, step_weights
from vidaccel.learning.token_slots import NotLearnable, TokenSlots
from vidaccel.plans import user_folder
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy

# The most tokens at which residuals are compared, and the most passes of embedding and head that
# this takes after each call.
TOKENS, PASSES = 256, 2
# The longest segment, in steps of a run of 50; longer runs go the same way in smaller steps.
MAX_SKIP, OF_STEPS, LONGEST = 8, 50, 16


class Learner(Observer):
    """Learns from the generations of one transformer that are decided to be learned from.

    What goes wrong on the way ends the lesson and is told in the report, never the generation.

    Args:
        engine: runs the transformer.
        lessons: the running lesson of each thread; shared by the transformers of a pipeline.
        cannot_learn: is told of runs from which nothing could be learned.

    Attributes:
        notes: what has come of the last lesson, for reports.
    """

    def __init__(
        self, engine: Engine, lessons: "Lessons", cannot_learn: Callable[[RunSettings], None]
    ) -> None:
        self._engine, self._lessons = weakref.ref(engine), lessons
        self._cannot_learn = cannot_learn

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Tell what has come of the last lesson."""
        return tuple(filter(None, [self._lessons.note]))

    @property
    def seconds(self) -> float:
        """Time that the last lesson took on the device; waits for it."""
        return sum(elapsed(started, ended) for started, ended in self._lessons.laps)

    def wants_residuals(self, context: CallContext) -> bool:
        engine = self._engine()
        call = None if engine is None else engine.running
        if call is None or call.generation is None or not call.generation.learn:
            return False
        return context.restarted or self._lessons.running is not None

    def after_call(self, call: RunningCall, output: Any) -> None:
        engine, lessons, generation = self._engine(), self._lessons, call.generation
        if engine is None or generation is None or not generation.learn:
            return
        context, started = call.context, moment(call.device)
        try:
            beside = lessons.running is not None and lessons.running.is_beside(call, engine)
            if context.restarted and context.step == 0 and not beside:
                lessons.begin(Lesson(call, engine))
            elif context.restarted and not lessons.begun:
                raise NotLearnable("it begins inside of its schedule")
            if lessons.running is not None:
                lessons.running.learn(call, output, engine)
            if context.step == generation.run.num_inference_steps - 1 and call.trajectory.is_over:
                if lessons.running is not None:
                    user_folder.save(lessons.running.finish())
                    lessons.note = LEARNED
                lessons.end()
        except Exception as error:  # whatever it is: a lesson is not worth a run
            own = isinstance(error, VidaccelError)
            reason = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
            if lessons.running is not None:
                self._cannot_learn(lessons.running.run)
            lessons.running, lessons.note = None, f"{NOT_LEARNED}: {reason}"
            self._cannot_learn(generation.run)
        finally:
            lessons.laps.append((started, moment(call.device)))

    def after_exception(self) -> None:
        self._lessons.end()


LEARNED = "this run was learned from: the next one of this kind reuses steps"
NOT_LEARNED = "nothing was learned from this run"


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return str(error).strip().partition("\n")[0]


class Lessons(threading.local):
    """The lesson of each thread.

    Attributes:
        running: the one that is running; None between runs and after it was given up.
        begun: a run is being learned from, or was until that was given up.
        note: what has come of the last one.
        laps: when it began and ended to learn from each call.
    """

    def __init__(self) -> None:
        self.running: Lesson | None = None
        self.begun, self.note = False, ""
        self.laps: list[tuple[Any, Any]] = []

    def begin(self, lesson: "Lesson") -> None:
        """Begin the lesson of another run."""
        self.running, self.begun, self.note, self.laps = lesson, True, "", []

    def end(self) -> None:
        """The run has ended."""
        self.running, self.begun = None, False


class Lesson:
    """Learns from one generation.

    Args:
        call: its first call.
        engine: runs it.

    Attributes:
        run: what it is like.

    Raises:
        NotLearnable: nothing can be learned from such a run.
    """

    def __init__(self, call: RunningCall, engine: Engine) -> None:
        assert call.generation is not None
        run, scheduler = call.generation.run, call.trajectory.tracker.scheduler
        if run.sigmas is None:
            raise NotLearnable("its noise levels are not known")
        if sequence_parallel_mode(engine.transformer):
            raise NotLearnable("its tokens are spread over several devices")
        self.run, self._scheduler, self._sigmas = run, scheduler, run.sigmas
        serving = engine.trajectories.pipelines
        of_run = (pipe for pipe in serving if getattr(pipe, "scheduler", None) is scheduler)
        self._pipe = next(of_run, serving[0] if serving else None)
        total = run.num_inference_steps
        max_skip = min(LONGEST, max(MAX_SKIP, round(MAX_SKIP * total / OF_STEPS)), total)
        weights = step_weights(scheduler, run.sigmas)
        self._deviations = Deviations(run.sigmas, weights, max_skip, guided=run.guided)
        self._slots: TokenSlots | None = None
        self._residuals: dict[str, dict[int, torch.Tensor]] = {}
        self._step = -1
        self._calls: list[str] = []  # of the running step
        self._branches: set[str] = set()
        self._level: torch.Tensor | None = None
        self._engine, self._second = engine, False

    def is_beside(self, call: RunningCall, engine: Engine) -> bool:
        """Tell whether a call is one of another transformer in the first step of this run."""
        same = call.trajectory.tracker.scheduler is self._scheduler
        return same and engine is not self._engine and self._step == 0

    def learn(self, call: RunningCall, output: Any, engine: Engine) -> None:
        """Learn from a call that has ended.

        Raises:
            NotLearnable: it is no further step of the one run, or its head cannot be evaluated.
        """
        context = call.context
        self._place(context, engine)
        residual = next(
            (r for r, main in zip(call.residuals, call.has_main, strict=True) if main), None
        )
        if residual is None:
            raise NotLearnable("its blocks left no residual")
        tail = partial(engine.run_tail, call)
        max_skip = self._deviations.max_skip
        if self._slots is None:
            self._slots = TokenSlots.find(tail, most=TOKENS, passes=PASSES, rows=2 * max_skip)
        known = self._residuals.setdefault(context.branch, {})
        known[context.step] = self._slots.take(residual).clone()
        known.pop(context.step - 2 * max_skip - 1, None)
        self._level = latents_size(call.arguments, engine)
        needed = self._deviations.needed(context.step)
        outputs = self._slots.evaluate(tail, [known[step] for step in needed])
        if context.step < 2:
            self._slots.check(output, outputs[0])
        for name, part in branch_parts(context.branch, outputs, self._pipe):
            self._branches.add(name)
            self._deviations.add(name, context.step, part.flatten(1))

    def finish(self) -> CachePolicy:
        """Return the policy that follows from the whole run."""
        self._end_step(self.run.num_inference_steps)
        holds, lines = self._deviations.result()
        noise = noise_share(self._scheduler, self._sigmas)
        edges = learned_edges(holds, lines, self._sigmas, noise, guided=self.run.guided)
        shift = self._scheduler.config.get("shift")
        assert self._level is not None  # the run had a step
        return learned_policy(
            self.run,
            edges,
            level=float(self._level),
            shift=shift,
            versions=environment()["packages"],
        )

    def _place(self, context: CallContext, engine: Engine) -> None:
        if context.step != self._step:
            if context.step != self._step + 1:
                raise NotLearnable("its steps did not follow on one another")
            if context.step > 0:
                self._end_step(context.step)
            if engine is not self._engine:
                self._deviations.restart(context.step)
                self._residuals, self._slots = {}, None
                self._engine, self._second = engine, True
            self._step, self._calls = context.step, []
        elif engine is not self._engine:
            raise NotLearnable("a second transformer ran in the same step")
        if context.branch in self._calls or context.changed or context.reshaped:
            raise NotLearnable("what it was given changed in the middle of the run")
        self._calls.append(context.branch)

    def _end_step(self, step: int) -> None:
        """Read the segments that end where `step` begins."""
        if set(self._calls) != set(self._residuals):
            raise NotLearnable("the branches of its guidance changed in the middle of the run")
        scale = None if self._pipe is None else guidance_scale(self._pipe, second=self._second)
        self._deviations.close(step, branch_weights(self._branches, scale))


def latents_size(arguments: tuple[tuple[Any, ...], dict[str, Any]], engine: Engine) -> torch.Tensor:
    """Return the mean size of the latents that a call was given."""
    sample = Argument.of_forward(type(engine.transformer), engine.host.sample)
    found = sample.value(*arguments)
    latents = found if isinstance(found, torch.Tensor) else found[0]
    return latents.detach().float().abs().mean()
