"""One prompt to one clip, and the same prompt with and without acceleration."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, report, restore
from vidaccel.clips import metrics, scenes, video
from vidaccel.clips.embedded import embedded_model
from vidaccel.clips.step_events import steps_told
from vidaccel.clips.video import Clip, as_uint8
from vidaccel.errors import ModelError, PlanError


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        frames: uint8 [F, H, W, 3].
        seconds: of the whole call: text encoder, denoising, decoding.
        denoising_seconds: until the end of the last denoising step; None where the pipeline does
            not tell its steps.
        report: `vidaccel.report` of this generation as a dict; None when not accelerated.
    """

    frames: Clip = field(repr=False)
    seconds: float
    denoising_seconds: float | None
    report: dict[str, Any] | None


def default_device() -> str:
    """ "cuda" where there is a GPU, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Any:
    """Load a Diffusers pipeline.

    Args:
        model: a folder in Diffusers format or a hub id; None for the embedded model.
        device: where it runs; None for the GPU if there is one.
        dtype: of the weights; None for bfloat16 on a GPU and float32 elsewhere.
        offload: keep the parts that are not running in host memory (`enable_model_cpu_offload`).

    Raises:
        ModelError: nothing there, damaged files, or no such device.
    """
    from diffusers import DiffusionPipeline, __version__

    # Diffusers renamed the argument in 0.42 and took **kwargs before and after.
    dtype_argument = "dtype" if Version(__version__) >= Version("0.42") else "torch_dtype"
    try:
        target = torch.device(device or default_device())
    except RuntimeError as error:
        raise ModelError(f"no device is called {device!r}; try cpu or cuda") from error
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    source = str(embedded_model()) if model is None else model
    folder = Path(source).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is no Diffusers model: it has no model_index.json")
        source = str(folder)
    elif model is None or source.count("/") != 1 or source[0] in "./~":
        raise ModelError(f"no model folder at {folder}; pass a folder or a hub id (org/name)")
    try:
        pipe = DiffusionPipeline.from_pretrained(source, **{dtype_argument: dtype})
        if offload:
            pipe.enable_model_cpu_offload(device=target)
        else:
            pipe.to(target)
    # Every library below has exceptions of its own for a damaged file, an unknown id, no network
    # or no such device; none of them is about vidaccel, and the first line says which it is.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"cannot load {source} on {target}: {reason or repr(error)}") from error
    return pipe


def call_arguments(pipe: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """`wanted` without the Nones, held against what the pipeline's call takes.

    Raises:
        ModelError: the pipeline has no such option.
    """
    known = signature(type(pipe).__call__).parameters
    given = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ModelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    return given


def steps_of(pipe: Any, call: dict[str, Any]) -> int:
    """Number of denoising steps that a call of the pipeline asks for.

    Raises:
        PlanError: it is not a whole number of 1 or more.
    """
    default = signature(type(pipe).__call__).parameters["num_inference_steps"].default
    steps = call.get("num_inference_steps", default)
    if not isinstance(steps, int) or steps < 1:
        raise PlanError(f"num_inference_steps: found {steps!r}, expected a whole number >= 1")
    return steps


@contextmanager
def without_bar(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar turned off, and left as it was afterwards."""
    previous = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**previous, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**previous)


def generate(
    pipe: Any,
    call: dict[str, Any],
    *,
    seed: int = 0,
    label: str = "",
    progress: bool = True,
    on_step: Callable[[int, Any], None] | None = None,
) -> Run:
    """Run a pipeline once, as it is, accelerated or not.

    Args:
        pipe: the pipeline.
        call: its arguments; the generator, the output type and the step callback are set here.
        seed: of the generator, which lives on the CPU so that every device draws the same noise.
        label: shown left of the progress bar.
        progress: show a bar with step i/N and how many of them were reused.
        on_step: called with the index and the latents of each step that has ended; what it raises
            ends the run. `step_events` serves pipelines that do not tell their steps.
    """
    engines = list(engines_of(pipe).values())
    steps = steps_of(pipe, call)
    call = {**call, "generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
    ended: list[float] = []
    with tqdm(total=steps, desc=label, unit="step", disable=not progress) as bar:

        def on_step_end(step: int, latents: Any) -> None:
            reused = sum(engine.stats.steps_reused for engine in engines)
            bar.set_postfix(reused=reused, refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step, latents)

        def callback(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == steps - 1 and torch.cuda.is_available():
                torch.cuda.synchronize()
            ended.append(time.perf_counter())
            on_step_end(step, kwargs.get("latents"))
            return kwargs

        told = "callback_on_step_end" in signature(type(pipe).__call__).parameters
        if told:
            call["callback_on_step_end"] = callback
        with without_bar(pipe), nullcontext() if told else steps_told(pipe, on_step_end):
            started = time.perf_counter()
            frames = as_uint8(pipe(**call).frames[0])
            seconds = time.perf_counter() - started
    return Run(
        frames,
        seconds,
        ended[-1] - started if ended else None,
        report(pipe).to_dict() if engines else None,
    )


def compare(
    pipe: Any,
    call: dict[str, Any],
    *,
    seed: int = 0,
    progress: bool = True,
    **acceleration: Any,
) -> tuple[Run, Run, dict[str, Any]]:
    """Run a pipeline plain and accelerated on the same noise, after a warm-up of two steps.

    Leaves the pipeline accelerated.

    Args:
        pipe: the pipeline.
        call: arguments of its call.
        seed: of the noise.
        progress: show a bar for each run.
        acceleration: arguments of `accelerate`.

    Returns:
        The plain run, the accelerated run, and a dict of plain numbers: "steps", "steps_computed",
        "blocks_run", "seconds" and "denoising_seconds" of both, "speedup" (whole call and
        denoising), "metrics" (`clips.metrics.summary` of the accelerated clip against the plain
        one) and "adherence" (how both follow the prompt; None unless it is a scene caption).

    Raises:
        UnsupportedPipelineError, PlanError: as `accelerate` does, before anything runs.
    """
    accelerate(pipe, **acceleration)
    restore(pipe)
    warm_up = {**call, "num_inference_steps": 2}
    generate(pipe, warm_up, seed=seed, label="warm-up ", progress=progress)
    plain = generate(pipe, call, seed=seed, label="plain   ", progress=progress)
    accelerate(pipe, **acceleration)
    fast = generate(pipe, call, seed=seed, label="vidaccel", progress=progress)
    assert fast.report is not None
    parts = fast.report["transformers"]
    branches = [branch for part in parts for branch in part["branches"]]
    blocks = [sum(b[key] for b in branches) for key in ("blocks_without_vidaccel", "blocks_run")]
    timeline = "".join(part["timeline"] for part in parts)
    result = {
        "steps": len(timeline),
        "steps_computed": [len(timeline), timeline.count("C")],
        "blocks_run": blocks,
        "seconds": [plain.seconds, fast.seconds],
        "denoising_seconds": [plain.denoising_seconds, fast.denoising_seconds],
        "speedup": plain.seconds / fast.seconds,
        "denoising_speedup": plain.denoising_seconds / fast.denoising_seconds
        if plain.denoising_seconds and fast.denoising_seconds
        else None,
        "metrics": metrics.summary(plain.frames, fast.frames),
        "adherence": [adherence_of(run.frames, call.get("prompt")) for run in (plain, fast)],
        "report": fast.report,
    }
    return plain, fast, result


def adherence_of(frames: Clip, prompt: Any) -> dict[str, bool] | None:
    """How a clip follows a scene caption; None when it cannot be read from the pixels."""
    try:
        return vars(scenes.adherence(frames, prompt))
    except (AttributeError, ValueError):
        return None


def write_comparison(out: Path, clips: dict[str, Clip], fps: int) -> list[Path]:
    """Write what shows a difference, beside `out`.

    Args:
        out: the accelerated clip, .mp4.
        clips: label -> clip, the plain one first and the accelerated one second.
        fps: of the files.

    Returns:
        The files: `out`, and -plain.mp4, -side-by-side.mp4 and -contact-sheet.png.
    """
    plain, fast = clips.values()
    beside = {
        out: fast,
        out.with_stem(f"{out.stem}-plain"): plain,
        out.with_stem(f"{out.stem}-side-by-side"): video.side_by_side(clips),
    }
    for path, frames in beside.items():
        video.write_video(path, frames, fps)
    sheet = out.with_name(f"{out.stem}-contact-sheet.png")
    video.write_image(sheet, video.contact_sheet(clips))
    return [*beside, sheet]


def comparison_table(result: dict[str, Any]) -> str:
    """What `compare` found, for people: a row per measure, plain beside accelerated."""
    measured = result["metrics"]

    def seconds(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value:.2f} s" for value in values]

    def metric(name: str, form: str) -> str:
        return "not available" if measured[name] is None else format(measured[name], form)

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
        ["PSNR", "", f"{metric('psnr', '.1f')} dB"],
        ["SSIM", "", metric("ssim", ".3f")],
        ["LPIPS", "", metric("lpips", ".3f")],
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
    lines += [f"policy  {result['report']['transformers'][0]['policy']}"]
    lines += [f"{name}: {why}" for name, why in measured["unavailable"].items()]
    return "\n".join(lines)
