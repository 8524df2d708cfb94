"""Figures of low precision: PSNR of formats, and where integers and floating formats are even."""

from pathlib import Path
from typing import Any

from vidaccel.bench.figures import _figure as empty_figure
from vidaccel.bench.precision import PrecisionResult
from vidaccel.bench.precision_crossover import CrossoverResult


def draw_precision(result: PrecisionResult, path: Path) -> None:
    """Draw PSNR as a bar for each case, the worst prompt as a tick; a panel per number of steps.

    Args:
        result: the result of `vidaccel.bench.precision.precision`.
        path: file of the figure: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    points = [point for point in result.points if point.psnr is not None]
    steps = sorted({point.steps for point in points})
    rows = max(sum(point.steps == total for point in points) for total in steps)
    figure = empty_figure((7.5 * len(steps), 1.2 + 0.24 * rows))
    axes = figure.subplots(1, len(steps), squeeze=False)[0]
    for axis, total in zip(axes, steps, strict=True):
        own = sorted((p for p in points if p.steps == total), key=lambda p: p.psnr or 0.0)
        colors = [_color(point.name) for point in own]
        places: list[Any] = list(range(len(own)))
        axis.barh(places, [point.psnr for point in own], color=colors)
        axis.plot([point.psnr_of_worst_prompt for point in own], places, "|k", markersize=7)
        axis.set_yticks(places, [point.name for point in own], fontsize=7)
        axis.set(xlabel=f"PSNR to the plain clip, {total} steps (dB); tick: worst prompt")
        axis.set_xlim(15, None)
        axis.margins(y=0.01)
        axis.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _color(name: str) -> str:
    if name.startswith("torchao"):
        return "#7f7f7f"
    floating = name.split(",")[0].startswith(("fp", "mxfp", "nvfp"))
    return "#1f77b4" if floating else "#d62728"


def draw_crossover(result: CrossoverResult, path: Path) -> None:
    """Draw signal over noise against the crest factor, a panel per pair of formats.

    Args:
        result: the result of `vidaccel.bench.precision_crossover.crossover`.
        path: file of the figure: .png, .svg or .pdf.

    Raises:
        MetricUnavailable: matplotlib is not installed.
    """
    pairs = list(result.even_at)
    figure = empty_figure((4.2 * len(pairs), 3.6))
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    for axis, pair in zip(axes, pairs, strict=True):
        own = [point for point in result.points if point.pair == pair]
        crests = [point.crest for point in own]
        axis.plot(crests, [point.integer for point in own], color="#d62728", label="integer")
        axis.plot(crests, [point.floating for point in own], color="#1f77b4", label="floating")
        axis.axvline(result.published[pair], color="0.6", linestyle=":", label="even in the paper")
        even = result.even_at[pair]
        title = f"{pair}, blocks of {own[0].block}"
        axis.set_title(title if even is None else f"{title}: even at {even:.2f}", fontsize=10)
        axis.set(xlabel="crest factor", ylabel="signal over noise (dB)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
