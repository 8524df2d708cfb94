"""The pictures of the page as HTML: progress, the strip of steps, numbers, a policy's curve."""

import math
from collections.abc import Callable
from html import escape
from textwrap import shorten
from typing import Any

from vidaccel.clips.fidelity import MEASURES, in_words, why_unavailable
from vidaccel.demo.job_queue import Progress
from vidaccel.demo.run_store import SavedRun
from vidaccel.engine.report import PrecisionReport
from vidaccel.engine.stats import StepKind
from vidaccel.plans.policy import CachePolicy

KINDS = {
    StepKind.COMPUTED: "computed",
    StepKind.PROBED: "probed",
    StepKind.REUSED: "reused",
}

# The reasons of a report, as they go on behind "dense".
WHY_DENSE = {
    "short sequence": "of too few video tokens to gain",
    "attention mask": "with a mask that sparse attention does not honour",
    "not on a GPU": "without a GPU",
    "first steps": "of the first steps",
    "first layers": "of the first layers",
}

CAPTION_PROMPT = 90  # characters of a prompt under a thumbnail

# The drawing of a policy's curve, in the units of its viewBox.
WIDTH, HEIGHT = 560, 190
LEFT, RIGHT, TOP, BASE = 70, 15, 15, 150


def problem(message: str) -> str:
    """Return an error in words."""
    return f'<div class="va-error" role="alert">{escape(message)}</div>'


def note(message: str) -> str:
    """Return a remark in words."""
    return f'<div class="va-status va-muted">{escape(message)}</div>'


def status(progress: Progress) -> str:
    """Return the progress of a run: a line, and while it runs a bar, its steps and a preview."""
    bar = picture = cells = ""
    if progress.state == "running" and progress.steps:
        share = 100 * progress.step / progress.steps
        bar = (
            f'<div class="va-bar" role="progressbar" aria-label="steps" '
            f'aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">'
            f'<div style="width:{share:.1f}%"></div></div>'
        )
    if not progress.final and progress.preview:
        picture = f'<img class="va-preview" alt="preview of the clip" src="{progress.preview}">'
    if progress.state == "running" and progress.timeline:
        rest = progress.steps - len(progress.timeline)
        cells = strip(progress.timeline, rest=max(0, rest))
    line = _status_line(progress)
    return f'<div class="va-status" aria-live="polite">{line}{bar}{cells}{picture}</div>'


def _status_line(progress: Progress) -> str:
    if progress.state == "failed":
        return problem(progress.message)
    parts = []
    if progress.state == "waiting":
        runs = "1 run is" if progress.ahead == 1 else f"{progress.ahead} runs are"
        parts.append(f"In the queue: {runs} ahead" if progress.ahead else "In the queue")
    elif progress.state == "running":
        parts.append(f"<b>{escape(progress.phase)}</b>")
        if progress.steps:
            parts.append(f"step {progress.step}/{progress.steps}")
            if progress.timeline:
                computed = progress.timeline.count(StepKind.COMPUTED)
                parts.append(f"{len(progress.timeline) - computed} reused")
            if progress.eta is not None and progress.step < progress.steps:
                parts.append(f"{progress.eta:.0f} s left")
    elif progress.state == "done":
        parts.append("Done")
    elif progress.state == "stopped":
        parts.append(escape(progress.message.capitalize() or "Stopped"))
    return f"<div>{', '.join(parts)}</div>"


def strip(timeline: str, details: dict[int, str] | None = None, rest: int = 0) -> str:
    """Return a cell per step: computed, probed or reused.

    Args:
        timeline: the `StepKind` of each step.
        details: step -> what a tooltip adds.
        rest: number of steps to come.
    """
    details = details or {}
    cells = [
        f'<span class="va-{kind}" title="step {step}: {KINDS[StepKind(kind)]}'
        f'{escape(details.get(step, ""))}"></span>'
        for step, kind in enumerate(timeline)
    ]
    cells += ["<span></span>"] * rest
    counts = {
        kind: f"{timeline.count(kind)} {word}" for kind, word in KINDS.items() if kind in timeline
    }
    label = ", ".join(counts.values())
    keys = "".join(
        f'<span class="va-key va-{kind}"></span>{count}' for kind, count in counts.items()
    )
    return (
        f'<div class="va-strip" role="img" aria-label="{label}" data-timeline="{timeline}">'
        f'{"".join(cells)}</div><div class="va-muted">step by step:{keys}</div>'
    )


def attention(part: dict[str, Any] | None) -> str:
    """Return how much of self-attention one transformer computed, with a cell per layer.

    Args:
        part: the fields of `engine.report.AttentionReport`; None where attention was left alone.
    """
    if part is None:
        return '<div class="va-muted" data-density="">attention: dense</div>'
    dense = part["dense_calls"]
    reasons = ", ".join(f"{n} {WHY_DENSE.get(why, why)}" for why, n in dense.items())
    if part["density"] is None:
        line = f"attention: {part['settings']}" if not dense else f"attention: dense, {reasons}"
        return f'<div class="va-muted" data-density="">{escape(line)}</div>'
    cells = "".join(
        f'<span class="va-layer" style="--density:{100 * layer["density"]:.0f}%" '
        f'title="layer {index}: {layer["density"]:.0%} of the query-key pairs"></span>'
        for index, layer in part["layers"].items()
    )
    line = (
        f"attention by layer: {part['density']:.0%} of the query-key pairs in "
        f"{part['sparse_calls']} sparse calls"
    )
    if dense:
        line += f", {part['density_with_dense']:.0%} with the dense ones ({reasons})"
    return (
        f'<div class="va-strip" role="img" aria-label="attention density by layer" '
        f'data-density="{part["density"]:.4f}">{cells}</div>'
        f'<div class="va-muted">{escape(line)}</div>'
    )


def numbers(saved: SavedRun) -> str:
    """Return what a run measured."""
    result, report = saved.result, saved.result.get("report")
    parts = [f'<div class="va-muted">{escape(_asked(saved))}</div>', _cards(saved)]
    if report is not None:
        timeline = "".join(part["timeline"] for part in report["transformers"])
        parts.append(strip(timeline, _details(report)))
        parts += [attention(part.get("attention")) for part in report["transformers"]]
    parts.append(_seconds_table(result, saved.fidelity))
    parts += [f'<div class="va-muted">{escape(line)}</div>' for line in _remarks(saved)]
    return f'<div class="va-numbers">{"".join(parts)}</div>'


def _cards(saved: SavedRun) -> str:
    """Return the speedup and the fidelity in large letters; "" without a comparison."""
    cards = []
    if "speedup" in saved.result:
        cards.append((f"{saved.result['speedup']:.2f}x", "as fast"))
    fidelity = saved.fidelity
    if fidelity is not None:
        for name, measure in MEASURES.items():
            if name in fidelity["mean"]:
                worst = in_words(name, fidelity["worst"][name]["value"])
                mean = in_words(name, fidelity["mean"][name])
                cards.append((mean, f"{measure.title}, worst frame {worst}"))
    tiles = "".join(
        f"<div><b>{value}</b><span class='va-muted'>{what}</span></div>" for value, what in cards
    )
    return f'<div class="va-cards">{tiles}</div>' if cards else ""


def _remarks(saved: SavedRun) -> list[str]:
    """Return the policy, sparse attention, low precision, and what else there is to know."""
    lines: list[str] = []
    report, fidelity = saved.result.get("report"), saved.fidelity
    if report is not None:
        parts = report["transformers"]
        lines.append(parts[0]["policy"])
        attentions = (part.get("attention") for part in parts)
        sparse = (a["settings"] for a in attentions if a and a["density"] is not None)
        lines += dict.fromkeys(sparse)
        lines += [str(PrecisionReport(**low)) for part in parts if (low := part.get("precision"))]
        lines += [note for part in parts for note in part["notes"]]
    if saved.result.get("original_kept"):
        lines.append("the original is that of an earlier run with the same prompt, seed and size")
    lines += saved.result.get("notes", [])
    if fidelity is not None:
        lines += why_unavailable(fidelity["unavailable"])
    return lines


def _asked(saved: SavedRun) -> str:
    """Return the prompt and the main settings of a run."""
    settings = saved.settings
    parts = [
        saved.result.get("model"),
        f"seed {settings.seed}",
        f"{settings.width}x{settings.height}" if settings.width else None,
        settings.frames and f"{settings.frames} frames",
        settings.steps and f"{settings.steps} steps",
        settings.acceleration,
    ]
    return f"{settings.prompt} ({', '.join(str(part) for part in parts if part)})"


def _seconds_table(result: dict[str, Any], fidelity: dict[str, Any] | None) -> str:
    """Return the times of both clips, and how much each flickers."""
    seconds: dict[str, float] = result["seconds"]
    names = [name for name in ("original", "accelerated") if name in seconds]

    def row(title: str, values: list[str]) -> str:
        return f"<tr><td>{title}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"

    rows = [row("whole call", [f"{seconds[name]:.2f} s" for name in names])]
    for title, key in (("denoising", "denoising_seconds"), ("CPU time", "cpu_seconds")):
        if key in result:  # runs saved before have no CPU time
            known = [result[key][name] for name in names]
            rows.append(row(title, ["-" if v is None else f"{v:.2f} s" for v in known]))
    if fidelity is not None:
        rows.append(row("flicker", [f"{value:.2f}" for value in fidelity["flicker"]]))
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<table class="va-table"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _details(report: dict[str, Any]) -> dict[int, str]:
    """Return step -> why it was computed, how much had changed, and how long it took."""
    details: dict[int, str] = {}
    for part in report["transformers"]:
        for call in part["steps"]:
            if call["step"] in details:  # the first branch decides
                continue
            text = f", {call['reason']}" if call["reason"] else ""
            if call["difference"] is not None:
                text += f", difference {call['difference']:.3g}"
            details[call["step"]] = f"{text}, {call['seconds']:.3f} s"
    return details


def caption(saved: SavedRun) -> str:
    """Return what a run shows, as text for a thumbnail: its prompt, and how it was made."""
    result, settings = saved.result, saved.settings
    parts: list[str] = [settings.acceleration]
    if "speedup" in result:
        parts.append(f"{result['speedup']:.2f}x as fast")
    if saved.fidelity is not None:
        parts.append(f"PSNR {in_words('psnr', saved.fidelity['mean']['psnr'])}")
    prompt = shorten(settings.prompt, CAPTION_PROMPT, placeholder="...")
    return f"{prompt} ({', '.join(parts)})"


def curve(policy: CachePolicy, budget: int) -> str:
    """Return the largest error of each budget of a policy, the chosen one marked, as an SVG.

    Plans that were chosen by runs end to end have no errors; the PSNR that they reach is drawn.
    """
    total = policy.num_inference_steps
    psnr = {row.budget: row.psnr for row in policy.validation or () if row.kept}
    choice = f"{budget} of {total} steps computed, {total / budget:.1f}x by steps alone"
    if budget in psnr:
        choice += f", {psnr[budget]:.1f} dB measured"
    name = policy.model.id or policy.model.transformer
    title = f"<div><b>{escape(name)}</b>, {total} steps, {policy.provenance}: {choice}</div>"
    budgets = policy.budgets()
    errors = {b: max(policy.plans[str(b)].errors, default=math.nan) for b in budgets}
    points = {b: math.log10(error) for b, error in errors.items() if error > 0}
    drawn, tick = "error of the worst segment, log scale", lambda value: f"{10**value:.2g}"
    if len(points) < 2:
        predicted = {b: policy.predicted_psnr(b) for b in budgets}
        points = {b: x for b, x in predicted.items() if x is not None and math.isfinite(x)}
        drawn, tick = "PSNR in dB, between those that were measured", lambda value: f"{value:.0f}"
    if len(points) < 2:
        return f'{title}<div class="va-muted">this policy states no errors to draw</div>'
    return title + _draw_curve(points, budgets, budget, drawn, tick)


def _draw_curve(
    points: dict[int, float],
    budgets: list[int],
    chosen: int,
    drawn: str,
    tick: Callable[[float], str],
) -> str:
    """Draw what each budget gives as an SVG.

    Args:
        points: budget -> the height of its point, two or more.
        budgets: all budgets in order, for the axis.
        chosen: the budget to mark.
        drawn: what the heights are.
        tick: shows a height.
    """
    low, high = min(points.values()), max(points.values())

    def at(budget: int, error: float) -> tuple[float, float]:
        width = WIDTH - LEFT - RIGHT
        x = LEFT + width * (budget - budgets[0]) / max(1, budgets[-1] - budgets[0])
        return x, TOP + (BASE - 20) * (high - error) / max(1e-9, high - low)

    line = " ".join("{:.1f},{:.1f}".format(*at(b, error)) for b, error in points.items())
    mark = ""
    if chosen in points:
        x, y = at(chosen, points[chosen])
        mark = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BASE}" stroke="currentColor" '
            f'stroke-dasharray="3 3" opacity=".5"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5" '
            'fill="#2f6fdb"/>'
        )
    ticks = "".join(
        f'<text x="{at(b, low)[0]:.0f}" y="{BASE + 16}" text-anchor="middle">{b}</text>'
        for b in sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})
    )
    scale = "".join(
        f'<text x="{LEFT - 6}" y="{at(budgets[0], value)[1] + 4:.0f}" text-anchor="end">'
        f"{tick(value)}</text>"
        for value in (low, high)
    )
    return (
        f'<svg class="va-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{drawn} against computed steps" font-size="12" fill="currentColor">'
        f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{BASE}" y2="{BASE}" stroke="currentColor" '
        f'opacity=".4"/><polyline points="{line}" fill="none" stroke="#2f6fdb" '
        f'stroke-width="2"/>{mark}{ticks}{scale}'
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">computed steps '
        f"({drawn})</text></svg>"
    )
