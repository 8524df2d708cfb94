"""Time variants in turn, and tell how sure their medians are."""

import math
import random
import time
from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    after: Callable[[], object],
    progress: bool = True,
) -> dict[str, list[float]]:
    """Time each variant once per round, after one round that is not counted.

    Args:
        variants: name -> function to time.
        rounds: number of times each is timed. The order is shuffled in each round (with a fixed
            seed), since what ran before can leave caches and the allocator in another state.
        after: run after each, outside of the timing.
        progress: show a bar.

    Returns:
        The name of each variant -> its seconds, one value per round.
    """
    names = list(variants)
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), unit="run", disable=not progress) as bar:
        for turn in range(rounds + 1):
            for name in shuffle.sample(names, len(names)):
                elapsed = seconds_of(variants[name])
                after()
                if turn > 0:
                    seconds[name].append(elapsed)
                bar.update()
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Return how long a function takes, the work that it leaves to a GPU among it."""
    started = time.perf_counter()
    run()
    wait_for_gpu()
    return time.perf_counter() - started


def wait_for_gpu() -> None:
    """Wait until the GPU has done what it was given; without one, do nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return where the median of what `values` are drawn from lies, with 95 % confidence."""
    # How many of them lie below it is binomial.
    ranked, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = (round((len(values) - 1) / 2 + way * half) for way in (-1, 1))
    return ranked[max(low, 0)], ranked[min(high, len(ranked) - 1)]
