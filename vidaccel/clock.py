"""Which step and branch of a generation a transformer call belongs to.

Pipelines differ in what they tell their transformer. What all of them do is pass a timestep taken
from the scheduler's table; most also name their guidance branches through `cache_context`. The
clock needs no more than that. Chunked pipelines, a new call after an interrupt and a changed shape
all show up as a restart.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vidaccel.errors import ScheduleError

# Pipelines cast the timestep to the transformer's dtype; bfloat16 keeps 8 significant bits.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Tick:
    """One call of the transformer.

    Attributes:
        step: index of the denoising step in the scheduler's table.
        num_inference_steps: length of that table.
        branch: name of the guidance branch ("cond", "uncond", ...).
        restarted: nothing kept from earlier calls belongs to this one.
    """

    step: int
    num_inference_steps: int
    branch: str
    restarted: bool


class Clock:
    """Tells the step and branch of each call from its timestep.

    Args:
        branch_name: position of a call within its step -> branch, for pipelines that do not name
            their calls.

    Attributes:
        scheduler: the one that drove the last call.
    """

    def __init__(self, branch_name: Callable[[int], str]) -> None:
        self._branch_name = branch_name
        self._tables: dict[int, tuple[Any, list[float]]] = {}
        self._timesteps: Any = None
        self.scheduler: Any = None
        self._step = -1
        self._value = float("nan")
        self._counter: int | None = None
        self._seen: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def tick(
        self,
        schedulers: Iterable[Any],
        timestep: float,
        context: str | None,
        shape: tuple[int, ...],
    ) -> Tick:
        """Place one call.

        Args:
            schedulers: those whose steps this transformer may be running.
            timestep: the value that the transformer was given.
            context: the branch as the pipeline names it, or None.
            shape: shape of the latents.

        Raises:
            ScheduleError: when no scheduler has this timestep in its table.
        """
        scheduler, table, nearest = self._locate(schedulers, timestep)
        # set_timesteps() makes a new table for every generation.
        restarted = scheduler.timesteps is not self._timesteps
        counter = getattr(scheduler, "step_index", None)
        # Any one of these may be missing: two neighbouring timesteps can round to the same value,
        # some schedulers do not count, some pipelines do not name their calls.
        moved = timestep != self._value or counter != self._counter or context in self._seen
        step = self._step
        if restarted:
            step = nearest
        elif moved:
            following = step + 1
            step = following if _close(table, following, timestep) else nearest
            restarted = step <= self._step
        if restarted or moved:
            self._seen = []
        branch = context or self._branch_name(len(self._seen))
        restarted = restarted or self._shapes.get(branch, shape) != shape
        if restarted:
            self._shapes = {}
        self._shapes[branch] = shape
        self._seen.append(branch)
        self.scheduler, self._timesteps, self._step = scheduler, scheduler.timesteps, step
        self._value, self._counter = timestep, counter
        return Tick(step, len(table), branch, restarted)

    def value(self, schedulers: Iterable[Any], timestep: Any) -> float:
        """The time of a call, without waiting for the device where that can be helped.

        Most pipelines pass a view of one entry of their scheduler's table, which is known on the
        host. Anything else is read from the device.

        Args:
            schedulers: as `tick`.
            timestep: tensor of any shape. Image conditioning gives its clean frames time 0; the
                step is that of the noisy ones, so the largest counts.
        """
        for scheduler in schedulers:
            index = _index_of_view(scheduler.timesteps, timestep)
            if index is not None:
                return self._table(scheduler)[index]
        return float(timestep.max())

    def _table(self, scheduler: Any) -> list[float]:
        """The scheduler's timesteps on the host."""
        known = self._tables.get(id(scheduler))
        if known is None or known[0] is not scheduler.timesteps:
            known = (scheduler.timesteps, [float(t) for t in scheduler.timesteps.tolist()])
            self._tables[id(scheduler)] = known
        return known[1]

    def _locate(self, schedulers: Iterable[Any], timestep: float) -> tuple[Any, list[float], int]:
        """The scheduler that is running, its table on the host, and the nearest entry."""
        tables = []
        for scheduler in schedulers:
            if scheduler.timesteps is not None:
                tables.append((scheduler, self._table(scheduler)))
        # The scheduler of the previous call keeps the clock while it still fits.
        tables.sort(key=lambda entry: entry[0].timesteps is not self._timesteps)
        for scheduler, table in tables:
            nearest = min(range(len(table)), key=lambda i: abs(table[i] - timestep))
            if _close(table, nearest, timestep):
                return scheduler, table, nearest
        raise ScheduleError(
            f"the transformer was called at timestep {timestep:g}, which is not among the "
            f"{len(tables[0][1]) if tables else 0} timesteps of the accelerated pipeline's "
            "scheduler; if another scheduler or pipeline drives it, accelerate that pipeline too"
        )


def _index_of_view(table: Any, timestep: Any) -> int | None:
    """The entry of a scheduler's table that all of `timestep` is a view of; None if it is not."""
    if not hasattr(table, "untyped_storage") or table.dtype != timestep.dtype:
        return None
    if table.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
        return None
    index = int(timestep.storage_offset() - table.storage_offset())
    one_entry = all(
        stride == 0 or size == 1
        for stride, size in zip(timestep.stride(), timestep.shape, strict=True)
    )
    return index if one_entry and table.is_contiguous() and 0 <= index < len(table) else None


def _close(table: list[float], index: int, timestep: float) -> bool:
    if not 0 <= index < len(table):
        return False
    return abs(table[index] - timestep) <= max(1e-3, _ROUNDING * abs(timestep))


def noise_grid(scheduler: Any, steps: int) -> tuple[float, ...]:
    """Noise level of each of the `steps` steps: sigmas, or timesteps from 1 to 0 without them."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= steps:
        return tuple(float(sigma) for sigma in sigmas[:steps].tolist())
    length = float(scheduler.config.num_train_timesteps)
    return tuple(float(t) / length for t in scheduler.timesteps.tolist())
