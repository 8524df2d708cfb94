"""One prompt to one clip."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import engines_of, report
from vidaccel.clips.calling import first_clip, outcome_of, parameters_of, without_bar
from vidaccel.clips.load import steps_of
from vidaccel.clips.step_events import follow_steps
from vidaccel.clips.stopwatch import Stopwatch
from vidaccel.clips.video import Clip, as_uint8


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        frames: the clip, uint8 [F, H, W, 3].
        seconds: duration of the whole call: text encoder, denoising, decoding.
        denoising_seconds: duration until the end of the last denoising step; None where the
            pipeline does not call back at the end of its steps.
        report: `vidaccel.report` of this generation as a dict; None when not accelerated.
        cpu_seconds: CPU time of this process for the call, all threads together; None: not taken.
        other_cpu_seconds: CPU time of all other programs meanwhile; None where it is not known.
    """

    frames: Clip = field(repr=False)
    seconds: float
    denoising_seconds: float | None
    report: dict[str, Any] | None
    cpu_seconds: float | None = None
    other_cpu_seconds: float | None = None


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
        call: arguments of its call; generator, output type and step callback are set here.
        seed: seed of the generator, which lives on the CPU so that every device draws the same
            noise.
        label: text left of the progress bar.
        progress: show a bar with step i/N and how many of them were reused.
        on_step: called with the index and the latents of each step that has ended; what it raises
            ends the run. `follow_steps` serves pipelines without a step callback.

    Raises:
        PlanError: the call asks for no number of steps that there can be.
    """
    engines = list(engines_of(pipe).values())
    steps = steps_of(pipe, call)
    call = {**call, "generator": torch.Generator("cpu").manual_seed(seed)}
    step_ends: list[float] = []
    with tqdm(total=steps, desc=label, unit="step", disable=not progress) as bar:

        def on_step_end(step: int, latents: Any) -> None:
            """Move the bar on, then call `on_step`."""
            reused = sum(engine.stats.steps_reused for engine in engines)
            bar.set_postfix(reused=reused, refresh=False)
            bar.update()
            if on_step is not None:
                on_step(step, latents)

        def callback(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            """Take the time; the form is that of Diffusers' `callback_on_step_end`."""
            latents = kwargs.get("latents")
            if step == steps - 1:
                _wait_for(getattr(latents, "device", pipe.device))
            step_ends.append(time.perf_counter())
            on_step_end(step, latents)
            return kwargs

        calls_back = "callback_on_step_end" in parameters_of(pipe)
        if calls_back:
            call["callback_on_step_end"] = callback
        following = nullcontext() if calls_back else follow_steps(pipe, on_step_end)
        with without_bar(pipe), following:
            watch = Stopwatch()
            frames = as_uint8(first_clip(outcome_of(pipe, call, "np")))
            times = watch.read()
    return Run(
        frames,
        times.wall,
        step_ends[-1] - watch.started if step_ends else None,
        report(pipe).to_dict() if engines else None,
        times.cpu,
        times.others,
    )


def _wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; another one may be current."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latents_of(pipe: Any, call: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Run a pipeline once without decoding, without its progress bar, and return the latents.

    Args:
        pipe: the pipeline.
        call: arguments of its call; generator and output type are set here.
        seed: seed of the generator, which lives on the CPU so that every device draws the same
            noise.
    """
    call = {**call, "generator": torch.Generator("cpu").manual_seed(seed)}
    with without_bar(pipe):
        latents: torch.Tensor = outcome_of(pipe, call, "latent")
    return latents
