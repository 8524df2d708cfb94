"""tiny-wan, the text-to-video model that comes with vidaccel, and what it is run with."""

from importlib.resources import files
from pathlib import Path

# What it is run with when nothing else is asked for.
EMBEDDED_PROMPT = "a magenta striped square moving down on a charcoal checkered background"
EMBEDDED_CALL = {
    "height": 96,
    "width": 96,
    "num_frames": 17,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
}


def embedded_model() -> Path:
    """The folder of tiny-wan, in Diffusers format."""
    return Path(str(files("vidaccel.assets").joinpath("tiny-wan")))
