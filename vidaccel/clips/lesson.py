"""A plain run that teaches on the way, where nothing was measured or learned of such runs yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.automatic import known_policies
from vidaccel.clips.generate import Run
from vidaccel.clips.load import steps_of
from vidaccel.engine.run_settings import run_settings_of
from vidaccel.hosts.registry import find_transformers
from vidaccel.learning.learner import LEARNED, Learner
from vidaccel.resolve import Resolver


class Lesson:
    """The lesson of one plain run, which may be none."""

    def __init__(self) -> None:
        self._learner: Learner | None = None

    def take(self, pipe: Any) -> None:
        """Take what was learned, before the pipeline is left without acceleration."""
        observers = [engine.observer for engine in engines_of(pipe).values()]
        if observers and isinstance(observers[0], Learner):
            self._learner = observers[0]

    def without(self, plain: Run) -> tuple[Run, list[str]]:
        """Return the plain run without the time that learning took, and notes on the lesson."""
        if self._learner is None:
            return plain, []
        seconds, notes = self._learner.seconds, self._learner.notes
        denoising = plain.denoising_seconds and plain.denoising_seconds - seconds
        # How much CPU time learning took is not known: as large a share as of the clock.
        rest = 1 - seconds / plain.seconds
        plain = replace(
            plain,
            seconds=plain.seconds - seconds,
            denoising_seconds=denoising,
            cpu_seconds=plain.cpu_seconds and plain.cpu_seconds * rest,
            other_cpu_seconds=plain.other_cpu_seconds and plain.other_cpu_seconds * rest,
            report=None,
        )
        spent = f"the time of the plain run is given without the {seconds:.2f} s that this took"
        if LEARNED not in notes:
            return plain, [f"{note}; {spent}" for note in notes]
        learned = "the plain run was learned from, for the accelerated one and those to come"
        return plain, [f"{learned}; {spent}"]


@contextmanager
def learning_from(pipe: Any, call: dict[str, Any], policy: Any) -> Iterator[Lesson]:
    """Learn from the plain run that is made inside, where that is worth it.

    Args:
        pipe: a pipeline without acceleration; it is left so.
        call: arguments of its call.
        policy: the one that the accelerated run is asked for.
    """
    lesson = Lesson()
    if not is_worth_learning(pipe, call, policy):
        yield lesson
        return
    accelerate(pipe, policy=Resolver("learn", anew=True), cache=None, attention=None)
    try:
        yield lesson
        lesson.take(pipe)
    finally:
        restore(pipe)


def is_worth_learning(pipe: Any, call: dict[str, Any], policy: Any) -> bool:
    """Tell whether a policy is asked for that could be learned, and none is known."""
    name = policy.policy if isinstance(policy, Resolver) else policy
    if not isinstance(name, str) or name not in ("auto", "learn"):
        return False
    for transformer, _ in find_transformers(pipe).values():
        try:
            run = run_settings_of(transformer, [pipe], pipe.scheduler, steps_of(pipe, call))
        except (AttributeError, TypeError, ValueError):  # no table of times yet
            return True
        run = replace(run, sigmas=None)
        known = [known.policy for known in known_policies(run) if known.policy.fits(run)]
        if any(policy.provenance in ("measured", "learned") for policy in known):
            return False
    return True
