"""An estimate of how long the rest of a generation takes."""

import time

from vidaccel.engine.stats import StepKind


class Eta:
    """Estimate the rest of one generation from the steps that have ended.

    Args:
        steps: number of steps of the generation.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._last: float | None = None  # when the step before ended, or the first one began
        self._ended: list[tuple[StepKind, float]] = []  # kind and seconds of each ended step

    def start(self) -> None:
        """Note the first call of the transformer; later calls change nothing."""
        if self._last is None:
            self._last = time.perf_counter()

    def end_step(self, kind: StepKind) -> None:
        """Note that a step of this kind has ended."""
        now = time.perf_counter()
        self._ended.append((kind, 0.0 if self._last is None else now - self._last))
        self._last = now

    def seconds_left(self, computed: list[bool] | None = None) -> float:
        """Return the seconds until the last step ends.

        Args:
            computed: True for each step that is planned to be computed; None where no plan says so.
        """
        rest = self._steps - len(self._ended)
        mean = sum(seconds for _, seconds in self._ended) / max(1, len(self._ended))
        if computed is None:
            return rest * mean
        seconds_of: dict[bool, list[float]] = {True: [], False: []}
        for kind, seconds in self._ended:
            seconds_of[kind == StepKind.COMPUTED].append(seconds)
        # Where no such step has ended yet: a computed one is dear, a reused one nearly free.
        means = {
            is_computed: sum(seen) / len(seen) if seen else mean * is_computed
            for is_computed, seen in seconds_of.items()
        }
        return sum(means[is_computed] for is_computed in computed[len(self._ended) :])
