"""How long the rest of a run takes."""

import time


class Countdown:
    """Tells how long the rest of a run takes.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._last: float | None = None
        self._laps: list[tuple[str, float]] = []

    def start(self) -> None:
        """The first call of the transformer begins; later ones change nothing."""
        if self._last is None:
            self._last = time.perf_counter()

    def lap(self, letter: str) -> None:
        """A step has ended that was computed ("C") or reused (another letter)."""
        now = time.perf_counter()
        self._laps.append((letter, 0.0 if self._last is None else now - self._last))
        self._last = now

    def left(self, computed: list[bool] | None = None) -> float:
        """Seconds until the last step ends.

        Args:
            computed: for every step whether it is planned to be computed; None when not known.
        """
        rest = self._steps - len(self._laps)
        mean = sum(seconds for _, seconds in self._laps) / max(1, len(self._laps))
        if computed is None:
            return rest * mean
        times: dict[bool, list[float]] = {True: [], False: []}
        for letter, seconds in self._laps:
            times[letter == "C"].append(seconds)
        # Of a kind that has not been seen yet: a computed step is dear, a reused one nearly free.
        means = {
            kind: sum(seen) / len(seen) if seen else mean * kind for kind, seen in times.items()
        }
        return sum(means[kind] for kind in computed[len(self._laps) :])
