"""One command for a GPU: everything measured in one short sitting.

Parts run one after another, the most valuable first, each with a share of the time; what a part
leaves goes to those after it. Every result is on disk before the next item begins, so a run that
is killed has lost one item, and the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidaccel.bench.gpu_device import gpu_state
from vidaccel.bench.gpu_items import Sizes
from vidaccel.bench.gpu_summary import summary_of
from vidaccel.bench.gpu_worker import BROKEN, PARTS, PartRecord, folder_of
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.shards import ShardFolder

# Shares of the time, by what a sitting is for; "tune" runs where it is asked for.
WEIGHTS = {
    "kernels": 0.30,
    "attention": 0.25,
    "models": 0.25,
    "precision": 0.12,
    "train": 0.08,
    "tune": 0.30,
}
DEFAULT_PARTS = ("kernels", "attention", "models", "precision", "train")
# In the place of an item, where a process ends before the first.
_START = "start of the process"
_GRACE_S = 15  # after its share a process is ended; starting another takes about as long


def gpu(
    parts: Sequence[str] = DEFAULT_PARTS,
    *,
    minutes: float = 8.0,
    out: Path,
    dry: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything on a CUDA GPU, or go through it with tiny sizes on a CPU.

    Args:
        parts: names of PARTS, in the order in which they run.
        minutes: bound of the whole run.
        out: folder of the results: a JSON file per part, and summary.json. A run that was stopped
            goes on there.
        dry: tiny sizes on the CPU, the kernels in Triton's interpreter.
        log: takes a line of progress.

    Returns:
        What summary.json holds: "parts", "targets", "environment", "gpu".

    Raises:
        BenchError: there is no GPU, a part is unknown, or the folder is that of another run.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise BenchError(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not parts:
        raise BenchError(f"no part is named; there are {', '.join(PARTS)}")
    sizes = Sizes(dry=dry)
    if not dry:
        _require_gpu()
    folder = folder_of(out, sizes)
    run = f"{time.time():.3f}"
    end = time.time() + 60 * minutes
    try:
        for place, part in enumerate(parts):
            weights = [WEIGHTS[name] for name in parts[place:]]
            share = max(end - time.time(), 0.0) * weights[0] / sum(weights)
            _run_part(folder, out, part, run, time.time() + share, dry, log)
    finally:
        state = None if dry else gpu_state()
        found = {name: folder.read(name, dict) for name in PARTS}
        known = {name: data["items"] for name, data in found.items() if data is not None}
        summary = summary_of(known) | {
            "dry": dry,
            "environment": environment(),
            "gpu": state,
        }
        folder.write("summary", summary)
    return summary


def _require_gpu() -> None:
    """Refuse to go on without a CUDA GPU that the kernels run on."""
    import torch

    from vidaccel.kernels.common import why_no_kernels

    if not torch.cuda.is_available():
        raise BenchError(
            "bench gpu measures on a CUDA GPU, and there is none here; --dry goes through all of "
            "it on the CPU"
        )
    if reason := why_no_kernels(torch.device("cuda")):
        raise BenchError(reason)


def _run_part(
    folder: ShardFolder,
    out: Path,
    part: str,
    run: str,
    deadline: float,
    dry: bool,
    log: Callable[[str], object],
) -> None:
    """Run a part in processes of its own, one after another where one of them breaks."""
    command = [sys.executable, "-m", "vidaccel.bench.gpu_worker", part, str(out), run]
    command += [repr(deadline), *(["--dry"] if dry else [])]
    PartRecord(folder, part, run).forget(_START)
    variables = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    while True:
        # A dry run ends when it is through: how fast a CPU is says nothing.
        limit = None if dry else max(deadline - time.time(), 0.0) + _GRACE_S
        code = _run_process(command, variables, limit)
        if code == 0:
            return
        reason = _told(code)
        record = PartRecord(folder, part, run)
        stopped = record.running()
        for name in stopped:
            record.note(name, "left" if code is None else "failed", error=reason)
        log(f"{part}: {reason}" + (f" during {', '.join(stopped)}" if stopped else ""))
        if code is None:
            return
        if code != BROKEN and not stopped:
            # Without an item to blame another process would end the same way.
            record.note(_START, "failed", error=reason)
            return


def _run_process(
    command: Sequence[str], variables: dict[str, str], limit: float | None
) -> int | None:
    """Return the exit code of a process; None where it was ended at its limit in seconds."""
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    with _ended(process):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process and those that it has started (compilers) on the way out, however that is."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _told(code: int | None) -> str:
    """Tell in words how a process ended."""
    if code is None:
        return "its time was up"
    if code == BROKEN:
        return "the device was left unusable; another process goes on"
    return f"the process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
