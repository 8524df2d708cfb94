"""tiny-wan, the text-to-video model that comes with vidaccel, and the call that it is made for."""

from importlib.resources import files
from pathlib import Path
from typing import Any

# The prompt and the arguments where nothing else is asked for.
EMBEDDED_PROMPT = "a magenta striped square moving down on a charcoal checkered background"
EMBEDDED_CALL: dict[str, Any] = {
    "height": 96,
    "width": 96,
    "num_frames": 17,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
}


def embedded_model() -> Path:
    """Return the folder of tiny-wan, in Diffusers format."""
    return Path(str(files("vidaccel.assets").joinpath("tiny-wan")))
