"""DBCache: probe a few blocks of a step, then decide whether the middle ones are worth running.

The first blocks always run. How much their residual has changed since the last computed step says
how much the rest would change: below a threshold the middle blocks are replaced by the residual
that was kept, and the last blocks run on the result (the dual-block cache of cache-dit). This
module holds the settings and the decisions, and needs neither torch nor diffusers; `engine.py`
runs the blocks.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from vidaccel.errors import PlanError
from vidaccel.plans.forecast import MAX_ORDER

# For models nobody has measured: the middle of what is in use for video models.
DEFAULT_THRESHOLD = 0.08


@dataclass(frozen=True)
class DBCache:
    """Settings of the block cache.

    Attributes:
        threshold: a step is reused while the relative L1 change of the probe blocks' residual,
            mean(|last - now|) / mean(|last|) against the last computed step of its branch, is below
            it; 0 reuses nothing. None: that of the model's row in the table of hosts.
        probe_blocks: blocks that always run first. 0 only together with a plan, which then decides
            alone.
        corrector_blocks: blocks that always run last, on the reused result.
        warmup_steps: the first steps are computed ...
        warmup_interval: ... every so many of them; those between may be reused.
        max_consecutive: reused steps in a row before one is computed; None for no limit. Counted
            anew after every computed step.
        max_cached: reused steps in one generation; None for no limit.
        max_accumulated: a step is computed when the differences of the reused steps since the last
            computed one, its own included, add up to more; None for no limit.
        forecast_order: 0 holds the residual, 1 and 2 extend the line or parabola through the last
            two or three over the noise level.
        branches: "together" lets the first branch of a step (cond, say) decide for all; with
            "separate" each decides for itself.
        probe_stride: compare every so many tokens of the probe residual only.
        store: where residuals are kept, "device" or "cpu" (pinned where there is a GPU).

    With a plan, the plan stands in for warm-up, limits and forecast order: its computed steps are
    computed, and its reused ones are too when their difference reaches the threshold.

    Raises:
        PlanError: a value is out of its range.
    """

    threshold: float | None = None
    probe_blocks: int = 1
    corrector_blocks: int = 0
    warmup_steps: int = 4
    warmup_interval: int = 1
    max_consecutive: int | None = 3
    max_cached: int | None = None
    max_accumulated: float | None = None
    forecast_order: int = 0
    branches: Literal["together", "separate"] = "together"
    probe_stride: int = 1
    store: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _number("threshold", self.threshold)
        if self.max_accumulated is not None:
            _number("max_accumulated", self.max_accumulated)
        for name, least in (
            ("probe_blocks", 0),
            ("corrector_blocks", 0),
            ("warmup_steps", 0),
            ("warmup_interval", 1),
            ("probe_stride", 1),
        ):
            _whole(name, getattr(self, name), least)
        for name in ("max_consecutive", "max_cached"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0)
        if self.forecast_order not in range(MAX_ORDER + 1) or self.forecast_order is True:
            raise PlanError(f"forecast_order is 0, 1 or 2, found {self.forecast_order!r}")
        for name, known in (("branches", ("together", "separate")), ("store", ("device", "cpu"))):
            if getattr(self, name) not in known:
                raise PlanError(
                    f"{name} is {' or '.join(map(repr, known))}, found {getattr(self, name)!r}"
                )

    def with_threshold(self, default: float | None) -> "DBCache":
        """The same with a threshold, that of the model's row if none was given."""
        if self.threshold is not None:
            return self
        return replace(self, threshold=DEFAULT_THRESHOLD if default is None else default)

    def bytes_needed(
        self,
        tokens: int,
        width: int,
        *,
        branches: int = 2,
        streams: int = 1,
        batch: int = 1,
        itemsize: int = 2,
    ) -> int:
        """Bytes that the cached tensors of one transformer take at most, before any run.

        Args:
            tokens: sequence length S of the block stack, text included where it is joint.
            width: hidden size of the blocks.
            branches: calls per step: 2 for sequential guidance, 1 for batched or embedded.
            streams: streams whose residuals are kept, 2 for joint blocks with `corrector_blocks`.
            batch: batch size of one call; twice the number of clips for batched guidance.
            itemsize: bytes per element, 2 for bfloat16.
        """
        probes = math.ceil(tokens / self.probe_stride) if self.probe_blocks else 0
        residuals = streams * tokens * (self.forecast_order + 1)
        return branches * batch * width * itemsize * (probes + residuals)

    def __str__(self) -> str:
        name = f"DBCache F{self.probe_blocks}B{self.corrector_blocks}"
        return name if self.threshold is None else f"{name}, threshold {self.threshold:g}"


# Why a step was computed.
FIRST = "nothing kept yet"
CHANGED = "other prompt, inputs or adapters"
PLANNED = "planned"
WARM_UP = "warm-up"
DIFFERENCE = "difference"
CONSECUTIVE = "max_consecutive"
CACHED = "max_cached"
ACCUMULATED = "max_accumulated"


class Decider:
    """The decisions of one generation: for all branches, or for one of them.

    Args:
        cache: the settings, with a threshold.
        guards: a plan decides, and only a difference can overrule it.

    Attributes:
        computed_at: the last step that was computed; -1 before the first.
        reason: why the last decided step was computed; "" when it was reused.
    """

    def __init__(self, cache: DBCache, guards: bool = False) -> None:
        assert cache.threshold is not None
        self._cache, self._guards, self._threshold = cache, guards, cache.threshold
        self._step = -1
        self._first: int | None = None  # the second expert of a run begins in its middle
        self.reason = ""
        self.computed_at = -1
        self._consecutive = 0
        self._cached = 0
        self._accumulated = 0.0

    def has_decided(self, step: int) -> bool:
        """Tell whether an earlier branch of `step` has decided it: `reason` says how."""
        return step == self._step

    def before_probe(self, step: int) -> str | None:
        """Return why `step` is computed whatever its difference is; None when that has to tell."""
        cache = self._cache
        if self._guards:
            return None
        past = step - (step if self._first is None else self._first)
        if past < cache.warmup_steps and past % cache.warmup_interval == 0:
            return WARM_UP
        if cache.max_cached is not None and self._cached >= cache.max_cached:
            return CACHED
        if cache.max_consecutive is not None and self._consecutive >= cache.max_consecutive:
            return CONSECUTIVE
        return None

    def after_probe(self, difference: float) -> str:
        """Return why a step of this difference is computed; "" when it is reused."""
        limit = self._cache.max_accumulated
        # Written so that NaN, which no comparison holds for, is computed.
        if not difference < self._threshold:
            return DIFFERENCE
        if not self._guards and limit is not None and self._accumulated + difference > limit:
            return ACCUMULATED
        return ""

    def record(self, step: int, reason: str, difference: float = 0.0) -> None:
        """Note what becomes of `step`, which later branches of it follow.

        Args:
            step: index of the step.
            reason: why it is computed; "" when it is reused.
            difference: that of a reused step.
        """
        self._step, self.reason = step, reason
        self._first = step if self._first is None else self._first
        if reason:
            self.computed_at = step
            self._consecutive, self._accumulated = 0, 0.0
        else:
            self._consecutive += 1
            self._cached += 1
            self._accumulated += difference


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise PlanError(f"{name} is a finite number >= 0, found {value!r}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} is a whole number >= {least}, found {value!r}")
