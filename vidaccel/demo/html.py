"""The pictures of the page as HTML: progress, the strip of steps, numbers, a policy's curve."""

import math
from html import escape
from typing import Any

from vidaccel.clips.compare import in_words
from vidaccel.demo.job_queue import Progress
from vidaccel.demo.run_store import SavedRun
from vidaccel.plans.policy import CachePolicy

KINDS = {"C": "computed", "p": "probed", "-": "reused"}

# What a report says in two words, for people.
WHY_DENSE = {
    "short sequence": "of too few video tokens to gain",
    "attention mask": "with a mask that sparse attention does not honour",
    "not on a GPU": "without a GPU",
    "first steps": "of the first steps",
    "first layers": "of the first layers",
}

CSS = """
.va-muted { opacity: .72; font-size: .9em; }
.va-error { border-left: 4px solid #d64545; padding: .4em .8em; }
.va-status { min-height: 2em; }
.va-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary);
  overflow: hidden; margin: .4em 0; }
.va-bar > div { height: 100%; background: var(--color-accent); }
.va-preview { image-rendering: pixelated; max-width: 100%; max-height: 160px;
  border-radius: 4px; display: block; margin: .5em 0; }
.va-strip { display: flex; gap: 1px; height: 22px; margin: .35em 0; }
.va-strip > span { flex: 1 1 0; min-width: 1px; border-radius: 2px; }
.va-C { background: #2f6fdb; } .va-p { background: #e0a526; }
.va-- { background: var(--border-color-primary); }
.va-strip > .va-layer { background: linear-gradient(to top, #2f6fdb var(--density),
  var(--border-color-primary) 0); }
.va-key { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .35em 0 .9em; vertical-align: -1px; }
.va-cards { display: flex; flex-wrap: wrap; gap: .5em; margin: .6em 0; }
.va-cards > div { flex: 1 1 7em; border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: .5em .8em; }
.va-cards b { display: block; font-size: 1.5em; line-height: 1.2; }
.va-table { width: 100%; border-collapse: collapse; margin: .4em 0; }
.va-table, .va-table tr, .va-table td, .va-table th { border: 0 !important; }
.va-table td, .va-table th { padding: .15em .6em .15em 0 !important; text-align: right !important;
  font-weight: normal; }
.va-table td:first-child, .va-table th:first-child { text-align: left !important; }
.va-curve { width: 100%; max-width: 560px; height: auto; color: var(--body-text-color); }
"""


def problem(message: str) -> str:
    """An error in words."""
    return f'<div class="va-error" role="alert">{escape(message)}</div>'


def note(message: str) -> str:
    """What there is to see, in words."""
    return f'<div class="va-status va-muted">{escape(message)}</div>'


def status(progress: Progress) -> str:
    """How far a run is."""
    parts = []
    if progress.state == "waiting":
        runs = "1 run is" if progress.ahead == 1 else f"{progress.ahead} runs are"
        parts.append(f"In the queue: {runs} ahead" if progress.ahead else "In the queue")
    elif progress.state == "running":
        parts.append(f"<b>{escape(progress.phase)}</b>")
        if progress.steps:
            parts.append(f"step {progress.step}/{progress.steps}")
            if progress.timeline:
                parts.append(f"{len(progress.timeline.replace('C', ''))} reused")
            if progress.eta is not None and progress.step < progress.steps:
                parts.append(f"{progress.eta:.0f} s left")
    elif progress.state == "done":
        parts.append("Done")
    elif progress.state == "stopped":
        parts.append(escape(progress.message.capitalize() or "Stopped"))
    line = f"<div>{', '.join(parts)}</div>" if parts else ""
    if progress.state == "failed":
        line = problem(progress.message)
    bar = picture = cells = ""
    if progress.state == "running" and progress.steps:
        share = 100 * progress.step / progress.steps
        bar = (
            f'<div class="va-bar" role="progressbar" aria-valuenow="{share:.0f}" '
            f'aria-valuemin="0" aria-valuemax="100"><div style="width:{share:.1f}%"></div></div>'
        )
    if not progress.final and progress.preview:
        picture = f'<img class="va-preview" alt="preview" src="{progress.preview}">'
    if progress.state == "running" and progress.timeline:
        rest = progress.steps - len(progress.timeline)
        cells = strip(progress.timeline, rest=max(0, rest))
    return f'<div class="va-status" aria-live="polite">{line}{bar}{cells}{picture}</div>'


def strip(timeline: str, details: dict[int, str] | None = None, rest: int = 0) -> str:
    """A cell per step: computed, probed or reused.

    Args:
        timeline: a letter per step, as `vidaccel.report` has it.
        details: step -> what a tooltip adds.
        rest: steps to come.
    """
    cells = [
        f'<span class="va-{letter}" title="step {step}: {KINDS[letter]}'
        f'{escape((details or {}).get(step, ""))}"></span>'
        for step, letter in enumerate(timeline)
    ]
    cells += ["<span></span>"] * rest
    told = ", ".join(
        f"{timeline.count(letter)} {kind}" for letter, kind in KINDS.items() if letter in timeline
    )
    keys = "".join(
        f'<span class="va-key va-{letter}"></span>{timeline.count(letter)} {kind}'
        for letter, kind in KINDS.items()
        if letter in timeline
    )
    return (
        f'<div class="va-strip" role="img" aria-label="{told}" data-timeline="{timeline}">'
        f'{"".join(cells)}</div><div class="va-muted">step by step:{keys}</div>'
    )


def attention(told: dict[str, Any] | None) -> str:
    """How much of self-attention one transformer computed, with a cell per layer.

    Args:
        told: the fields of `engine.report.AttentionReport`; None where attention was left alone.
    """
    if told is None:
        return '<div class="va-muted" data-density="">attention: dense</div>'
    dense = told["dense_calls"]
    reasons = ", ".join(f"{n} {WHY_DENSE.get(why, why)}" for why, n in dense.items())
    if told["density"] is None:
        line = f"attention: {told['settings']}" if not dense else f"attention: dense, {reasons}"
        return f'<div class="va-muted" data-density="">{escape(line)}</div>'
    cells = "".join(
        f'<span class="va-layer" style="--density:{100 * layer["density"]:.0f}%" '
        f'title="layer {index}: {layer["density"]:.0%} of the query-key pairs"></span>'
        for index, layer in told["layers"].items()
    )
    line = (
        f"attention by layer: {told['density']:.0%} of the query-key pairs in "
        f"{told['sparse_calls']} sparse calls"
    )
    if dense:
        line += f", {told['density_with_dense']:.0%} with the dense ones ({reasons})"
    return (
        f'<div class="va-strip" role="img" aria-label="attention density by layer" '
        f'data-density="{told["density"]:.4f}">{cells}</div>'
        f'<div class="va-muted">{escape(line)}</div>'
    )


def numbers(finished: SavedRun) -> str:
    """What a run measured."""
    result = finished.result
    seconds, near = result["seconds"], result.get("fidelity")
    cards = []
    if "speedup" in result:
        cards.append((f"{result['speedup']:.2f}x", "as fast"))
    if near is not None:
        for name in ("psnr", "ssim", "lpips"):
            if name in near["mean"]:
                worst = in_words(name, near["worst"][name]["value"])
                cards.append(
                    (in_words(name, near["mean"][name]), f"{name.upper()}, worst frame {worst}")
                )
    tiles = "".join(f"<div><b>{a}</b><span class='va-muted'>{b}</span></div>" for a, b in cards)
    parts = [f'<div class="va-muted">{escape(_asked(finished))}</div>']
    parts += [f'<div class="va-cards">{tiles}</div>'] if cards else []
    report = result.get("report")
    if report is not None:
        parts.append(strip(_timeline(report), _details(report)))
        parts += [attention(part.get("attention")) for part in report["transformers"]]
    parts.append(_seconds_table(seconds, result["denoising_seconds"], near))
    words = []
    if report is not None:
        words += [report["transformers"][0]["policy"]]
        words += _sparse_settings(report)
        words += [note for part in report["transformers"] for note in part["notes"]]
    if result.get("original_kept"):
        words.append("the original is that of an earlier run with the same prompt, seed and size")
    if near is not None:
        words += [f"{name.upper()} is not available here" for name in near["unavailable"]]
    parts += [f'<div class="va-muted">{escape(line)}</div>' for line in words]
    return f'<div class="va-numbers">{"".join(parts)}</div>'


def _sparse_settings(report: dict[str, Any]) -> list[str]:
    told = (part.get("attention") for part in report["transformers"])
    return list(dict.fromkeys(a["settings"] for a in told if a and a["density"] is not None))


def _asked(finished: SavedRun) -> str:
    settings = finished.settings
    size = f"{settings.width}x{settings.height}" if settings.width else None
    told = [
        finished.result.get("model"),
        f"seed {settings.seed}",
        size,
        settings.frames and f"{settings.frames} frames",
        settings.steps and f"{settings.steps} steps",
        settings.acceleration,
    ]
    return f"{settings.prompt} ({', '.join(str(part) for part in told if part)})"


def _seconds_table(
    seconds: dict[str, float], denoising: dict[str, float | None], near: dict[str, Any] | None
) -> str:
    names = [name for name in ("original", "accelerated") if name in seconds]

    def row(title: str, values: list[str]) -> str:
        return f"<tr><td>{title}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"

    rows = [row("whole call", [f"{seconds[name]:.2f} s" for name in names])]
    known = [denoising[name] for name in names]
    rows.append(row("denoising", ["-" if v is None else f"{v:.2f} s" for v in known]))
    if near is not None:
        rows.append(row("flicker", [f"{value:.2f}" for value in near["flicker"]]))
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<table class="va-table"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _timeline(report: dict[str, Any]) -> str:
    return "".join(part["timeline"] for part in report["transformers"])


def _details(report: dict[str, Any]) -> dict[int, str]:
    """Step -> why it was computed, how much had changed, and how long it took."""
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


def caption(finished: SavedRun) -> str:
    """One line under a thumbnail."""
    result = finished.result
    parts = [f"{result['speedup']:.2f}x"] if "speedup" in result else []
    if "fidelity" in result:
        parts.append(in_words("psnr", result["fidelity"]["mean"]["psnr"]))
    return ", ".join(parts) or finished.settings.acceleration


def curve(policy: CachePolicy, budget: int) -> str:
    """The largest error of each budget of a policy, the chosen one marked, as an SVG."""
    total, budgets = policy.num_inference_steps, policy.budgets()
    psnr = {row.budget: row.psnr for row in policy.validation or () if row.kept}
    told = f"{budget} of {total} steps computed, {total / budget:.1f}x by steps alone"
    if budget in psnr:
        told += f", {psnr[budget]:.1f} dB measured"
    name = policy.model.id or policy.model.transformer
    title = f"<div><b>{escape(name)}</b>, {total} steps, {policy.provenance}: {told}</div>"
    errors = {b: max(policy.plans[str(b)].errors, default=math.nan) for b in budgets}
    points = {b: math.log10(e) for b, e in errors.items() if e > 0}
    if len(points) < 2:
        return f'{title}<div class="va-muted">this policy states no errors to draw</div>'
    low, high = min(points.values()), max(points.values())
    wide, tall, left, base = 560, 190, 70, 150

    def at(b: int, error: float) -> tuple[float, float]:
        x = left + (wide - left - 15) * (b - budgets[0]) / max(1, budgets[-1] - budgets[0])
        return x, 15 + (base - 20) * (high - error) / max(1e-9, high - low)

    line = " ".join("{:.1f},{:.1f}".format(*at(b, e)) for b, e in points.items())
    mark = ""
    if budget in points:
        x, y = at(budget, points[budget])
        mark = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="15" y2="{base}" stroke="currentColor" '
            f'stroke-dasharray="3 3" opacity=".5"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5" '
            'fill="#2f6fdb"/>'
        )
    ticks = "".join(
        f'<text x="{at(b, low)[0]:.0f}" y="{base + 16}" text-anchor="middle">{b}</text>'
        for b in sorted({budgets[0], budgets[len(budgets) // 2], budgets[-1]})
    )
    scale = "".join(
        f'<text x="{left - 6}" y="{at(budgets[0], value)[1] + 4:.0f}" text-anchor="end">'
        f"{10**value:.2g}</text>"
        for value in (low, high)
    )
    return (
        f'{title}<svg class="va-curve" viewBox="0 0 {wide} {tall}" role="img" '
        f'aria-label="error against computed steps" font-size="12" fill="currentColor">'
        f'<line x1="{left}" x2="{wide - 10}" y1="{base}" y2="{base}" stroke="currentColor" '
        f'opacity=".4"/><polyline points="{line}" fill="none" stroke="#2f6fdb" '
        f'stroke-width="2"/>{mark}{ticks}{scale}'
        f'<text x="{(left + wide) / 2:.0f}" y="{tall - 6}" text-anchor="middle">computed steps '
        f"(error of the worst segment, log scale)</text></svg>"
    )
