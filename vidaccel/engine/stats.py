"""Counts what was computed, what was reused, and what that saved. No torch, no diffusers."""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class StepKind(StrEnum):
    """The fate of a step, as the letter that stands for it in a timeline."""

    COMPUTED = "C"
    PROBED = "p"  # reused around probe or corrector blocks
    REUSED = "-"  # without any block


@dataclass(frozen=True)
class Call:
    """One call of a transformer.

    Attributes:
        step, branch: its place in the generation.
        reused: the middle blocks did not run.
        planned: nothing but the plan, where there is one, had the step computed.
        blocks: blocks that ran.
        total: blocks that run without vidaccel.
        started, ended: seconds on the host's clock, or CUDA events.
        reason: the reason why it was computed; "" when it was reused.
        difference: relative change of the probe blocks' residual since the last computed step, a
            number or a scalar on the device; None without probe blocks.
    """

    step: int
    branch: str
    reused: bool
    planned: bool
    blocks: int
    total: int
    started: Any
    ended: Any
    reason: str = ""
    difference: Any = None

    @property
    def kind(self) -> StepKind:
        """The fate of its step in this branch."""
        if not self.reused:
            return StepKind.COMPUTED
        return StepKind.PROBED if self.blocks else StepKind.REUSED

    @property
    def seconds(self) -> float:
        """Duration; waits for the device when it was timed there."""
        return elapsed(self.started, self.ended)


def elapsed(started: Any, ended: Any) -> float:
    """Return the seconds between two moments or CUDA events; waits for the latter."""
    if isinstance(started, float):
        return float(ended - started)
    if not ended.query():  # one wait for the last is one for all before it
        ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000.0


@dataclass
class Totals:
    """Sums over the calls of one branch."""

    computed: int = 0
    reused: int = 0
    unplanned: int = 0
    blocks_run: int = 0
    blocks_total: int = 0
    seconds_computed: float = 0.0
    seconds_reused: float = 0.0

    def add(self, call: Call) -> None:
        """Count one call in."""
        self.blocks_run += call.blocks
        self.blocks_total += call.total
        if call.reused:
            self.reused += 1
            self.seconds_reused += call.seconds
        else:
            self.computed += 1
            self.unplanned += not call.planned
            self.seconds_computed += call.seconds

    @property
    def seconds_saved(self) -> float:
        """Estimate how much longer the reused steps would have taken, had they been computed."""
        if not self.computed or not self.reused:
            return 0.0
        mean = self.seconds_computed / self.computed
        return max(0.0, self.reused * mean - self.seconds_reused)


# From the most to the least that was run of a step.
_ORDER = tuple(StepKind)


class CallStats:
    """Counts the calls of one transformer since it was accelerated.

    Args:
        blocks: blocks that a call runs without vidaccel.

    Attributes:
        generations: those that have begun.
        peak_bytes: the most bytes that were held after a call.
        plain: calls that were run as if nothing were accelerated, by reason.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.generations = 0
        self.peak_bytes = 0
        self.plain: Counter[str] = Counter()
        self._past: dict[str, Totals] = defaultdict(Totals)
        # Of the generations that run in turns or at once, by what drives them.
        self._running: dict[Hashable, list[Call]] = {}
        self._last: Hashable = None

    @property
    def calls(self) -> list[Call]:
        """The calls of the generation that ran last."""
        return self._running.get(self._last, [])

    def restart(self, driver: Hashable = None) -> None:
        """Begin a generation. Earlier calls are summed up, so a server does not grow.

        Args:
            driver: what drives it, as one scheduler in one thread does.
        """
        self.close(driver)
        self._running[driver], self._last = [], driver
        self.generations += 1

    def close(self, driver: Hashable) -> None:
        """Sum up the calls of what will drive no call any more."""
        for call in self._running.pop(driver, []):
            self._past[call.branch].add(call)

    def add(self, call: Call, driver: Hashable = None, bytes_held: int = 0) -> None:
        """Record a call of a running generation and the bytes that are kept after it."""
        self._running[driver].append(call)
        self._last = driver
        self.peak_bytes = max(self.peak_bytes, bytes_held)

    def add_plain(self, reason: str) -> None:
        """Record a call that was run as if nothing were accelerated."""
        self.plain[reason] += 1

    @property
    def steps_reused(self) -> int:
        """Steps of the running or last generation that no branch computed."""
        return len(self.timeline().replace(StepKind.COMPUTED, ""))

    def timeline(self) -> str:
        """The running or last generation, a letter per step: that of its most computed branch."""
        kinds: dict[int, StepKind] = {}
        for call in self.calls:
            kinds[call.step] = min(kinds.get(call.step, call.kind), call.kind, key=_ORDER.index)
        return "".join(kind for _, kind in sorted(kinds.items()))

    def totals(self) -> dict[str, Totals]:
        """Sums by branch over all generations."""
        sums = {branch: Totals(**vars(totals)) for branch, totals in self._past.items()}
        for call in (call for calls in list(self._running.values()) for call in calls):
            sums.setdefault(call.branch, Totals()).add(call)
        return sums
