"""Render the examples that the demo page shows before any model is loaded: assets/demo/.

    python assets/render_demo.py

Each one is a run of the page itself, so its files and numbers are what the page would give. The
larger pictures, which the page only offers for runs of its own, are left out.
"""

import shutil
import threading
from pathlib import Path

from vidaccel.clips.load import load_pipeline
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Settings
from vidaccel.demo.worker import Worker

ROOT = Path(__file__).resolve().parent / "demo"
EXAMPLES = {
    # Shown in this order: by name, backwards.
    "c-falling": (
        "a magenta striped square moving down on a charcoal checkered background",
        "balanced",
    ),
    "b-rising": ("a cyan dotted square moving up on a maroon striped background", "quality"),
    "a-fast": ("a yellow checkered circle moving left on a navy dotted background", "fast"),
}

store, worker = RunStore(ROOT), Worker(load_pipeline, "tiny-wan")
shutil.rmtree(ROOT, ignore_errors=True)
for name, (prompt, acceleration) in EXAMPLES.items():
    settings = Settings(
        prompt=prompt,
        width=96,
        height=96,
        frames=17,
        steps=50,
        guidance=5.0,
        acceleration=acceleration,
    )
    worker.run(
        settings,
        on_progress=lambda **_: None,
        stop=threading.Event(),
        save=lambda result, clips, s=settings, n=name: store.save("", s, result, clips, n),
    )
    for extra in ("side-by-side.mp4", "contact-sheet.png"):
        (ROOT / name / extra).unlink()
    print(name, {k: v for k, v in store.load("", name).result.items() if k == "speedup"})
