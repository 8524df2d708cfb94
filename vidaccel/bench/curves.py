"""Quality against speed: from records of generations to points, and from points to curves."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, median
from typing import Any

from vidaccel.bench.records import (
    FailedRecord,
    PlainRecord,
    QualityRecord,
    VariantRecord,
    VariantSetting,
    key_of,
)
from vidaccel.clips.metrics import HIGHER_IS_BETTER

MOST_DECIBELS = 99.0  # what equal clips count as; their PSNR is infinite
AT_SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Qualities:
    """Fidelity to the plain clips: means over the prompts, and the worst prompt.

    Attributes:
        psnr, worst_psnr: in dB.
        ssim, worst_ssim: structural similarity; None where it cannot be computed.
        lpips, worst_lpips: perceptual distance; None without its weights.
        vmaf, worst_vmaf, cvvdp, worst_cvvdp: VMAF and ColorVideoVDP; None where one cannot be
            computed, and in files of before.
        worst_frame_psnr: that of the worst frame of all prompts, in dB; None in files of before.
        flicker: mean of the grey levels more than those of the plain clips.
    """

    psnr: float | None
    worst_psnr: float | None
    ssim: float | None
    worst_ssim: float | None
    lpips: float | None
    worst_lpips: float | None
    flicker: float | None
    vmaf: float | None = None
    worst_vmaf: float | None = None
    cvvdp: float | None = None
    worst_cvvdp: float | None = None
    worst_frame_psnr: float | None = None

    def value(self, metric: str) -> float | None:
        """Return the value of the metric of that name."""
        found: float | None = getattr(self, metric)
        return found


@dataclass(frozen=True, kw_only=True)
class Point(Qualities):
    """A variant over all prompts.

    Attributes:
        method, setting: the variant.
        every_psnr, every_ssim, every_lpips: the values of all prompts; None where one has none.
        adherence: part of the scene captions -> share of the clips that show it.
        seconds, cpu_seconds: medians over the prompts.
        wall_speedup, cpu_speedup: medians over the prompts, against the plain pipeline.
        speedup: the one of the two that the run asked for.
        blocks_share: transformer blocks that ran, as a share of those of the plain pipeline.
        steps_share: share of the steps that were computed; None where there is no report.
        density: share of the scores that attention computed; None without sparse attention.
    """

    method: str
    setting: VariantSetting
    every_psnr: list[float] | None
    every_ssim: list[float] | None
    every_lpips: list[float] | None
    adherence: dict[str, float] | None
    seconds: float
    cpu_seconds: float
    wall_speedup: float
    cpu_speedup: float
    speedup: float
    blocks_share: float
    steps_share: float | None
    density: float | None


@dataclass(frozen=True)
class PlainSummary:
    """The plain pipeline over all prompts.

    Attributes:
        seconds, cpu_seconds: medians.
        blocks: number of transformer blocks that ran in one generation.
        adherence: part of the scene captions -> share of the clips that show it.
        bit_equal_after_every_method: its clips had the same bytes every time, the last time after
            every method.
    """

    seconds: float
    cpu_seconds: float
    blocks: int
    adherence: dict[str, float] | None
    bit_equal_after_every_method: bool


@dataclass(frozen=True)
class QualityResult:
    """The result of `vidaccel.bench.quality.quality`.

    Attributes:
        settings: arguments of the run.
        plain: the plain pipeline.
        points: one per variant that ran, in order of method and speed.
        failed: "method setting" -> what another library raised.
        environment: hardware and versions.
        left_out: method or metric -> why it was left out.
    """

    settings: dict[str, Any]
    plain: PlainSummary
    points: list[Point]
    failed: dict[str, str]
    environment: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it, with every method at equal times."""
        equal = {
            method: {speedup: asdict(found) for speedup, found in of_method.items()}
            for method, of_method in equal_time(self.points).items()
        }
        return {**asdict(self), "equal_time": equal}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QualityResult":
        """Read a result from the JSON of its file; raises KeyError or TypeError for another one."""
        parts = {each.name: data[each.name] for each in fields(cls)}
        parts["plain"] = PlainSummary(**parts["plain"])
        parts["points"] = [Point(**point) for point in parts["points"]]
        return cls(**parts)


def plain_summary(records: Sequence[Sequence[QualityRecord]]) -> PlainSummary:
    """Summarise the plain pipeline from the records of every prompt."""
    of_prompts = [[r for r in each if isinstance(r, PlainRecord)] for each in records]
    plain = [record for of_prompt in of_prompts for record in of_prompt]
    return PlainSummary(
        seconds=median(record.seconds for record in plain),
        cpu_seconds=median(record.cpu_seconds for record in plain),
        blocks=plain[0].blocks,
        adherence=adherence_shares(plain),
        bit_equal_after_every_method=all(map(_bit_equal, records)),
    )


def _bit_equal(records: Sequence[QualityRecord]) -> bool:
    """Tell whether one prompt's plain clips are equal, and the last one was made last."""
    plain = [record for record in records if isinstance(record, PlainRecord)]
    last = max(record.at for record in plain)
    one = len({record.digest for record in plain}) == 1
    return one and all(r.at <= last for r in records if isinstance(r, VariantRecord))


def points_of(
    records: Sequence[Sequence[QualityRecord]], wanted: Iterable[str], clock: str
) -> tuple[list[Point], dict[str, str]]:
    """Make one point per variant from the records of every prompt.

    Args:
        records: those of each prompt, the plain ones too.
        wanted: keys of the variants; others in the records are left out.
        clock: "wall" or "cpu", the seconds that speedups are taken from.

    Returns:
        The points, in order of method and speed, and "method setting" -> reason for variants that
        failed. A point counts only when every prompt has it.
    """
    keys = set(wanted)
    by_variant: dict[str, list[_Compared]] = defaultdict(list)
    failed: dict[str, str] = {}
    for of_prompt in records:
        plain = [record for record in of_prompt if isinstance(record, PlainRecord)]
        for record in of_prompt:
            if isinstance(record, PlainRecord):
                continue
            key = key_of(record.method, record.setting)
            if key not in keys:
                continue
            if isinstance(record, FailedRecord):
                failed[record.title] = record.failed
            else:
                by_variant[key].append(_compared(record, plain))
    points = [_point(rows, clock) for rows in by_variant.values() if len(rows) == len(records)]
    return sorted(points, key=lambda point: (point.method, point.speedup)), failed


@dataclass(frozen=True)
class _Compared:
    """A record beside the plain generations around it."""

    record: VariantRecord
    wall_speedup: float
    cpu_speedup: float
    blocks_share: float


def _compared(record: VariantRecord, plain: Sequence[PlainRecord]) -> _Compared:
    """Take the speedups of a record from the plain ones before and after, by the same process."""
    same = [p for p in plain if p.session == record.session] or list(plain)
    before = [p for p in same if p.at <= record.at]
    after = [p for p in same if p.at > record.at]
    beside = [max(before, key=lambda p: p.at)] if before else []
    beside += [min(after, key=lambda p: p.at)] if after else []
    return _Compared(
        record,
        wall_speedup=fmean(p.seconds for p in beside) / record.seconds,
        cpu_speedup=fmean(p.cpu_seconds for p in beside) / record.cpu_seconds,
        blocks_share=record.blocks / plain[0].blocks,
    )


def _point(rows: Sequence[_Compared], clock: str) -> Point:
    """Summarise one variant over the prompts."""
    records = [row.record for row in rows]
    psnr = [min(record.psnr, MOST_DECIBELS) for record in records]
    ssim = _all([record.ssim for record in records])
    lpips = _all([record.lpips for record in records])
    vmaf = _all([record.vmaf for record in records])
    cvvdp = _all([record.cvvdp for record in records])
    frames = _all([record.worst_frames.get("psnr") for record in records])
    wall = median(row.wall_speedup for row in rows)
    cpu = median(row.cpu_speedup for row in rows)
    return Point(
        method=records[0].method,
        setting=records[0].setting,
        psnr=fmean(psnr),
        worst_psnr=min(psnr),
        every_psnr=psnr,
        ssim=_mean(ssim),
        worst_ssim=None if ssim is None else min(ssim),
        every_ssim=ssim,
        lpips=_mean(lpips),
        worst_lpips=None if lpips is None else max(lpips),
        every_lpips=lpips,
        flicker=fmean(record.flicker for record in records),
        vmaf=_mean(vmaf),
        worst_vmaf=None if vmaf is None else min(vmaf),
        cvvdp=_mean(cvvdp),
        worst_cvvdp=None if cvvdp is None else min(cvvdp),
        worst_frame_psnr=None if frames is None else min(MOST_DECIBELS, *frames),
        adherence=adherence_shares(records),
        seconds=median(record.seconds for record in records),
        cpu_seconds=median(record.cpu_seconds for record in records),
        wall_speedup=wall,
        cpu_speedup=cpu,
        speedup=wall if clock == "wall" else cpu,
        blocks_share=fmean(row.blocks_share for row in rows),
        steps_share=_mean(_all([record.steps_share for record in records])),
        density=_mean(_all([record.density for record in records])),
    )


def _all(values: Sequence[float | None]) -> list[float] | None:
    """Return the values; None where one is missing."""
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else None


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else fmean(values)


def adherence_shares(
    records: Sequence[PlainRecord] | Sequence[VariantRecord],
) -> dict[str, float] | None:
    """Return the share of clips that show each part of their caption; None without captions."""
    found = [record.adherence for record in records if record.adherence is not None]
    if len(found) < len(records):
        return None
    return {part: fmean(bool(shown[part]) for shown in found) for part in found[0]}


def front(points: Sequence[Point], metric: str = "psnr") -> list[Point]:
    """Return the points that no other one beats in both speed and `metric`, slowest first."""
    better = HIGHER_IS_BETTER[metric]
    kept: list[Point] = []
    best: float | None = None
    for point in sorted(points, key=lambda p: p.speedup, reverse=True):
        value = point.value(metric)
        if value is None:
            continue
        if best is None or (value > best if better else value < best):
            kept.append(point)
            best = value
    return kept[::-1]


def at_speedup(points: Sequence[Point], speedup: float) -> Qualities | None:
    """Return what a method gives at one speedup, between its points; None outside of them.

    Its qualities are taken as linear in the time of a generation.

    Args:
        points: those of one method, as `front` returns them.
        speedup: against the plain pipeline.
    """
    if not points or not points[0].speedup <= speedup <= points[-1].speedup:
        return None
    after = next(i for i, point in enumerate(points) if point.speedup >= speedup)
    fast, slow = points[after], points[max(0, after - 1)]
    span = 1 / slow.speedup - 1 / fast.speedup
    share = (1 / slow.speedup - 1 / speedup) / span if span else 1.0

    def between(metric: str) -> float | None:
        a, b = slow.value(metric), fast.value(metric)
        return None if a is None or b is None else a + share * (b - a)

    return Qualities(**{each.name: between(each.name) for each in fields(Qualities)})


def equal_time(points: Sequence[Point]) -> dict[str, dict[str, Qualities]]:
    """Return every method at the same times: method -> speedup -> its qualities there."""
    found: dict[str, dict[str, Qualities]] = {}
    for method in dict.fromkeys(point.method for point in points):
        of_method = front([point for point in points if point.method == method])
        found[method] = {
            f"{speedup:g}": qualities
            for speedup in AT_SPEEDUPS
            if (qualities := at_speedup(of_method, speedup)) is not None
        }
    return found
