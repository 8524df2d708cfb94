"""The device of a bench: how calls are timed, counted and captured there, and its state."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from vidaccel.errors import VidaccelError

# What the host calls when it waits for the device or reads from it.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy")


def _sum(calls: Mapping[str, int], names: tuple[str, ...]) -> int:
    """Return how often something was called whose name begins with one of these."""
    return sum(count for name, count in calls.items() if name.startswith(names))


@lru_cache
def _waits_of_a_profile() -> int:
    """Return how often the host waits in a profile of nothing."""
    calls, _ = Device()._profiled(lambda: None)
    return _sum(calls, _WAITS)


def require_gpu() -> None:
    """Refuse to go on without a CUDA GPU and Triton.

    Raises:
        VidaccelError: one of them is not there.
    """
    if not torch.cuda.is_available():
        raise VidaccelError(
            "bench kernels measures on a CUDA GPU, and there is none here; "
            "vidaccel bench codegen needs none"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise VidaccelError("bench kernels needs Triton: pip install triton") from error


@dataclass(frozen=True)
class Counts:
    """The host's calls during a function, and the time of each kernel.

    Attributes:
        launches: kernels and copies that the host started.
        waits: times that the host waited for the device.
        kernels: name of each kernel -> its microseconds, all of its runs together.
    """

    launches: int
    waits: int
    kernels: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a result file keeps them, the longest kernel first."""
        ranked = sorted(self.kernels.items(), key=lambda each: -each[1])
        return {"launches": self.launches, "waits": self.waits, "kernels_us": dict(ranked)}


@dataclass(frozen=True)
class Device:
    """A CUDA GPU; or the CPU, where the same calls run so that they can be tested.

    Attributes:
        name: "cuda" or "cpu".
    """

    name: str = "cuda"

    @property
    def on_gpu(self) -> bool:
        """Tell whether it is a GPU."""
        return self.name == "cuda"

    def wait(self) -> None:
        """Wait until all work is done; raises what a kernel has done wrong."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], repeat_ms: int = 300) -> float:
        """Return the median time of a call, by the device's own clock, after a warm-up.

        Args:
            run: the call; it is repeated.
            repeat_ms: how long it is repeated, in milliseconds; on a CPU it runs once.
        """
        if self.on_gpu:
            from triton.testing import do_bench

            return float(do_bench(run, warmup=50, rep=repeat_ms, return_mode="median"))
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)

    def counted(self, run: Callable[[], object]) -> Counts:
        """Count what the host does during a call, and time each kernel.

        The call is not warmed up here. A profiler makes the host slower, so that no other time is
        taken meanwhile.
        """
        calls, kernels = self._profiled(run)
        # A profile waits for the device itself when it ends.
        waits = _sum(calls, _WAITS) - (_waits_of_a_profile() if self.on_gpu else 0)
        return Counts(_sum(calls, _LAUNCHES), max(waits, 0), dict(kernels))

    def _profiled(self, run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
        """Return how often the host called what, and the microseconds of each kernel."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU] + ([activity.CUDA] if self.on_gpu else [])
        self.wait()
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self.wait()
        calls: Counter[str] = Counter()
        kernels: Counter[str] = Counter()
        for event in profile.key_averages():
            if str(event.device_type).endswith("CUDA"):
                kernels[event.key] += event.self_device_time_total
            else:
                calls[event.key] += event.count
        return calls, kernels

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Have torch raise where the host would wait for the device."""
        if not self.on_gpu:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Return the most memory that a call takes beyond what was taken; None on a CPU."""
        if not self.on_gpu:
            run()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return int(torch.cuda.max_memory_allocated() - before)

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """Return a function that repeats a call as a CUDA graph; on a CPU the call itself."""
        if not self.on_gpu:
            return run
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def free_bytes(self) -> int:
        """Return how much memory is free, after what torch holds back is released."""
        if not self.on_gpu:
            return 2**30
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def peak_rate(self, bits: int = 16) -> float | None:
        """Return the datasheet's dense operations per second of the matrix units, where known.

        Args:
            bits: 16 for floating point, 8 for whole numbers.
        """
        if not self.on_gpu:
            return None
        card = torch.cuda.get_device_name()
        rate = next((value for part, value in _PEAKS.items() if part in card), None)
        return None if rate is None else rate * 16 / bits


# Dense 16-bit floating-point operations per second, of the datasheets.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
_QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu,clocks_throttle_reasons.active"
)


def gpu_state() -> dict[str, str] | None:
    """Return clocks, power and temperature as nvidia-smi tells them; None where it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [part.strip() for part in done.stdout.strip().split(",")]
    names = _QUERY.split(",")
    if done.returncode or len(values) != len(names):
        return None
    return dict(zip(names, values, strict=True))


_WATCHED = {
    "sm_mhz": "clocks.sm",
    "power_w": "power.draw",
    "temperature": "temperature.gpu",
    "used_percent": "utilization.gpu",
}
_EVERY_MS = 200


class GpuWatch:
    """Clocks, power and temperature of a GPU while a block runs, by one process of nvidia-smi.

    A look before or after a measurement finds a GPU that rests; and each is a process that costs
    about as long as a kernel is timed. Where nvidia-smi is not there, nothing is seen.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._rows: list[list[float]] = []

    def __enter__(self) -> GpuWatch:
        program = shutil.which("nvidia-smi")
        if program is not None:
            query = ",".join(_WATCHED.values())
            command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
            self._process = subprocess.Popen(
                [*command, f"--loop-ms={_EVERY_MS}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._rows.append([float(value) for value in line.split(",")])
            except ValueError:  # a value that this card does not tell
                continue

    def seen(self) -> dict[str, Any] | None:
        """Return the least, median and largest of each value since the last call; None of none."""
        rows, self._rows = self._rows, []
        if not rows:
            return None
        found: dict[str, Any] = {"samples": len(rows)}
        for name, values in zip(_WATCHED, zip(*rows, strict=True), strict=True):
            found[name] = [min(values), statistics.median(values), max(values)]
        return found
