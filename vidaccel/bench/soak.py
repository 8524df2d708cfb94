"""Many generations in one process: does memory stay flat, and do equal requests stay equal."""

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, report, restore
from vidaccel.clips.generate import without_bar
from vidaccel.environment import environment
from vidaccel.errors import BenchError

_MIB = 2**20


@dataclass(frozen=True)
class Request:
    """What one user asks for.

    Attributes:
        call: arguments of the pipeline.
        seed: of the generator, which lives on the CPU.
        acceleration: what `accelerate` takes.
    """

    call: dict[str, Any]
    seed: int = 0
    acceleration: dict[str, Any] = field(default_factory=dict)


def soak(
    pipe: Any, requests: Sequence[Request], generations: int, *, progress: bool = True
) -> dict[str, Any]:
    """Serve the same few requests over and over, in a shuffled order that is always the same.

    `accelerate` is called anew whenever the next request wants another acceleration, as a server
    with several settings would do.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        requests: what is asked for in turn.
        generations: at least two rounds of the requests.

    Returns:
        "requests" (in order: call, seed, acceleration, timeline, served, distinct_outputs),
        "outputs_equal", "rss_mib" (of the process, after each generation), "growth_mib" (see
        `growth`), "bytes_held_after" (the most that was held between generations), "peak_bytes"
        (the most during one), "generations" and "environment".

    Raises:
        BenchError: psutil is not installed.
    """
    assert generations >= 2 * len(requests)
    order = random.Random(0)
    turns: list[int] = []
    while len(turns) < generations:
        turns += order.sample(range(len(requests)), len(requests))
    resident_bytes = _resident_bytes()
    outputs: list[set[str]] = [set() for _ in requests]
    timelines = ["" for _ in requests]
    served = [0 for _ in requests]
    rss, held, peak = [], 0, 0
    current: dict[str, Any] | None = None
    with ExitStack() as stack:
        stack.callback(restore, pipe)
        stack.enter_context(without_bar(pipe))
        for index in tqdm(turns[:generations], unit="generation", disable=not progress):
            request = requests[index]
            if request.acceleration is not current:
                accelerate(pipe, **request.acceleration)
                current = request.acceleration
            output = pipe(
                generator=torch.Generator("cpu").manual_seed(request.seed),
                **{**request.call, "output_type": "latent", "return_dict": False},
            )[0]
            outputs[index].add(sha256(output.cpu().float().numpy().tobytes()).hexdigest())
            shown = report(pipe).transformers
            timelines[index] = " ".join(part.timeline for part in shown)
            held = max(held, *(part.bytes_held for part in shown))
            peak = max(peak, *(part.peak_bytes for part in shown))
            served[index] += 1
            rss.append(resident_bytes() / _MIB)
    return {
        "generations": generations,
        "requests": [
            {
                "call": request.call,
                "seed": request.seed,
                "acceleration": {name: str(value) for name, value in request.acceleration.items()},
                "timeline": timelines[index],
                "served": served[index],
                "distinct_outputs": len(outputs[index]),
            }
            for index, request in enumerate(requests)
        ],
        "outputs_equal": all(len(found) == 1 for found in outputs),
        "rss_mib": [round(value, 2) for value in rss],
        "growth_mib": growth(rss, warm_up=len(requests)),
        "bytes_held_after": held,
        "peak_bytes": peak,
        "environment": environment(),
    }


def _resident_bytes() -> Callable[[], int]:
    """Return what reads the memory of this process, in bytes."""
    try:
        from psutil import Process
    except ImportError as error:
        raise BenchError('bench soak needs psutil: pip install "vidaccel[bench]"') from error
    process = Process()
    return lambda: int(process.memory_info().rss)


def growth(rss: Sequence[float], warm_up: int) -> float:
    """How much larger the process is at the end than after every request was served once.

    Args:
        rss: its size after each generation.
        warm_up: generations that are left out.

    Returns:
        The median of the last quarter less that of the first one; a single large allocation
        moves neither, a leak in every generation moves it by three quarters of the whole leak.
    """
    kept = rss[warm_up:]
    quarter = max(1, len(kept) // 4)
    return statistics.median(kept[-quarter:]) - statistics.median(kept[:quarter])


def soak_table(result: dict[str, Any]) -> str:
    """The result of `soak` for people."""
    rss = result["rss_mib"]
    lines = [
        f"{result['generations']} generations: {rss[0]:.0f} MiB after the first, {rss[-1]:.0f} MiB "
        f"after the last, {result['growth_mib']:+.1f} MiB from the first to the last quarter",
        f"cached tensors: {result['peak_bytes'] / _MIB:.2f} MiB at most, "
        f"{result['bytes_held_after']} bytes between generations",
        f"outputs of equal requests: {'equal' if result['outputs_equal'] else 'DIFFERENT'}",
        "",
        "served  outputs  timeline",
    ]
    lines += [
        f"{request['served']:6d}  {request['distinct_outputs']:7d}  {request['timeline']}"
        for request in result["requests"]
    ]
    return "\n".join(lines)
