"""Settings in which DBCache and that of cache-dit must agree, and those in which they part."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vidaccel.bench.baselines import BLOCK_CACHE_LAYOUTS, BaselineSetting
from vidaccel.dbcache import DBCache

THRESHOLDS = (0.0, 0.04, 0.07, 0.1, 0.15, 0.2, 0.4)


@dataclass(frozen=True)
class Case:
    """One setting for both.

    Attributes:
        cache: settings in the words of vidaccel.
        call: arguments of the pipeline's call that are not those of the sweep.
        shift: shift of a scheduler that takes the place of the pipeline's; None to leave that.
        why: the reason why the two part here; "" where they must agree.
    """

    cache: DBCache
    call: dict[str, Any] = field(default_factory=dict)
    shift: float | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """The settings that are not the defaults."""
        default, cache = vars(_separate()), vars(self.cache)
        shown = {
            name: value
            for name, value in {**cache, **self.call, "shift": self.shift}.items()
            if value is not None and value != default.get(name, None)
        }
        return ", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults"

    def for_cache_dit(self) -> BaselineSetting:
        """Return the same setting in the words of cache-dit."""
        cache = self.cache

        def limit(value: int | None) -> int:
            return -1 if value is None else value

        return {
            "Fn_compute_blocks": cache.probe_blocks,
            "Bn_compute_blocks": cache.corrector_blocks,
            "residual_diff_threshold": cache.threshold,
            "max_warmup_steps": cache.warmup_steps,
            "warmup_interval": cache.warmup_interval,
            "max_cached_steps": limit(cache.max_cached),
            "max_continuous_cached_steps": limit(cache.max_consecutive),
            "max_accumulated_residual_diff_threshold": cache.max_accumulated,
            "taylorseer_order": cache.forecast_order,
        }


def sweep(thresholds: Sequence[float] = THRESHOLDS) -> list[Case]:
    """Return the cases in which both must agree."""
    cases = [
        Case(_separate(threshold=t, probe_blocks=probe, corrector_blocks=corrector, **forecast))
        for (probe, corrector), forecast, t in product(
            BLOCK_CACHE_LAYOUTS, ({"forecast_order": 0}, {"forecast_order": 1}), thresholds
        )
    ]
    limits = ({"max_consecutive": 2}, {"max_cached": 5}, {"warmup_steps": 6, "warmup_interval": 2})
    return cases + [Case(_separate(threshold=0.2, **limit)) for limit in limits]


def differences(blocks: int) -> list[Case]:
    """Return the cases in which the two part, and why.

    Args:
        blocks: number of the transformer's blocks.
    """
    return [
        Case(
            _separate(threshold=0.2, max_accumulated=0.3),
            why="cache-dit adds up the differences of computed steps too and never starts anew, "
            "so that after the limit nothing is reused any more; vidaccel adds up those of the "
            "reused steps since the last computed one",
        ),
        Case(
            _separate(threshold=0.1),
            call={"guidance_scale": 1.0},
            why="without guidance there is one call per step; cache-dit still takes every other "
            "call for the second branch and compares steps that do not follow each other",
        ),
        Case(
            _separate(threshold=0.2, warmup_steps=1, forecast_order=1),
            why="cache-dit draws no line before its fourth step, and holds until then",
        ),
        Case(
            _separate(threshold=0.15, forecast_order=2),
            why="cache-dit's second order is a Taylor series with backward differences in the "
            "place of derivatives, which is not the parabola through the last three steps",
        ),
        Case(
            _separate(threshold=0.15, forecast_order=1),
            shift=7.0,
            why="cache-dit extends the line over the number of the step, vidaccel over the noise "
            "level; on a shifted schedule these are not proportional",
        ),
        Case(
            _separate(
                threshold=0.0,
                probe_blocks=blocks // 2 + 1,
                corrector_blocks=blocks // 2 + 1,
            ),
            why="more probe and corrector blocks than there are: cache-dit runs those in both "
            "twice and gives another result although nothing is reused; vidaccel refuses",
        ),
    ]


def _separate(**settings: Any) -> DBCache:
    """Return a cache that decides per branch without a limit, as cache-dit starts."""
    return DBCache(branches="separate", **{"max_consecutive": None, **settings})
