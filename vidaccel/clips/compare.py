"""One prompt with and without acceleration: both clips, the numbers, and files that show them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vidaccel.api import accelerate, restore
from vidaccel.clips import scenes, video
from vidaccel.clips.fidelity import MEASURES, in_words, sheet_of, summary, why_unavailable
from vidaccel.clips.generate import Run, generate
from vidaccel.clips.lesson import learning_from
from vidaccel.clips.measurement import learned_plan
from vidaccel.clips.notes import (
    COMPRESSION,
    clocks_disagree,
    cpu_speedup,
    notes_on,
    notes_on_times,
    ran_on_cpu,
)
from vidaccel.clips.video import Clip
from vidaccel.engine.stats import StepKind


def compare(
    pipe: Any,
    call: dict[str, Any],
    *,
    seed: int = 0,
    progress: bool = True,
    warm_up: bool = True,
    fps: float = 16.0,
    keep: Callable[[Run, Run], None] | None = None,
    **acceleration: Any,
) -> tuple[Run, Run, dict[str, Any]]:
    """Run a pipeline plain and accelerated on the same noise.

    Leaves the pipeline accelerated.

    Args:
        pipe: the pipeline.
        call: arguments of its call.
        seed: seed of the noise.
        progress: show a bar for each run.
        warm_up: run two steps first, which the first run of a process needs to be timed.
        fps: frames per second at which the clips are shown.
        keep: called with both runs before they are measured, to have the clips written by then.
        acceleration: arguments of `accelerate`; a `Resolver` as policy is read no second time.

    Returns:
        The plain run, the accelerated run, and a dict for JSON: "steps", "steps_computed",
        "blocks_run", "seconds", "denoising_seconds", "cpu_seconds" (of this process, for the whole
        call) and "other_cpu_seconds" (of all other programs meanwhile) of both, "speedup" (whole
        call, denoising and CPU time), "clocks_disagree" (on a CPU: the clock's speedup is not that
        of CPU time), "metrics" (`clips.fidelity.summary` of the accelerated clip against the plain
        one), "adherence" (`adherence_of` both), "notes" (what a reader of the numbers should
        know) and "report" (that of the accelerated run).

    Raises:
        UnsupportedPipelineError, PlanError: as `accelerate` does, before anything runs.
    """
    accelerate(pipe, **acceleration)
    restore(pipe)
    if warm_up:
        short = {**call, "num_inference_steps": 2}
        generate(pipe, short, seed=seed, label="warm-up ", progress=progress)
    with learning_from(pipe, call, acceleration.get("policy", "auto")) as lesson:
        plain = generate(pipe, call, seed=seed, label="plain   ", progress=progress)
    plain, learned = lesson.without(plain)
    accelerate(pipe, **acceleration)
    fast = generate(pipe, call, seed=seed, label="vidaccel", progress=progress)
    assert fast.report is not None
    if keep is not None:
        keep(plain, fast)
    on_cpu = ran_on_cpu(pipe)
    timing = notes_on_times({"plain": plain, "accelerated": fast}, on_cpu=on_cpu)
    parts = fast.report["transformers"]
    branches = [branch for part in parts for branch in part["branches"]]
    blocks = [sum(b[key] for b in branches) for key in ("blocks_without_vidaccel", "blocks_run")]
    timeline = "".join(part["timeline"] for part in parts)
    measured = summary(plain.frames, fast.frames, fps=fps)
    speedup = plain.seconds / fast.seconds
    ran, kept = learned_plan(pipe), []
    if ran is not None:
        psnr, ssim = measured["psnr"], measured["ssim"]
        kept = ran.add(call, seed, psnr=psnr, ssim=ssim, speedup=speedup)
    result = {
        "steps": len(timeline),
        "steps_computed": [len(timeline), timeline.count(StepKind.COMPUTED)],
        "blocks_run": blocks,
        "seconds": [plain.seconds, fast.seconds],
        "denoising_seconds": [plain.denoising_seconds, fast.denoising_seconds],
        "speedup": speedup,
        "denoising_speedup": plain.denoising_seconds / fast.denoising_seconds
        if plain.denoising_seconds and fast.denoising_seconds
        else None,
        "cpu_seconds": [plain.cpu_seconds, fast.cpu_seconds],
        "cpu_speedup": cpu_speedup(plain, fast),
        "other_cpu_seconds": [plain.other_cpu_seconds, fast.other_cpu_seconds],
        "clocks_disagree": on_cpu and clocks_disagree(plain, fast),
        "metrics": measured,
        "adherence": [adherence_of(run.frames, call.get("prompt")) for run in (plain, fast)],
        "notes": [*timing, *learned, *kept, *notes_on(pipe, call, fast), COMPRESSION],
        "report": fast.report,
    }
    return plain, fast, result


def adherence_of(frames: Clip, prompt: Any) -> dict[str, bool] | None:
    """Return which parts of a scene caption a clip shows; None for other prompts and sizes."""
    try:
        return vars(scenes.adherence(frames, prompt))
    except (AttributeError, ValueError):
        return None


def write_comparison(out: Path, clips: dict[str, Clip], fps: int) -> list[Path]:
    """Write both clips, alone and beside each other, and a contact sheet.

    Args:
        out: file of the accelerated clip, .mp4; the others go beside it.
        clips: label -> clip, the plain one first and the accelerated one second.
        fps: frames per second of the files.

    Returns:
        The files: `out`, and -plain.mp4, -side-by-side.mp4 and -contact-sheet.png.
    """
    alone, both, sheet = files_beside(out)
    plain, fast = clips.values()
    written = {out: fast, alone: plain, both: video.side_by_side(clips)}
    for path, frames in written.items():
        video.write_video(path, frames, fps)
    video.write_image(sheet, video.contact_sheet(clips))
    return [*written, sheet]


def files_beside(out: Path) -> list[Path]:
    """Return the files that a comparison writes beside the accelerated clip."""
    plain, both = (out.with_stem(f"{out.stem}-{name}") for name in ("plain", "side-by-side"))
    return [plain, both, sheet_of(out)]


def attention_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return rows of a table: the attention, plain beside accelerated, and its density."""
    parts = [part["attention"] for part in report["transformers"] if part["attention"]]
    densities = [part["density_with_dense"] for part in parts]
    sparse = [density for density in densities if density is not None]
    if not sparse:
        return [["attention", "dense", "dense"]]
    shown = " and ".join(f"{density:.1%}" for density in sparse)
    return [["attention", "dense", "sparse"], ["  density", "100.0%", shown]]


def comparison_table(result: dict[str, Any]) -> str:
    """Return the result of `compare` for people: a row per measure, plain beside accelerated."""
    measured = result["metrics"]

    def seconds(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value:.2f} s" for value in values]

    def metric(name: str) -> str:
        if name in measured["unavailable"]:
            return "not available"
        told = in_words(name, measured[name])
        worst = in_words(name, measured["worst"][name]["value"]).partition(" ")[0]
        return told if told == "identical" else f"{told} ({worst})"

    def speedup(value: float | None) -> list[str]:
        return ["1.00x", "-" if value is None else f"{value:.2f}x"]

    rows = [
        ["", "plain", "vidaccel"],
        ["steps computed", *(f"{n} of {result['steps']}" for n in result["steps_computed"])],
        ["blocks run", *map(str, result["blocks_run"])],
        ["denoising", *seconds(result["denoising_seconds"])],
        ["  speedup", *speedup(result["denoising_speedup"])],
        ["whole call", *seconds(result["seconds"])],
        ["  speedup", *speedup(result["speedup"])],
    ]
    if result["clocks_disagree"]:
        rows += [
            ["CPU time", *seconds(result["cpu_seconds"])],
            ["  speedup", *speedup(result["cpu_speedup"])],
        ]
    rows += [
        *attention_rows(result["report"]),
        *([f"{measure.title} (worst frame)", "", metric(n)] for n, measure in MEASURES.items()),
        ["flicker", *(f"{value:.2f}" for value in measured["flicker_of"])],
    ]
    plain, fast = result["adherence"]
    if plain is not None and fast is not None:
        rows += [
            [f"shows the {part}", *("yes" if run[part] else "no" for run in (plain, fast))]
            for part in plain
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{name.ljust(widths[0])}  {a.rjust(widths[1])}  {b.rjust(widths[2])}"
        for name, a, b in rows
    ]
    lines[1:1] = ["-" * len(lines[0])]
    for part in result["report"]["transformers"]:
        lines += [f"policy: {part['policy']}"]
        lines += [f"attention: {part['attention']['settings']}"] if part["attention"] else []
        lines += [f"note: {note}" for note in part["notes"]]
    lines += [f"note: {line}" for line in why_unavailable(measured["unavailable"])]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)
