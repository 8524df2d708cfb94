"""Tables of quality against speed, for people."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from vidaccel.bench.curves import AT_SPEEDUPS, Qualities, QualityResult, equal_time
from vidaccel.clips.fidelity import MEASURES
from vidaccel.clips.metrics import HIGHER_IS_BETTER


def quality_table(result: QualityResult) -> str:
    """Return every method at equal times, and what was left out or failed."""
    equal = equal_time(result.points)
    plain = result.plain
    lines = [
        f"{len(result.settings['prompts'])} prompts; plain {plain.seconds:.2f} s, "
        f"{plain.cpu_seconds:.2f} s of CPU; speedups by the {result.settings['clock']} clock",
        "",
        "PSNR in dB, mean of the prompts (worst prompt), at equal time:",
        equal_time_table(equal, "psnr", ".1f"),
    ]
    for name, form in (("lpips", ".3f"), ("vmaf", ".1f"), ("cvvdp", ".2f")):
        if all(point.value(name) is not None for point in result.points):
            lines += ["", f"{MEASURES[name].title}:", equal_time_table(equal, name, form)]
    lines += [f"{name}: {why}" for name, why in {**result.left_out, **result.failed}.items()]
    return "\n".join(lines)


def equal_time_table(
    equal: Mapping[str, Mapping[str, Qualities]], metric: str = "psnr", form: str = ".1f"
) -> str:
    """Return a row per method, a column per speedup: mean and, in brackets, the worst prompt.

    Args:
        equal: as `equal_time` returns it.
        metric: the one that is shown.
        form: format of its values.
    """
    columns = [f"{speedup:g}" for speedup in AT_SPEEDUPS]
    rows = [[f"{metric} at", *(f"{speedup}x" for speedup in columns)]]

    def value(method: str, column: str, name: str) -> float | None:
        qualities = equal[method].get(column)
        return None if qualities is None else qualities.value(name)

    def cell(method: str, column: str) -> str:
        mean = value(method, column, metric)
        if mean is None:
            return "-"
        return f"{mean:{form}} ({value(method, column, f'worst_{metric}'):{form}})"

    def rank(method: str) -> tuple[float, ...]:
        """Return what methods are sorted by: the second column, where most are, then the others."""
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        found = [value(method, column, metric) for column in (columns[1], *columns)]
        return tuple(float("-inf") if x is None else sign * x for x in found)

    for method in sorted(equal, key=rank, reverse=True):
        rows.append([method, *(cell(method, column) for column in columns)])
    return aligned(rows)


def points_table(result: QualityResult) -> str:
    """Return every point of a result: what ran, how long it took, and how close it came.

    "worst" is the PSNR of the worst prompt, "frame" that of the worst frame, "JOD" ColorVideoVDP.
    """
    header = ["method", "steps", "blocks", "density", "seconds", "speedup", "PSNR", "worst"]
    rows = [[*header, "frame", "LPIPS", "VMAF", "JOD", "flicker", "follows"]]
    plain = result.plain
    none = ["-"] * 7
    times = [f"{plain.seconds:.2f}", "1.00x"]
    rows.append(["plain", "100%", "100%", "-", *times, *none, _follows(plain.adherence)])
    for point in result.points:
        rows.append(
            [
                point.method,
                _share(point.steps_share),
                _share(point.blocks_share),
                _share(point.density),
                f"{point.seconds:.2f}",
                f"{point.speedup:.2f}x",
                f"{point.psnr:.1f}",
                f"{point.worst_psnr:.1f}",
                _number(point.worst_frame_psnr, ".1f"),
                _number(point.lpips, ".3f"),
                _number(point.vmaf, ".1f"),
                _number(point.cvvdp, ".2f"),
                _number(point.flicker, "+.2f"),
                _follows(point.adherence),
            ]
        )
    return aligned(rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _follows(adherence: Mapping[str, float] | None) -> str:
    """Return the mean share of caption parts that the clips show."""
    return _share(None if adherence is None else fmean(adherence.values()))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
