"""Many generations in one process: does memory stay flat, and do equal requests stay equal."""

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import accelerate, report, restore
from vidaccel.clips.generate import latents_of
from vidaccel.environment import environment
from vidaccel.errors import BenchError

_MIB = 2**20


@dataclass(frozen=True)
class Request:
    """One user's request.

    Attributes:
        call: arguments of the pipeline.
        seed: seed of the generator, which lives on the CPU.
        acceleration: arguments of `accelerate`.
    """

    call: dict[str, Any]
    seed: int = 0
    acceleration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedRequest:
    """The answers to one request.

    Attributes:
        call, seed: those of the request.
        acceleration: arguments of `accelerate`, as text.
        timeline: steps of its last generation, a letter each.
        served: number of times it was answered.
        distinct_outputs: number of different answers.
    """

    call: dict[str, Any]
    seed: int
    acceleration: dict[str, str]
    timeline: str
    served: int
    distinct_outputs: int


@dataclass(frozen=True)
class SoakResult:
    """The result of `soak`.

    Attributes:
        generations: number of them.
        requests: the requests in order, with their answers.
        outputs_equal: equal requests had equal answers.
        rss_mib: size of the process in MiB after each generation.
        growth_mib: see `growth`.
        bytes_held_after: the most cached tensors that were held between generations, in bytes.
        peak_bytes: the most during one.
        environment: hardware and versions.
        settings: the model and its type, where a command ran it.
    """

    generations: int
    requests: list[ServedRequest]
    outputs_equal: bool
    rss_mib: list[float]
    growth_mib: float
    bytes_held_after: int
    peak_bytes: int
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)


def soak(
    pipe: Any, requests: Sequence[Request], generations: int, *, progress: bool = True
) -> SoakResult:
    """Serve the same few requests over and over, in a shuffled order that is always the same.

    `accelerate` is called anew whenever the next request wants another acceleration, as a server
    with several settings would do.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        requests: requests that come in turn.
        generations: at least two rounds of the requests.
        progress: show a bar.

    Raises:
        BenchError: psutil is not installed.
    """
    assert generations >= 2 * len(requests)
    shuffle = random.Random(0)
    turns: list[int] = []
    while len(turns) < generations:
        turns += shuffle.sample(range(len(requests)), len(requests))
    resident_bytes = _resident_bytes()
    outputs: list[set[str]] = [set() for _ in requests]
    timelines = ["" for _ in requests]
    served = [0 for _ in requests]
    rss: list[float] = []
    bytes_held, peak_bytes = 0, 0
    current: dict[str, Any] | None = None
    with ExitStack() as stack:
        stack.callback(restore, pipe)
        for index in tqdm(turns[:generations], unit="generation", disable=not progress):
            request = requests[index]
            if request.acceleration is not current:
                accelerate(pipe, **request.acceleration)
                current = request.acceleration
            latents = latents_of(pipe, request.call, request.seed)
            outputs[index].add(sha256(latents.cpu().float().numpy().tobytes()).hexdigest())
            parts = report(pipe).transformers
            timelines[index] = " ".join(part.timeline for part in parts)
            bytes_held = max(bytes_held, *(part.bytes_held for part in parts))
            peak_bytes = max(peak_bytes, *(part.peak_bytes for part in parts))
            served[index] += 1
            rss.append(resident_bytes() / _MIB)
    return SoakResult(
        generations=generations,
        requests=[
            ServedRequest(
                call=request.call,
                seed=request.seed,
                acceleration={name: str(value) for name, value in request.acceleration.items()},
                timeline=timelines[index],
                served=served[index],
                distinct_outputs=len(outputs[index]),
            )
            for index, request in enumerate(requests)
        ],
        outputs_equal=all(len(found) == 1 for found in outputs),
        rss_mib=[round(value, 2) for value in rss],
        growth_mib=growth(rss, warm_up=len(requests)),
        bytes_held_after=bytes_held,
        peak_bytes=peak_bytes,
        environment=environment(),
    )


def _resident_bytes() -> Callable[[], int]:
    """Return what reads the memory of this process, in bytes."""
    try:
        from psutil import Process
    except ImportError as error:
        raise BenchError('bench soak needs psutil: pip install "vidaccel[bench]"') from error
    process = Process()
    return lambda: int(process.memory_info().rss)


def growth(rss: Sequence[float], warm_up: int) -> float:
    """Return how much larger the process is at the end than after every request was served once.

    Args:
        rss: its size after each generation.
        warm_up: number of first generations that are left out.

    Returns:
        The median of the last quarter less that of the first one; a single large allocation
        moves neither, a leak in every generation moves it by three quarters of the whole leak.
    """
    kept = rss[warm_up:]
    quarter = max(1, len(kept) // 4)
    return statistics.median(kept[-quarter:]) - statistics.median(kept[:quarter])


def soak_table(result: SoakResult) -> str:
    """Return the result of `soak` for people."""
    rss = result.rss_mib
    lines = [
        f"{result.generations} generations: {rss[0]:.0f} MiB after the first, {rss[-1]:.0f} MiB "
        f"after the last, {result.growth_mib:+.1f} MiB from the first to the last quarter",
        f"cached tensors: {result.peak_bytes / _MIB:.2f} MiB at most, "
        f"{result.bytes_held_after} bytes between generations",
        f"outputs of equal requests: {'equal' if result.outputs_equal else 'DIFFERENT'}",
        "",
        "served  outputs  timeline",
    ]
    lines += [
        f"{request.served:6d}  {request.distinct_outputs:7d}  {request.timeline}"
        for request in result.requests
    ]
    return "\n".join(lines)
