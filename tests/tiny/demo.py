"""Small runs of the demo's queue, and waiting for what happens in another thread or process."""

import time
from collections.abc import Callable
from typing import Any

from vidaccel.demo.job_queue import Job, JobQueue, Progress
from vidaccel.demo.run_store import SavedRun
from vidaccel.demo.settings import Settings

PATIENCE = 300.0  # seconds; only reached when something is broken

PROMPT = "a red striped circle moving right on a navy dotted background"
SMALL = {"prompt": PROMPT, "width": 48, "height": 48, "frames": 5, "steps": 6, "guidance": 5.0}
ME, YOU = "1" * 32, "2" * 32


def settings(**fields: Any) -> Settings:
    """Return settings of a small run that computes every second step."""
    return Settings.of(SMALL | {"acceleration": "custom", "policy": "every 2"} | fields)


def progress_of(queue: JobQueue, job: Job) -> list[Progress]:
    """Wait for the end of a job and return its progress, as often as it was seen to change."""
    seen = [queue.look(job)]

    def ended() -> bool:
        progress = queue.look(job)
        if progress is not seen[-1]:
            seen.append(progress)
        return seen[-1].final

    until(ended)
    return seen


def saved_run(queue: JobQueue, owner: str = ME, **fields: Any) -> SavedRun:
    """Run small settings and return what was saved."""
    progress = progress_of(queue, queue.submit(owner, settings(**fields)))[-1]
    assert progress.state == "done", progress.message
    assert progress.saved is not None
    return progress.saved


def until(condition: Callable[[], Any], poll: float = 0.005) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(poll)
