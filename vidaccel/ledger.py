"""What was computed, what was reused, and what it saved. No torch, no diffusers."""

import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """One call of a transformer.

    Attributes:
        step, branch: its place in the generation.
        reused: the middle blocks did not run.
        planned: nothing but the plan, where there is one, had the step computed.
        blocks: blocks that ran.
        started, ended: seconds on the host's clock, or CUDA events.
        reason: why it was computed; "" when it was reused.
        difference: relative change of the probe blocks' residual since the last computed step, a
            number or a scalar on the device; None without probe blocks.
    """

    step: int
    branch: str
    reused: bool
    planned: bool
    blocks: int
    started: Any
    ended: Any
    reason: str = ""
    difference: Any = None

    @property
    def letter(self) -> str:
        """C computed, p reused around probe or corrector blocks, - reused without any block."""
        if not self.reused:
            return "C"
        return "p" if self.blocks else "-"

    @property
    def seconds(self) -> float:
        """Duration; waits for the device when it was timed there."""
        return elapsed(self.started, self.ended)


def elapsed(started: Any, ended: Any) -> float:
    """Seconds between two moments on the host's clock or two CUDA events; waits for the latter."""
    if isinstance(started, float):
        return float(ended - started)
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000.0


@dataclass
class Totals:
    """Sums over the calls of one branch."""

    computed: int = 0
    reused: int = 0
    unplanned: int = 0
    blocks_run: int = 0
    seconds_computed: float = 0.0
    seconds_reused: float = 0.0

    def add(self, call: Call) -> None:
        """Count one call in."""
        self.blocks_run += call.blocks
        if call.reused:
            self.reused += 1
            self.seconds_reused += call.seconds
        else:
            self.computed += 1
            self.unplanned += not call.planned
            self.seconds_computed += call.seconds

    @property
    def seconds_saved(self) -> float:
        """What the reused steps would have taken more, had they been computed; an estimate."""
        if not self.computed or not self.reused:
            return 0.0
        mean = self.seconds_computed / self.computed
        return max(0.0, self.reused * mean - self.seconds_reused)


class Ledger:
    """Counts the calls of one transformer since it was accelerated.

    Args:
        blocks: blocks that a call runs without vidaccel.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.generations = 0
        self.calls: list[Call] = []
        self.peak_bytes = 0
        self._past: dict[str, Totals] = defaultdict(Totals)

    def restart(self) -> None:
        """Begin a generation. Earlier calls are summed up, so a server does not grow."""
        for call in self.calls:
            self._past[call.branch].add(call)
        self.calls = []
        self.generations += 1

    def add(self, call: Call, bytes_held: int = 0) -> None:
        """Record a call of the running generation and the bytes that are kept after it."""
        self.calls.append(call)
        self.peak_bytes = max(self.peak_bytes, bytes_held)

    @property
    def steps_reused(self) -> int:
        """Steps of the running or last generation that no branch computed."""
        return len(self.timeline().replace("C", ""))

    def timeline(self) -> str:
        """The running or last generation, a letter per step: that of its most computed branch."""
        kinds: dict[int, str] = {}
        for call in self.calls:
            kinds[call.step] = min(kinds.get(call.step, call.letter), call.letter, key="Cp-".index)
        return "".join(kind for _, kind in sorted(kinds.items()))

    def totals(self) -> dict[str, Totals]:
        """Sums by branch over all generations."""
        sums = {branch: Totals(**vars(totals)) for branch, totals in self._past.items()}
        for call in self.calls:
            sums.setdefault(call.branch, Totals()).add(call)
        return sums


@dataclass(frozen=True)
class AttentionReport:
    """What sparse attention did in one transformer since `accelerate`.

    Attributes:
        settings: of the sparse attention, or why there is none.
        sparse_calls: calls of self-attention that were sparse.
        dense_calls: those that were not, by reason.
        density: mean share of the query-key pairs that the sparse calls computed.
        density_with_dense: the same over all calls, a dense one counting as 1.
        empty_query_clusters, empty_key_clusters: mean share of clusters without tokens.
        recall: mean share of the attention mass that sampled rows kept; None: not measured.
        seconds: time by phase: clustering (with sorting), selection, attention itself, and all of
            dense calls; empty: not measured.
        layers: by position of the block, its own mean density and recall.
        bytes_held: bytes of clusters at this moment.
    """

    settings: str
    sparse_calls: int = 0
    dense_calls: dict[str, int] = field(default_factory=dict)
    density: float | None = None
    density_with_dense: float | None = None
    empty_query_clusters: float | None = None
    empty_key_clusters: float | None = None
    recall: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    layers: dict[int, dict[str, float | None]] = field(default_factory=dict)
    bytes_held: int = 0

    def __str__(self) -> str:
        dense = ", ".join(f"{calls} {reason}" for reason, calls in self.dense_calls.items())
        spent = ", ".join(f"{phase} {value:.2f} s" for phase, value in self.seconds.items())
        spent = f"; {spent}" if spent else ""
        if self.density is None:
            ran = f", all dense ({dense})" if dense else ""
            return f"attention: {self.settings}{ran}{spent}"
        line = (
            f"attention: {self.settings}, density {self.density:.1%} in {self.sparse_calls} calls, "
            f"{self.density_with_dense:.1%} with {sum(self.dense_calls.values())} dense ones"
        )
        line += f" ({dense})" if dense else ""
        line += f", recall {self.recall:.1%}" if self.recall is not None else ""
        return line + spent


@dataclass(frozen=True)
class BranchReport:
    """One guidance branch of one transformer; see `Totals` for the sums."""

    branch: str
    steps_computed: int
    steps_reused: int
    steps_computed_unplanned: int
    blocks_run: int
    blocks_without_vidaccel: int
    seconds_computed: float
    seconds_reused: float
    seconds_saved: float

    @property
    def hit_rate(self) -> float:
        """Share of the steps that were reused."""
        steps = self.steps_computed + self.steps_reused
        return self.steps_reused / steps if steps else 0.0


@dataclass(frozen=True)
class StepReport:
    """One call of the last generation.

    Attributes:
        step, branch: its place.
        kind: "computed", "probed" (reused around probe or corrector blocks) or "reused".
        reason: why it was computed; "" when it was not.
        difference: of the probe blocks' residual; None without them or without one to compare.
        seconds: that it took.
    """

    step: int
    branch: str
    kind: str
    reason: str
    difference: float | None
    seconds: float


@dataclass(frozen=True)
class TransformerReport:
    """One transformer of a pipeline.

    Attributes:
        component: its name in the pipeline.
        transformer: its class.
        policy: what decides, as resolved by `accelerate`.
        generations: generations since `accelerate`; a chunked pipeline counts each chunk.
        timeline: last generation, a letter per step: C computed, p reused around probe or
            corrector blocks, - reused without any block.
        bytes_held, peak_bytes: bytes of cached tensors at this moment, and the most so far.
        branches: sums over all generations, by guidance branch.
        steps: the calls of the last generation.
        notes: what a reader should know, such as why nothing was reused.
        attention: what was sparse; None when attention is left alone.
    """

    component: str
    transformer: str
    policy: str
    generations: int
    timeline: str
    bytes_held: int
    peak_bytes: int
    branches: tuple[BranchReport, ...]
    steps: tuple[StepReport, ...]
    notes: tuple[str, ...]
    attention: AttentionReport | None = None

    @classmethod
    def of(
        cls,
        component: str,
        transformer: str,
        policy: str,
        ledger: Ledger,
        bytes_held: int,
        threshold: float | None = None,
        attention: AttentionReport | None = None,
        notes: tuple[str, ...] = (),
    ) -> "TransformerReport":
        """The report of one ledger."""
        branches = tuple(
            BranchReport(
                branch=branch,
                steps_computed=sums.computed,
                steps_reused=sums.reused,
                steps_computed_unplanned=sums.unplanned,
                blocks_run=sums.blocks_run,
                blocks_without_vidaccel=(sums.computed + sums.reused) * ledger.blocks,
                seconds_computed=sums.seconds_computed,
                seconds_reused=sums.seconds_reused,
                seconds_saved=sums.seconds_saved,
            )
            for branch, sums in ledger.totals().items()
        )
        steps = tuple(_step(call) for call in ledger.calls)
        return cls(
            component,
            transformer,
            policy,
            ledger.generations,
            ledger.timeline(),
            bytes_held,
            ledger.peak_bytes,
            branches,
            steps,
            (*_notes(steps, threshold), *notes),
            attention,
        )


_KINDS = {"C": "computed", "p": "probed", "-": "reused"}


def _step(call: Call) -> StepReport:
    difference = None if call.difference is None else float(call.difference)
    return StepReport(
        call.step, call.branch, _KINDS[call.letter], call.reason, difference, call.seconds
    )


def _notes(steps: tuple[StepReport, ...], threshold: float | None) -> tuple[str, ...]:
    """Why a block cache reused nothing in the last generation."""
    if threshold is None or not steps or any(step.kind != "computed" for step in steps):
        return ()
    reasons = Counter(step.reason for step in steps)
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    seen = [s.difference for s in steps if s.difference is not None and math.isfinite(s.difference)]
    smallest = f"; the smallest difference was {min(seen):.3g}" if seen else ""
    return (
        f"nothing was reused at threshold {threshold:g}: the calls were computed for {told}"
        f"{smallest}",
    )


@dataclass(frozen=True)
class Report:
    """What vidaccel did in one pipeline since `accelerate`. `str()` gives a table."""

    pipeline: str
    transformers: tuple[TransformerReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; the fields of the dataclasses of this module."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for part in self.transformers:
            lines += [
                f"{self.pipeline}.{part.component} ({part.transformer})  policy: {part.policy}",
                f"  {part.generations} generations, {part.bytes_held / 2**20:.1f} MiB held, "
                f"{part.peak_bytes / 2**20:.1f} MiB at most, "
                f"last: {part.timeline or 'nothing has run yet'}",
            ]
            lines += [f"  {line}" for line in _table(part.branches)] if part.branches else []
            lines += [f"  {part.attention}"] if part.attention is not None else []
            lines += [f"  note: {note}" for note in part.notes]
        return "\n".join(lines)


def _table(branches: tuple[BranchReport, ...]) -> list[str]:
    header = ("branch", "computed", "reused", "blocks run", "of", "computing", "reusing", "saved")
    rows = [header] + [
        (
            row.branch,
            f"{row.steps_computed}"
            + (f" ({row.steps_computed_unplanned} unplanned)" * bool(row.steps_computed_unplanned)),
            str(row.steps_reused),
            str(row.blocks_run),
            str(row.blocks_without_vidaccel),
            f"{row.seconds_computed:.2f} s",
            f"{row.seconds_reused:.2f} s",
            f"{row.seconds_saved:.2f} s",
        )
        for row in branches
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
