"""The server of the page: the model behind it, its limits, and its address."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vidaccel.clips.embedded import EMBEDDED_PROMPT, embedded_model
from vidaccel.clips.load import load_pipeline
from vidaccel.clips.video import check_writable
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.page import create_demo, look
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Limits, Settings
from vidaccel.demo.worker import Worker
from vidaccel.errors import OutputError

# The size at which two CPU cores make a clip while one looks at the page.
EMBEDDED_FIRST: dict[str, Any] = {
    "prompt": EMBEDDED_PROMPT,
    "width": 64,
    "height": 64,
    "frames": 9,
    "steps": 50,
    "guidance": 5.0,
}
EMBEDDED_LIMITS = Limits(width=128, height=128, frames=33, steps=100)
EMBEDDED_SIZES = ["64x64", "96x96"]
SIZES = ["832x480", "480x832", "1280x720", "720x1280"]


def serve(
    model: str | None = None,
    *,
    load: Callable[[], Any] | None = None,
    defaults: Settings | None = None,
    limits: Limits | None = None,
    queue_size: int = 8,
    out: Path = Path("out/demo"),
    **options: Any,
) -> None:
    """Serve the page until it is interrupted, then end what runs.

    Args:
        model: a folder or hub id; None for the embedded model.
        load: gives its pipeline; None to load it as `vidaccel.clips.load.load_pipeline` does.
        defaults: what the controls show at first.
        limits: the largest run.
        queue_size: number of runs that may wait.
        out: folder of the runs. Of all files, only these, the examples and what was uploaded can
            be read, and of the runs only one's own: their folders have names nobody can guess.
        options: arguments of `gr.Blocks.launch`, such as server_name, server_port and share.

    Raises:
        OutputError: the port is taken, or `out` cannot be written.
    """
    check_writable(out / "check.mp4")
    embedded = model is None
    worker = Worker(load or partial(load_pipeline, model), model or "tiny-wan")
    limits = limits or (EMBEDDED_LIMITS if embedded else Limits())
    examples = RunStore(embedded_model().parent / "demo")
    queue = JobQueue(worker, RunStore(out), limits, queue_size)
    sizes = EMBEDDED_SIZES if embedded else SIZES
    # Shown from where they are; Gradio would copy each of them into a folder of its own.
    gr.set_static_paths([queue.store.root, examples.root])
    try:
        page = create_demo(queue, defaults or first_settings(embedded), sizes, examples)
        page.launch(
            **look(),
            max_file_size="64mb",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            **options,
        )
    except OSError as error:
        raise OutputError(f"cannot serve the page: {error}") from error
    finally:
        queue.close()


def first_settings(embedded: bool, **given: Any) -> Settings:
    """Return what the controls show at first.

    Args:
        embedded: True for the embedded model; for others, what is not given is left to the model.
        given: fields of `Settings`; those that are None are not given.
    """
    first = EMBEDDED_FIRST if embedded else {"prompt": "a cat surfing a wave"}
    return Settings.of(first | {name: value for name, value in given.items() if value is not None})
