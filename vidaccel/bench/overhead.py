"""Benchmarks: baseline and result in one run, medians of interleaved rounds, JSON out."""

import math
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, restore
from vidaccel.clips.generate import steps_of, without_bar
from vidaccel.dbcache import DBCache
from vidaccel.environment import environment
from vidaccel.hosts.registry import find_transformers
from vidaccel.plans.plan import Plan

Interleaved = dict[str, Callable[[], object]]


def overhead(pipe: Any, call: dict[str, Any], *, rounds: int = 9, progress: bool = True) -> Any:
    """What vidaccel costs when it skips nothing, and how much of the ideal speedup it realises.

    The cost is measured on single calls of the transformer, one plain and one with everything
    computed, in shuffled order, so that the drift of the machine cancels within a pair. Once
    nothing decides, and once a block cache of threshold 0 does, which compares its probe blocks in
    every step, keeps every residual, and never reuses any.

    The ideal time of a plan is the plain time less the blocks' share of every reused step, where
    that share is the time of a plain run less that of a run whose transformer has no blocks: the
    embedding and the head still run on reused steps.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: its arguments. Latents are the output, so no decoding is timed.
        rounds: each round times every variant once, in shuffled order.

    Returns:
        "settings", "seconds" (variant -> all rounds), "median_seconds", "idle_overhead" and
        "threshold_zero_overhead" (fractions of a step, medians over pairs), the same with
        "_interval" (where those medians lie with 95 % confidence), "plans" (every N -> computed
        steps, ideal and realised speedup and their ratio, medians of the ratios within a round)
        and "environment".
    """
    steps = steps_of(pipe, call)
    call = {**call, "output_type": "latent"}
    plans = {f"every {n}": len(Plan.every(n, steps).steps) for n in (2, 3, 5)}

    def generation() -> None:
        with without_bar(pipe):
            pipe(generator=torch.Generator("cpu").manual_seed(0), **call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def accelerated(policy: str) -> Callable[[], None]:
        def run() -> None:
            accelerate(pipe, policy=policy)
            generation()

        return run

    def without_blocks() -> None:
        with _no_blocks(pipe):
            generation()

    variants: Interleaved = {"plain": generation}
    variants |= {name: accelerated(name) for name in plans}
    variants["no blocks"] = without_blocks
    seconds = interleave(variants, rounds, after=lambda: restore(pipe), progress=progress)

    def paired(value: Callable[[dict[str, float]], float]) -> float:
        """Median over rounds of a value of one round: drift of the machine cancels within it."""
        return statistics.median(
            value(dict(zip(seconds, times, strict=True)))
            for times in zip(*seconds.values(), strict=True)
        )

    def ideal(name: str, of: dict[str, float]) -> float:
        return of["plain"] - (1 - plans[name] / steps) * (of["plain"] - of["no blocks"])

    deciding = DBCache(threshold=0, warmup_steps=1)
    costs = {
        "idle_overhead": _costs(pipe, generation, rounds, None),
        "threshold_zero_overhead": _costs(pipe, generation, rounds, deciding),
    }

    return {
        "settings": {
            **call,
            "rounds": rounds,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        **{name: statistics.median(found) for name, found in costs.items()},
        **{f"{name}_interval": median_interval(found) for name, found in costs.items()},
        "plans": {
            name: {
                "steps_computed": computed,
                "ideal_speedup": paired(lambda of, n=name: of["plain"] / ideal(n, of)),
                "speedup": paired(lambda of, n=name: of["plain"] / of[n]),
                "realised_over_ideal": paired(lambda of, n=name: ideal(n, of) / of[n]),
            }
            for name, computed in plans.items()
        },
        "environment": environment(),
    }


def overhead_table(result: Any) -> str:
    """The result of `overhead` for people."""
    lines = []
    for name, field in (("idle overhead", "idle"), ("threshold 0  ", "threshold_zero")):
        low, high = result[f"{field}_overhead_interval"]
        cost = result[f"{field}_overhead"]
        lines.append(f"{name} {cost:+.2%} of a step ({low:+.2%} to {high:+.2%})")
    lines += ["", "plan     computed  ideal  measured  realised"]
    lines += [
        f"{name}  {plan['steps_computed']:8d}  {plan['ideal_speedup']:4.2f}x  "
        f"{plan['speedup']:7.2f}x  {plan['realised_over_ideal']:8.3f}"
        for name, plan in result["plans"].items()
    ]
    return "\n".join(lines)


def interleave(
    variants: Interleaved, rounds: int, *, after: Callable[[], object], progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of each variant, once per round, after one round that is not counted.

    Args:
        variants: name -> what to time.
        rounds: how often each is timed. The order is shuffled in each round (with a fixed seed),
            since what ran before can leave caches and the allocator in another state.
        after: run after each, outside of the timing.
    """
    names = list(variants)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), unit="run", disable=not progress) as bar:
        for turn in range(rounds + 1):
            for name in order.sample(names, len(names)):
                started = time.perf_counter()
                variants[name]()
                elapsed = time.perf_counter() - started
                after()
                if turn > 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


def median_interval(values: list[float]) -> tuple[float, float]:
    """Where the median of what `values` are drawn from lies, with 95 % confidence."""
    # How many of them lie below it is binomial.
    ranked, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = (round((len(values) - 1) / 2 + way * half) for way in (-1, 1))
    return ranked[max(low, 0)], ranked[min(high, len(ranked) - 1)]


def _costs(
    pipe: Any, generation: Callable[[], object], rounds: int, cache: DBCache | None
) -> list[float]:
    """What an attached engine that computes everything adds to calls, as fractions of plain ones.

    Args:
        cache: decides at every step; None: nothing decides.
    """
    model, host = next(iter(find_transformers(pipe).values()))
    calls: dict[float, dict[str, Any]] = {}  # one of each step, by its timestep

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.setdefault(float(kwargs[host.timestep].max()), kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    generation()
    handle.remove()
    # Another module over the same weights: nothing has to be attached between two timed calls.
    twin = deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    accelerate(pipe, policy=None, cache=cache)

    def seconds(model: Any, call: dict[str, Any]) -> float:
        started = time.perf_counter()
        with torch.no_grad(), model.cache_context("cond"):
            model(**call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    order, ratios = random.Random(0), []
    for _ in range(rounds):
        for call in calls.values():
            found = {}
            for one in order.sample((model, twin), 2):
                found[one] = seconds(one, call)
            ratios.append(found[model] / found[twin])
    restore(pipe)
    return [ratio - 1 for ratio in ratios]


@contextmanager
def _no_blocks(pipe: Any) -> Any:
    """The transformers of `pipe` with empty block lists."""
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
