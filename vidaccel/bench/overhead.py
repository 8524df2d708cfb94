"""The cost of vidaccel when it skips nothing, and how much of the ideal speedup it realises."""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from vidaccel.api import accelerate, restore
from vidaccel.bench.timing import interleave, median_interval, seconds_of
from vidaccel.clips.generate import latents_of
from vidaccel.clips.load import steps_of
from vidaccel.dbcache import DBCache
from vidaccel.environment import environment
from vidaccel.hosts.registry import find_transformers
from vidaccel.plans.plan import Plan


@dataclass(frozen=True)
class PlanSpeed:
    """The speed of one plan; ratios are medians of the ratios within a round.

    Attributes:
        steps_computed: number of computed steps.
        ideal_speedup: what it would be if reused steps cost embedding and head alone.
        speedup: measured.
        realised_over_ideal: ratio of the two.
    """

    steps_computed: int
    ideal_speedup: float
    speedup: float
    realised_over_ideal: float


@dataclass(frozen=True)
class OverheadResult:
    """The result of `overhead`.

    Attributes:
        settings: arguments of the run.
        seconds: variant -> its seconds in each round.
        median_seconds: variant -> their median.
        idle_overhead: cost when nothing decides, as a fraction of a step, median over pairs.
        idle_overhead_interval: where that median lies with 95 % confidence.
        threshold_zero_overhead: the same of a block cache that compares and never reuses.
        threshold_zero_overhead_interval: where that median lies with 95 % confidence.
        plans: "every N" -> its speed.
        environment: hardware and versions.
    """

    settings: dict[str, Any]
    seconds: dict[str, list[float]]
    median_seconds: dict[str, float]
    idle_overhead: float
    idle_overhead_interval: tuple[float, float]
    threshold_zero_overhead: float
    threshold_zero_overhead_interval: tuple[float, float]
    plans: dict[str, PlanSpeed]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)


def overhead(
    pipe: Any, call: dict[str, Any], *, rounds: int = 9, progress: bool = True
) -> OverheadResult:
    """Time vidaccel when it skips nothing, and when it skips what plans say.

    The cost is measured on single calls of the transformer, one plain and one with everything
    computed, in shuffled order, so that the drift of the machine cancels within a pair. Once
    nothing decides, and once a block cache of threshold 0 does, which compares its probe blocks in
    every step, keeps every residual, and never reuses any.

    The ideal time of a plan is the plain time less the blocks' share of every reused step, where
    that share is the time of a plain run less that of a run whose transformer has no blocks: the
    embedding and the head still run on reused steps.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: arguments of its call. Latents are the output, so no decoding is timed.
        rounds: each round times every variant once, in shuffled order.
        progress: show a bar.
    """
    steps = steps_of(pipe, call)
    plans = {f"every {n}": len(Plan.every(n, steps).steps) for n in (2, 3, 5)}

    def plain() -> None:
        latents_of(pipe, call)

    def accelerated(policy: str) -> Callable[[], None]:
        def run() -> None:
            accelerate(pipe, policy=policy)
            plain()

        return run

    def without_blocks() -> None:
        with _no_blocks(pipe):
            plain()

    variants: dict[str, Callable[[], None]] = {"plain": plain}
    variants |= {name: accelerated(name) for name in plans}
    variants["no blocks"] = without_blocks
    seconds = interleave(variants, rounds, after=lambda: restore(pipe), progress=progress)
    idle = _costs(pipe, plain, rounds, None)
    deciding = _costs(pipe, plain, rounds, DBCache(threshold=0, warmup_steps=1))
    return OverheadResult(
        settings={
            **call,
            "output_type": "latent",
            "rounds": rounds,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        seconds=seconds,
        median_seconds={name: statistics.median(times) for name, times in seconds.items()},
        idle_overhead=statistics.median(idle),
        idle_overhead_interval=median_interval(idle),
        threshold_zero_overhead=statistics.median(deciding),
        threshold_zero_overhead_interval=median_interval(deciding),
        plans={
            name: _plan_speed(name, computed, steps, seconds) for name, computed in plans.items()
        },
        environment=environment(),
    )


def _plan_speed(
    name: str, computed: int, steps: int, seconds: Mapping[str, list[float]]
) -> PlanSpeed:
    """Compare a plan with the plain run of each round, within which the machine's drift cancels."""
    rounds = list(zip(seconds["plain"], seconds["no blocks"], seconds[name], strict=True))

    def ideal(plain: float, no_blocks: float) -> float:
        return plain - (1 - computed / steps) * (plain - no_blocks)

    return PlanSpeed(
        computed,
        ideal_speedup=statistics.median(plain / ideal(plain, none) for plain, none, _ in rounds),
        speedup=statistics.median(plain / planned for plain, _, planned in rounds),
        realised_over_ideal=statistics.median(
            ideal(plain, none) / planned for plain, none, planned in rounds
        ),
    )


def overhead_table(result: OverheadResult) -> str:
    """Return the result of `overhead` for people."""
    lines = []
    for name, cost, (low, high) in (
        ("idle overhead", result.idle_overhead, result.idle_overhead_interval),
        ("threshold 0  ", result.threshold_zero_overhead, result.threshold_zero_overhead_interval),
    ):
        lines.append(f"{name} {cost:+.2%} of a step ({low:+.2%} to {high:+.2%})")
    lines += ["", "plan     computed  ideal  measured  realised"]
    lines += [
        f"{name}  {plan.steps_computed:8d}  {plan.ideal_speedup:4.2f}x  "
        f"{plan.speedup:7.2f}x  {plan.realised_over_ideal:8.3f}"
        for name, plan in result.plans.items()
    ]
    return "\n".join(lines)


def _costs(
    pipe: Any, generate: Callable[[], object], rounds: int, cache: DBCache | None
) -> list[float]:
    """Return what an engine that computes everything adds to calls, as fractions of plain ones.

    Args:
        pipe: the pipeline, without acceleration.
        generate: one generation of it, whose calls of the transformer are repeated.
        rounds: number of pairs for each call.
        cache: decides at every step; None: nothing decides.
    """
    model, host = next(iter(find_transformers(pipe).values()))
    calls: dict[float, dict[str, Any]] = {}  # one of each step, by its timestep

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.setdefault(float(kwargs[host.timestep].max()), kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    generate()
    handle.remove()
    # Another module over the same weights: nothing has to be attached between two timed calls.
    twin = deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    accelerate(pipe, policy=None, cache=cache)

    def forward(model: Any, call: dict[str, Any]) -> None:
        with torch.no_grad(), model.cache_context("cond"):
            model(**call)

    shuffle, ratios = random.Random(0), []
    for _ in range(rounds):
        for call in calls.values():
            seconds = {
                each: seconds_of(partial(forward, each, call))
                for each in shuffle.sample((model, twin), 2)
            }
            ratios.append(seconds[model] / seconds[twin])
    restore(pipe)
    return [ratio - 1 for ratio in ratios]


@contextmanager
def _no_blocks(pipe: Any) -> Iterator[None]:
    """Empty the block lists of the pipeline's transformers."""
    found = list(find_transformers(pipe).values())
    for transformer, host in found:
        for blocks in host.blocks:
            vars(transformer)[blocks.name] = torch.nn.ModuleList()
    try:
        yield
    finally:
        for transformer, host in found:
            for blocks in host.blocks:
                del vars(transformer)[blocks.name]
