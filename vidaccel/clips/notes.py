"""Notes for readers of the numbers of a clip, a sentence each."""

from typing import Any

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
    each = next((getattr(pipe, name) for name in _FRAMES_EACH if hasattr(pipe, name)), None)
    default = getattr(parameters_of(pipe).get("num_frames"), "default", None)
    asked = call.get("num_frames")
    if not all(isinstance(value, int) and value > 0 for value in (each, default, asked)):
        return []
    beyond = (asked - 1) % each
    if not beyond or (default - 1) % each:
        return []
    low = asked - beyond
    return [
        f"{type(pipe).__name__} makes a multiple of {each} frames, and one more: of the {asked} "
        f"asked for it makes {low} or {low + each}"
    ]


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
