"""Finds the settings at which a method takes as long as another one, and its quality there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from statistics import fmean
from typing import Any

from vidaccel.bench.curves import Point, Qualities, at_speedup, front
from vidaccel.bench.records import VariantSetting, key_of
from vidaccel.bench.variants import Variant

# Two settings whose times lie this close, as a share of the plain time, are near enough.
NEAR = 0.07
# Beyond its fastest setting a method counts as if it were there for this share of speed.
BEYOND = 0.05
# Settings that name a number of steps, which are written for runs of so many.
_OF_STEPS, _WRITTEN_FOR = ("warmup_steps", "max_warmup_steps", "disable_cache_before_step"), 50


@dataclass(frozen=True)
class Family:
    """A method whose settings lie on a line from careful to fast.

    Attributes:
        method: its name.
        settings: settings along that line, for runs of 50 steps.
        make: makes the variant of one.
    """

    method: str
    settings: tuple[VariantSetting, ...]
    make: Callable[[VariantSetting], Variant] = field(repr=False, compare=False)

    @property
    def end(self) -> float:
        """The last position; the first is 0."""
        return float(len(self.settings) - 1)

    def at(self, position: float, steps: int) -> Variant:
        """Return the variant at a position, of a run of `steps` steps.

        Between two settings of the line numbers go over evenly, fractions by factors; what is no
        number, or -1 for no limit, is that of the nearer one.
        """
        before = min(int(position), len(self.settings) - 2)
        a, b, share = self.settings[before], self.settings[before + 1], position - before
        setting = {name: _between(a[name], b[name], share) for name in a}
        for name in _OF_STEPS:
            if name in setting:
                setting[name] = max(1, round(setting[name] * steps / _WRITTEN_FOR))
        return self.make(setting)


def _between(a: Any, b: Any, share: float) -> Any:
    """The value between two."""
    if a == b or None in (a, b) or -1 in (a, b):
        return a if share < 0.5 else b
    if isinstance(a, float):
        return float(f"{a * (b / a) ** share:.3g}")
    return round(a + (b - a) * share)


def tuned(
    families: Sequence[Family],
    steps: int,
    measure: Callable[[Sequence[Variant]], Sequence[Point]],
    targets: Callable[[Sequence[Point]], Sequence[float]],
    first: Sequence[Variant],
    *,
    rounds: int = 2,
) -> list[Variant]:
    """Find, for each method, the settings just slower and just faster than each target.

    Args:
        families: the methods.
        steps: T.
        measure: runs variants and returns the points of those that did not fail.
        targets: speedups to reach, from the points of the first round.
        first: variants that the first round runs beside, from which the targets follow.
        rounds: how often the settings are halved at most.

    Returns:
        For each method the variants between which its targets lie, or the nearest one.
    """
    positions = {family.method: {family.end / 3, family.end * 2 / 3} for family in families}
    wanted: Sequence[float] = ()
    known: dict[str, dict[float, Point]] = {}
    for turn in range(rounds + 1):
        asked = {f.method: {p: f.at(p, steps) for p in positions[f.method]} for f in families}
        different = {
            key_of(v.method, v.setting): v
            for of_method in asked.values()
            for v in of_method.values()
        }
        found = measure([*(first if turn == 0 else ()), *different.values()])
        points = {key_of(point.method, point.setting): point for point in found}
        wanted = targets(found) if turn == 0 else wanted
        known = {
            method: {p: points[key] for p, v in of_method.items() if (key := _key(v)) in points}
            for method, of_method in asked.items()
        }
        halved = {f.method: set(_halved(known[f.method], f, wanted)) for f in families}
        if turn == rounds or not any(halved.values()):
            break
        positions = {method: places | halved[method] for method, places in positions.items()}
    chosen = {}
    for family in families:
        for target in wanted:
            for position in _around(known[family.method], target):
                variant = family.at(position, steps)
                chosen[_key(variant)] = variant
    return list(chosen.values())


def _key(variant: Variant) -> str:
    return key_of(variant.method, variant.setting)


def _around(known: Mapping[float, Point], target: float) -> tuple[float, ...]:
    """The neighbouring positions between which a speedup lies, or the one at the nearer end."""
    places = sorted(known)
    for a, b in pairwise(places):
        if known[a].speedup <= target <= known[b].speedup:
            return a, b
    if not places:
        return ()
    return (places[0] if known[places[0]].speedup > target else places[-1],)


def _halved(known: Mapping[float, Point], family: Family, targets: Sequence[float]) -> list[float]:
    """Positions that bring a method nearer to its targets; none where it is near enough."""
    found = []
    for target in targets:
        around = _around(known, target)
        if len(around) == 1:
            end = 0.0 if known[around[0]].speedup > target else family.end
            if end != around[0]:
                found.append((around[0] + end) / 2 if abs(around[0] - end) > 1 else end)
        elif around:
            a, b = around
            apart = 1 / known[a].speedup - 1 / known[b].speedup
            if apart > NEAR and known[a].setting != known[b].setting:
                found.append((a + b) / 2)
    return [position for position in found if position not in known]


def at_time(points: Sequence[Point], speedup: float) -> Qualities | None:
    """Return what a method gives to whoever has the time of a speedup; None if it takes longer.

    Args:
        points: those of one method.
        speedup: against the plain pipeline.
    """
    best = front(points)
    if not best:
        return None
    if speedup < best[0].speedup:
        return best[0]
    if best[-1].speedup < speedup <= best[-1].speedup * (1 + BEYOND):
        return best[-1]
    return at_speedup(best, speedup)


@dataclass(frozen=True)
class Standing:
    """A method over all settings of a grid, at one speed.

    Attributes:
        settings: in how many it reaches that speed.
        psnr: mean over those.
        worst_setting: the lowest mean over the prompts of a setting.
        worst_prompt: the lowest of all.
    """

    settings: int
    psnr: float
    worst_setting: float
    worst_prompt: float


def standing(found: Sequence[Qualities]) -> Standing | None:
    """Summarise what a method gives in all settings that it reaches; None where it reaches none."""
    means = [q.psnr for q in found if q.psnr is not None]
    worst = [q.worst_psnr for q in found if q.worst_psnr is not None]
    if not means:
        return None
    return Standing(len(means), fmean(means), min(means), min(worst))


def qualities_of(point: Qualities) -> Qualities:
    """Return the qualities alone of a point."""
    return Qualities(**{each.name: getattr(point, each.name) for each in fields(Qualities)})
