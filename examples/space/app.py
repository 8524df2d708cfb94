"""The demo page as a Hugging Face Space: the embedded model, on a CPU.

Where the environment names a model, as in VIDACCEL_MODEL=Wan-AI/Wan2.1-T2V-1.3B-Diffusers, that one
is used; it needs a GPU. The Space tells Gradio its address in the environment too.
"""

import os
from pathlib import Path

from vidaccel.demo import serve

serve(
    os.environ.get("VIDACCEL_MODEL"),
    queue_size=int(os.environ.get("VIDACCEL_QUEUE", "16")),
    out=Path(os.environ.get("VIDACCEL_OUT", "runs")),
)
