"""Figures of quality against speed, of a grid of settings, and of sparse attention."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from vidaccel.bench.attention import AttentionResult
from vidaccel.bench.curves import Point, QualityResult, front
from vidaccel.bench.defaults import AUTO, DefaultsResult
from vidaccel.bench.sparse_methods import SPARSE_METHODS
from vidaccel.errors import MetricUnavailable

# Colour and line of each family of methods: ours solid, other libraries dashed, simple ones dotted.
_OURS = (AUTO, "vidaccel", "generic schedule", "LeMiCa", "DBCache", "plan +", "SVG2")
_SIMPLE = ("evenly spaced", "dense start", "fewer")
_WARM = ("#d62728", "#ff7f0e", "#e377c2", "#8c564b", "#bcbd22", "#ff9896", "#c49c94")
_COLD = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#000080", "#006400", "#7f7fff")


def draw_quality(result: QualityResult, path: Path) -> None:
    """Draw the curves of a result, one line per method.

    The layouts of a block cache (F1B0, F2B2, ...) share a line, the best of all of them. Left out
    are methods of one point, and sparse attention, whose tables tell density instead.

    Args:
        result: the result of `vidaccel.bench.quality.quality`.
        path: file of the figure: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    panels = {"psnr": "PSNR, mean of the prompts (dB)", "worst_psnr": "PSNR, worst prompt (dB)"}
    points = [point for point in result.points if point.density is None]
    if all(point.lpips is not None for point in points):
        panels["lpips"] = "LPIPS, mean (lower is closer)"
    figure = _figure((5.2 * len(panels) + 2.6, 5.2))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        _draw_curves(axis, points, metric)
        axis.set_title(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", handlelength=4, fontsize=8, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_curves(axis: Any, points: Sequence[Point], metric: str) -> None:
    """Draw one metric against speedup."""
    counts = Counter(_family(point.method) for point in points)
    methods = [method for method, count in counts.items() if count > 1]
    # The curves that matter most are drawn last, on top.
    methods.sort(key=lambda method: (method.startswith(_OURS), method))
    for method in methods:
        own = [point for point in points if _family(point.method) == method]
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
    axis.grid(alpha=0.3)


def _xy(points: Sequence[Point], metric: str) -> tuple[list[float], list[float | None]]:
    return [point.speedup for point in points], [point.value(metric) for point in points]


def _family(method: str) -> str:
    """Return the name of a method without the layout of its block cache."""
    return re.sub(r" F\dB\d.*", "", method)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `Axes.plot` for a method among `methods`."""
    ours = [m for start in _OURS for m in methods if m.startswith(start)]
    simple = [m for m in methods if m.startswith(_SIMPLE)]
    others = [m for m in methods if m not in ours and m not in simple]
    if method in ours:
        return {"linewidth": 2.2, **_color_and_line(ours.index(method), _WARM, "-")}
    if method in simple:
        return {"color": str(0.15 + 0.15 * simple.index(method)), "linestyle": ":"}
    return _color_and_line(others.index(method), _COLD, "--")


def _color_and_line(index: int, colors: Sequence[str], line: str) -> dict[str, Any]:
    """Return a colour and a line; where the colours begin anew, lines are of dashes and dots."""
    rounds, place = divmod(index, len(colors))
    return {"color": colors[place], "linestyle": "-." if rounds else line}


def draw_defaults(result: DefaultsResult, path: Path) -> None:
    """Draw every method in every setting of a grid, a panel per speed.

    Args:
        result: the result of `vidaccel.bench.defaults.defaults`.
        path: file of the figure: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    standings = result.standings()
    figure = _figure((6.2 * len(standings) + 2.6, 6.4))
    axes = figure.subplots(1, len(standings), squeeze=False, sharey=True)[0]
    methods = sorted({method for rows in standings.values() for method in rows})
    for axis, speedup in zip(axes, standings, strict=True):
        for method in methods:
            found = [cell.at_equal_time[speedup].get(method) for cell in result.cells]
            values = [float("nan") if q is None or q.psnr is None else q.psnr for q in found]
            style = _style(method, methods)
            axis.plot(values, range(len(values)), marker="o", markersize=4, label=method, **style)
        axis.set_title(f"1/{speedup} of the steps computed")
        axis.set_xlabel("PSNR against the plain clip, mean of the prompts (dB)")
        axis.set_yticks(range(len(result.cells)), [cell.setting for cell in result.cells])
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()  # the first setting on top, in all panels
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_attention(result: AttentionResult, path: Path) -> None:
    """Draw PSNR against density of every method, and recall of the layers at the highest top_p.

    Lines show the mean over the prompts; where there are several, a thin line leads down to the
    worst one.

    Args:
        result: the result of `vidaccel.bench.attention.attention`.
        path: file of the figure: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    figure = _figure((13, 4.2))
    left, right = figure.subplots(1, 2)
    for name, color in zip(SPARSE_METHODS, cycle(_WARM + _COLD)):
        own = [point for point in result.points if point.method == name]
        points = sorted(
            ((point.density, point) for point in own if point.density is not None),
            key=lambda pair: pair[0],
        )
        if not points:
            continue
        densities = [density for density, _ in points]
        psnrs = [point.psnr for _, point in points]
        left.plot(densities, psnrs, marker="o", color=color, label=name)
        for density, point in points:
            worst = [point.psnr, point.psnr_of_worst_prompt]
            left.plot([density] * 2, worst, color=color, linewidth=0.8)
        densest, point = points[-1]
        recall = point.recall_of_layers
        right.plot(recall, marker="o", color=color, label=f"{name} ({densest:.0%})")
    left.set(xlabel="density of sparse calls", ylabel="PSNR against dense attention (dB)")
    right.set(xlabel="layer", ylabel="recall of attention mass", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of a size in inches that needs no screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetricUnavailable(
            'a figure needs matplotlib: pip install "vidaccel[bench]"'
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
