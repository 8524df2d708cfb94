"""Notes for readers of the numbers of a clip, a sentence each."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from vidaccel.clips.calling import parameters_of
from vidaccel.clips.generate import Run
from vidaccel.engine.stats import StepKind

COMPRESSION = (
    "measured on the frames as they were generated; vidaccel compare of the .mp4 files counts what "
    "their compression has lost, too"
)

# What pipelines call the number of frames that one frame of latents stands for.
_FRAMES_EACH = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def notes_before(pipe: Any, call: dict[str, Any]) -> list[str]:
    """Return what is to be said before a run.

    Args:
        pipe: the pipeline.
        call: the arguments of its call.
    """
    # VAEs with a first frame of its own; one for which even the default would be rounded is none.
    each: Any = next((getattr(pipe, name) for name in _FRAMES_EACH if hasattr(pipe, name)), None)
    default: Any = getattr(parameters_of(pipe).get("num_frames"), "default", None)
    asked: Any = call.get("num_frames")
    for value in (each, default, asked):
        if not isinstance(value, int) or value < 1:
            return []
    beyond = (asked - 1) % each
    if not beyond or (default - 1) % each:
        return []
    low = asked - beyond
    return [
        f"{type(pipe).__name__} makes a multiple of {each} frames, and one more: of the {asked} "
        f"asked for it makes {low} or {low + each}"
    ]


# The clock and CPU time may differ so much in the speedup that they tell.
CLOCKS_BOUND = 0.10
# The machine was busy where other programs took more than this share of the CPU time it had.
BUSY_BOUND = 0.10


def notes_on(pipe: Any, call: dict[str, Any], run: Run) -> list[str]:
    """Return what is to be said of one accelerated run.

    Args:
        pipe: the pipeline.
        call: the arguments of its call.
        run: what came of it.
    """
    parts = (run.report or {"transformers": []})["transformers"]
    notes = list(_other_size(pipe, call, run))
    timeline = "".join(part["timeline"] for part in parts)
    told = any(note.startswith("nothing was reused") for part in parts for note in part["notes"])
    if not told and timeline and timeline.count(StepKind.COMPUTED) == len(timeline):
        notes.append("nothing was reused: every step was computed, which takes no less time")
    sparse = any(part["attention"] and part["attention"]["sparse_calls"] for part in parts)
    if sparse and str(pipe.device).startswith("cpu"):
        notes.append(
            "sparse attention runs as its PyTorch reference on a CPU, where it costs time; it "
            "saves some on a GPU"
        )
    return notes


def _other_size(pipe: Any, call: dict[str, Any], run: Run) -> list[str]:
    """Return a note where the clip has not the size that was asked for."""
    frames, height, width, _ = run.frames.shape
    made = {"num_frames": frames, "height": height, "width": width}
    differing = {
        name: (call[name], value)
        for name, value in made.items()
        if call.get(name) is not None and call[name] != value
    }
    name = type(pipe).__name__
    words = {"num_frames": "frames", "height": "rows", "width": "columns"}
    return [
        f"{name} made {got} {words[key]}, not {asked}: it rounds to a number that its VAE can make"
        for key, (asked, got) in differing.items()
    ]


def ran_on_cpu(pipe: Any) -> bool:
    """Tell whether a pipeline runs on a CPU: offloaded parts wait there for a GPU, where one is."""
    return str(pipe.device).startswith("cpu") and not torch.cuda.is_available()


def cpu_speedup(plain: Run, fast: Run) -> float | None:
    """Return the speedup by CPU time of this process; None where that was not taken."""
    if not plain.cpu_seconds or not fast.cpu_seconds:
        return None
    return plain.cpu_seconds / fast.cpu_seconds


def clocks_disagree(plain: Run, fast: Run) -> bool:
    """Tell whether the speedup by the clock differs from that by CPU time by over `CLOCKS_BOUND`.

    It means something for runs on a CPU alone: while a GPU works, CPU time stands still.
    """
    by_cpu = cpu_speedup(plain, fast)
    return by_cpu is not None and abs(plain.seconds / fast.seconds / by_cpu - 1) > CLOCKS_BOUND


def notes_on_times(runs: Mapping[str, Run], *, on_cpu: bool, cores: int | None = None) -> list[str]:
    """Return what is to be said of the seconds of two runs, where they are not to be trusted.

    Args:
        runs: name -> run, the plain one first and the accelerated one second.
        on_cpu: the pipeline ran on a CPU.
        cores: those of the machine; None to count them.
    """
    cores = cores or os.cpu_count() or 1
    plain, fast = runs.values()
    notes = []
    if on_cpu and clocks_disagree(plain, fast):
        notes.append(
            f"by CPU time the speedup is {cpu_speedup(plain, fast):.2f}x, by the clock "
            f"{plain.seconds / fast.seconds:.2f}x: they differ by more than {CLOCKS_BOUND:.0%}, so "
            "trust the CPU time, which other programs hardly change"
        )
    others = {
        name: run.other_cpu_seconds / run.seconds
        for name, run in runs.items()
        if run.other_cpu_seconds is not None and run.seconds
    }
    if any(used > BUSY_BOUND * cores for used in others.values()):
        each = " and ".join(f"{used:.1f} during the {name} run" for name, used in others.items())
        notes.append(
            f"the machine was busy: of its {cores} cores other programs used {each}, on average; "
            "measure again when it is idle"
        )
    return notes
