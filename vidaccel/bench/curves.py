"""Quality against speed: what many generations say, as points, curves, a table and a figure."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vidaccel.clips.metrics import HIGHER_IS_BETTER
from vidaccel.errors import MetricUnavailable

Record = dict[str, Any]

MOST_DECIBELS = 99.0  # what equal clips count as; their PSNR is infinite
AT_SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
QUALITIES = ("psnr", "worst_psnr", "ssim", "worst_ssim", "lpips", "worst_lpips", "flicker")


def key_of(method: str | None, setting: Record) -> str:
    """What tells one variant from another, as text."""
    return json.dumps([method, setting], sort_keys=True)


def is_plain(record: Record) -> bool:
    """Whether a record is of the plain pipeline."""
    return record["method"] is None


def is_plan(setting: Record) -> bool:
    """Whether a setting is a plan and nothing else: equal ones run the same, whoever found them."""
    return isinstance(setting.get("steps"), list) and set(setting) <= {"steps", "orders", "scales"}


def points_of(
    records: Sequence[Sequence[Record]], wanted: Iterable[str], clock: str
) -> tuple[list[Record], dict[str, str]]:
    """One point per variant from the records of every prompt.

    Args:
        records: of each prompt, the plain ones too.
        wanted: keys of the variants; others in the records are left out.
        clock: the field that speedups are taken from.

    Returns:
        The points, in order of method and speed, and "method: reason" -> settings for variants
        that failed. A point counts only when every prompt has it.
    """
    keys = set(wanted)
    by_variant: dict[str, list[Record]] = defaultdict(list)
    failed: dict[str, str] = {}
    for of_prompt in records:
        plain = [record for record in of_prompt if is_plain(record)]
        for record in of_prompt:
            key = key_of(record["method"], record["setting"])
            if key not in keys:
                continue
            if "failed" in record:
                failed[f"{record['method']} {json.dumps(record['setting'])}"] = record["failed"]
                continue
            beside = _beside(record, plain)
            times = {f"{c}_speedup": fmean(p[c] for p in beside) / record[c] for c in _TIMES}
            share = record["blocks"] / plain[0]["blocks"]
            by_variant[key].append({**record, **times, "blocks_share": share})
    points = [_point(rows, clock) for rows in by_variant.values() if len(rows) == len(records)]
    return sorted(points, key=lambda point: (point["method"], point["speedup"])), failed


_TIMES = ("seconds", "cpu_seconds")


def _beside(record: Record, plain: Sequence[Record]) -> list[Record]:
    """The plain generations before and after a record, by the same process."""
    same = [p for p in plain if p["session"] == record["session"]] or list(plain)
    before = [p for p in same if p["at"] <= record["at"]]
    after = [p for p in same if p["at"] > record["at"]]
    nearest = [max(before, key=lambda p: p["at"])] if before else []
    return nearest + ([min(after, key=lambda p: p["at"])] if after else [])


def _point(rows: Sequence[Record], clock: str) -> Record:
    def values(metric: str) -> list[float] | None:
        found = [row[metric] for row in rows]
        if None in found:
            return None
        return [min(v, MOST_DECIBELS) for v in found] if metric == "psnr" else found

    point: Record = {"method": rows[0]["method"], "setting": rows[0]["setting"]}
    for metric in ("psnr", "ssim", "lpips"):
        found = values(metric)
        pick = min if HIGHER_IS_BETTER[metric] else max
        point[metric] = None if found is None else fmean(found)
        point[f"worst_{metric}"] = None if found is None else pick(found)
        point[f"every_{metric}"] = found
    point["flicker"] = fmean(row["flicker"] for row in rows)
    point["adherence"] = adherence_shares(rows)
    point["seconds"] = median(row["seconds"] for row in rows)
    point["cpu_seconds"] = median(row["cpu_seconds"] for row in rows)
    point["wall_speedup"] = median(row["seconds_speedup"] for row in rows)
    point["cpu_speedup"] = median(row["cpu_seconds_speedup"] for row in rows)
    point["speedup"] = point["wall_speedup" if clock == "seconds" else "cpu_speedup"]
    point["blocks_share"] = fmean(row["blocks_share"] for row in rows)
    for name in ("steps_share", "density"):
        told = [row[name] for row in rows if name in row]
        point[name] = fmean(told) if len(told) == len(rows) else None
    return point


def adherence_shares(rows: Sequence[Record]) -> dict[str, float] | None:
    """Share of the clips that show each part of their scene caption; None without captions."""
    found = [row["adherence"] for row in rows]
    if None in found:
        return None
    return {part: fmean(bool(f[part]) for f in found) for part in found[0]}


def front(points: Sequence[Record], metric: str = "psnr") -> list[Record]:
    """The points that no other one beats in both speed and `metric`, slowest first."""
    better = HIGHER_IS_BETTER[metric]
    kept: list[Record] = []
    for point in sorted(points, key=lambda p: p["speedup"], reverse=True):
        if point[metric] is None:
            continue
        value, best = point[metric], kept[-1][metric] if kept else None
        if best is None or (value > best if better else value < best):
            kept.append(point)
    return kept[::-1]


def at_speedup(points: Sequence[Record], speedup: float) -> Record | None:
    """What a method gives at one speedup, between its points: its qualities are taken as linear
    in the time of a generation. None outside of its points.

    Args:
        points: of one method, of `front`.
        speedup: against the plain pipeline.
    """
    if not points or not points[0]["speedup"] <= speedup <= points[-1]["speedup"]:
        return None
    after = next(i for i, point in enumerate(points) if point["speedup"] >= speedup)
    fast, slow = points[after], points[max(0, after - 1)]
    span = 1 / slow["speedup"] - 1 / fast["speedup"]
    share = (1 / slow["speedup"] - 1 / speedup) / span if span else 1.0

    def between(metric: str) -> float | None:
        a, b = slow[metric], fast[metric]
        return None if a is None or b is None else a + share * (b - a)

    return {metric: between(metric) for metric in QUALITIES}


def equal_time(points: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Every method at the same times: method -> speedup -> its qualities there."""
    found: dict[str, dict[str, Record]] = {}
    for method in dict.fromkeys(point["method"] for point in points):
        of_method = front([point for point in points if point["method"] == method])
        found[method] = {
            f"{speedup:g}": qualities
            for speedup in AT_SPEEDUPS
            if (qualities := at_speedup(of_method, speedup)) is not None
        }
    return found


def table(equal: dict[str, dict[str, Record]], metric: str = "psnr", form: str = ".1f") -> str:
    """A row per method, a column per speedup: mean and, in brackets, the worst prompt."""
    columns = [f"{speedup:g}" for speedup in AT_SPEEDUPS]
    rows = [[f"{metric} at", *(f"{speedup}x" for speedup in columns)]]

    def cell(qualities: Record | None) -> str:
        if qualities is None or qualities[metric] is None:
            return "-"
        return f"{qualities[metric]:{form}} ({qualities[f'worst_{metric}']:{form}})"

    def rank(method: str) -> tuple[float, ...]:
        """By the second column, where most methods are, then the others."""
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        found = [equal[method].get(c, {}).get(metric) for c in (columns[1], *columns)]
        return tuple(float("-inf") if value is None else sign * value for value in found)

    for method in sorted(equal, key=rank, reverse=True):
        rows.append([method, *(cell(equal[method].get(column)) for column in columns)])
    return aligned(rows)


def points_table(result: Record) -> str:
    """Every point of a result: what ran, how long it took, and how close it came."""
    plain = result["plain"]
    header = ["method", "steps", "blocks", "density", "seconds", "speedup", "PSNR", "worst"]
    rows = [[*header, "LPIPS", "follows"]]

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    def follows(adherence: dict[str, float] | None) -> str:
        return share(None if adherence is None else fmean(adherence.values()))

    times = f"{plain['seconds']:.2f}"
    rows.append(
        ["plain", "100%", "100%", "-", times, "1.00x", "-", "-", "-", follows(plain["adherence"])]
    )
    for point in result["points"]:
        lpips = point["lpips"]
        rows.append(
            [
                point["method"],
                share(point["steps_share"]),
                share(point["blocks_share"]),
                share(point["density"]),
                f"{point['seconds']:.2f}",
                f"{point['speedup']:.2f}x",
                f"{point['psnr']:.1f}",
                f"{point['worst_psnr']:.1f}",
                "-" if lpips is None else f"{lpips:.3f}",
                follows(point["adherence"]),
            ]
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def report(result: Record) -> str:
    """The result of `vidaccel bench quality` for people."""
    equal = result["equal_time"]
    plain = result["plain"]
    lines = [
        f"{len(result['settings']['prompts'])} prompts; plain {plain['seconds']:.2f} s, "
        f"{plain['cpu_seconds']:.2f} s of CPU; speedups by the {result['settings']['clock']} clock",
        "",
        "PSNR in dB, mean of the prompts (worst prompt), at equal time:",
        table(equal, "psnr", ".1f"),
    ]
    if all(point["lpips"] is not None for point in result["points"]):
        lines += ["", "LPIPS:", table(equal, "lpips", ".3f")]
    lines += [f"{name}: {why}" for name, why in {**result["left_out"], **result["failed"]}.items()]
    return "\n".join(lines)


# Colour and line of each family of methods: ours solid, other libraries dashed, simple ones dotted.
_OURS = ("vidaccel", "LeMiCa", "DBCache", "plan +", "SVG2")
_SIMPLE = ("evenly spaced", "dense start", "fewer")


def figure(result: Record, path: Path) -> None:
    """Draw the curves of a result of `vidaccel.bench.quality.quality`, one line per method.

    The layouts of a block cache (F1B0, F2B2, ...) share a line, the best of all of them. Left out
    are methods of one point, and sparse attention, whose tables tell density instead.

    Args:
        result: with "points" and "settings".
        path: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetricUnavailable(
            'a figure needs matplotlib: pip install "vidaccel[bench]"'
        ) from error
    panels = {"psnr": "PSNR, mean of the prompts (dB)", "worst_psnr": "PSNR, worst prompt (dB)"}
    points = [point for point in result["points"] if point.get("density") is None]
    if all(point["lpips"] is not None for point in points):
        panels["lpips"] = "LPIPS, mean (lower is closer)"
    picture = Figure(figsize=(5.2 * len(panels) + 2.6, 5.2), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(1, len(panels), squeeze=False)[0]
    counts = Counter(_family(point["method"]) for point in points)
    methods = [method for method, count in counts.items() if count > 1]
    # The curves that matter most are drawn last, on top.
    methods.sort(key=lambda method: (method.startswith(_OURS), method))
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for method in methods:
            own = [point for point in points if _family(point["method"]) == method]
            style = _style(method, methods)
            axis.plot(*_xy(own, metric), "o", color=style["color"], alpha=0.25, markersize=3)
            axis.plot(*_xy(front(own), metric), label=method, **style)
        axis.set_xscale("log")
        axis.set_xlim(1.15, 6)
        axis.set_xticks([1.5, 2, 3, 4, 5], ["1.5x", "2x", "3x", "4x", "5x"])
        axis.minorticks_off()
        if metric != "lpips":
            axis.set_ylim(15, 72)
        axis.set_xlabel("speedup")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=150)


def _xy(points: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    return [p["speedup"] for p in points], [p[metric] for p in points]


def _family(method: str) -> str:
    return re.sub(r" F\dB\d.*", "", method)


def _style(method: str, methods: Sequence[str]) -> Record:
    ours = [m for start in _OURS for m in methods if m.startswith(start)]
    simple = [m for m in methods if m.startswith(_SIMPLE)]
    others = [m for m in methods if m not in ours and m not in simple]
    if method in ours:
        return {"color": _WARM[ours.index(method) % len(_WARM)], "linewidth": 2.2}
    if method in simple:
        return {"color": str(0.15 + 0.15 * simple.index(method)), "linestyle": ":"}
    return {"color": _COLD[others.index(method) % len(_COLD)], "linestyle": "--"}


_WARM = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b", "#bcbd22", "#ff9896", "#c49c94")
_COLD = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#000080", "#006400", "#7f7fff")
