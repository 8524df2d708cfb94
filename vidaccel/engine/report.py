"""Reports of what vidaccel did, for people and for programs. No torch, no diffusers."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vidaccel.engine.stats import Call, CallStats, StepKind


@dataclass(frozen=True)
class AttentionReport:
    """The account of sparse attention in one transformer since `accelerate`.

    Attributes:
        settings: the settings of the sparse attention, or why there is none.
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
        verdicts: how the first sparse call of each shape fared beside a dense one, in words; empty
            where nobody held them against each other.
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
    verdicts: tuple[str, ...] = ()

    def __str__(self) -> str:
        dense = ", ".join(f"{calls} {reason}" for reason, calls in self.dense_calls.items())
        spent = ", ".join(f"{phase} {value:.2f} s" for phase, value in self.seconds.items())
        spent = f"; {spent}" if spent else ""
        spent += f"; first calls: {', '.join(self.verdicts)}" if self.verdicts else ""
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
class PrecisionReport:
    """The linear layers of one transformer in low precision.

    Attributes:
        settings: the settings of the low precision.
        layers: number of layers that are in it.
        left_alone: number of layers that are not, by reason.
        bytes_before, bytes_after: bytes of the weights of the blocks' linear layers.
        bytes_kept: bytes of the weights that wait for `restore`.
        kept_in: where they wait: "cpu", "disk" or "drop".
        notes: what a reader should know.
    """

    settings: str
    layers: int
    left_alone: dict[str, int]
    bytes_before: int
    bytes_after: int
    bytes_kept: int
    kept_in: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = "".join(f", {count} not ({why})" for why, count in self.left_alone.items())
        kept = f"{self.bytes_kept / 2**20:.1f} MiB wait in {self.kept_in}"
        return (
            f"precision: {self.settings}, {self.layers} layers{left}, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB, "
            f"{kept if self.kept_in != 'drop' else 'nothing is kept for restore'}"
        )


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
        difference: relative change of the probe blocks' residual; None without two to compare.
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
        precision: what is in low precision; None when nothing is.
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
    precision: PrecisionReport | None = None

    @classmethod
    def of(
        cls,
        component: str,
        transformer: str,
        policy: str,
        stats: CallStats,
        bytes_held: int,
        threshold: float | None = None,
        attention: AttentionReport | None = None,
        notes: tuple[str, ...] = (),
        precision: PrecisionReport | None = None,
    ) -> "TransformerReport":
        """The report of one stats."""
        branches = tuple(
            BranchReport(
                branch=branch,
                steps_computed=sums.computed,
                steps_reused=sums.reused,
                steps_computed_unplanned=sums.unplanned,
                blocks_run=sums.blocks_run,
                blocks_without_vidaccel=sums.blocks_total,
                seconds_computed=sums.seconds_computed,
                seconds_reused=sums.seconds_reused,
                seconds_saved=sums.seconds_saved,
            )
            for branch, sums in stats.totals().items()
        )
        steps = tuple(_step(call) for call in stats.calls)
        return cls(
            component,
            transformer,
            policy,
            stats.generations,
            stats.timeline(),
            bytes_held,
            stats.peak_bytes,
            branches,
            steps,
            (*_notes(steps, threshold), *notes, *(precision.notes if precision else ())),
            attention,
            precision,
        )


_KINDS = {
    StepKind.COMPUTED: "computed",
    StepKind.PROBED: "probed",
    StepKind.REUSED: "reused",
}


def _step(call: Call) -> StepReport:
    difference = None if call.difference is None else float(call.difference)
    return StepReport(
        call.step, call.branch, _KINDS[call.kind], call.reason, difference, call.seconds
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


def notes_of(stats: CallStats, doubts: list[str], adapters: tuple[str, ...]) -> tuple[str, ...]:
    """Say what the numbers of a report do not.

    Args:
        stats: the calls of the transformer.
        doubts: why generations did not reuse anything.
        adapters: those that were active in the last generation.
    """
    notes = [f"{count} calls were run plainly: {why}" for why, count in stats.plain.items()]
    notes += [f"nothing was reused: {doubt}" for doubt in doubts]
    if adapters:
        notes.append(
            f"adapters were active ({', '.join(adapters)}), which no policy and no threshold that "
            "comes with vidaccel was measured with; compare a clip with one of policy=None"
        )
    return tuple(notes)


@dataclass(frozen=True)
class Report:
    """Everything vidaccel did in one pipeline since `accelerate`. `str()` gives a table."""

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
            lines += [f"  {part.precision}"] if part.precision is not None else []
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
