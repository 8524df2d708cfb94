"""Finds the step and branch of a generation that a transformer call belongs to.

Pipelines differ in what they tell their transformer. What all of them do is pass a timestep taken
from the scheduler's table; most also name their guidance branches through `cache_context`. The
tracker needs no more than that. Chunked pipelines, a new call after an interrupt and a changed
shape all show up as a restart.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vidaccel.errors import ScheduleError
from vidaccel.hosts.spec import Time

# Pipelines cast the timestep to the transformer's dtype; bfloat16 keeps 8 significant bits.
_ROUNDING = 2.0**-8

# What a pipeline tells its transformer about the time, made of the tables of its scheduler.
_TABLES: dict[Time, tuple[str, Callable[[float], float]]] = {
    "t": ("timesteps", lambda t: t),
    "t / 1000": ("timesteps", lambda t: t / 1000),
    "1 - t / 1000": ("timesteps", lambda t: 1 - t / 1000),
    "sigma": ("sigmas", lambda sigma: sigma),
    "sigma / (sigma + 1)": ("sigmas", lambda sigma: sigma / (sigma + 1)),
}


@dataclass(frozen=True)
class CallContext:
    """The place of one call of the transformer in its generation.

    Attributes:
        step: index of the denoising step in the scheduler's table.
        num_inference_steps: length of that table.
        branch: the guidance branch ("cond", "uncond", ...).
        restarted: a generation begins: nothing kept from earlier calls belongs to it.
        reshaped: the latents of the running generation have another shape from here on, which
            nothing kept from earlier calls fits.
    """

    step: int
    num_inference_steps: int
    branch: str
    restarted: bool
    reshaped: bool = False


class StepTracker:
    """Tells the step and branch of each call from its timestep.

    Args:
        branch_name: position of a call within its step -> branch, for pipelines that do not name
            their calls.
        times: what the transformer is told about the time, where pipelines differ.

    Attributes:
        scheduler: the one that drove the last call.
    """

    def __init__(self, branch_name: Callable[[int], str], times: tuple[Time, ...] = ("t",)) -> None:
        self._branch_name = branch_name
        self._times = times
        self._time: Time = times[0]
        self._tables: dict[int, tuple[Any, dict[Time, list[float]]]] = {}
        self._timesteps: Any = None
        self.scheduler: Any = None
        self._step = -1
        self._value = float("nan")
        self._counter: int | None = None
        self._seen: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def locate(
        self,
        schedulers: Iterable[Any],
        timestep: Any,
        cache_context: str | None,
        shape: tuple[int, ...],
    ) -> CallContext:
        """Place one call.

        Args:
            schedulers: those whose steps this transformer may be running.
            timestep: what the transformer was given, a tensor of any shape. Image conditioning
                gives its clean frames time 0, or one of their own that may be above that of the
                others.
            cache_context: the branch as the pipeline names it, or None.
            shape: shape of the latents.

        Raises:
            ScheduleError: when no scheduler has this timestep in its table.
        """
        schedulers = list(schedulers)
        timesteps = self._values(schedulers, timestep)
        scheduler, table, nearest, value = self._entry(schedulers, timesteps)
        # set_timesteps() makes a new table for every generation.
        restarted = scheduler.timesteps is not self._timesteps
        counter = getattr(scheduler, "step_index", None)
        # Any one of these may be missing: two neighbouring timesteps can round to the same value,
        # some schedulers do not count, some pipelines do not name their calls.
        moved = value != self._value or counter != self._counter or cache_context in self._seen
        step = self._step
        if restarted:
            step = nearest
        elif moved:
            following = step + 1
            step = following if _close(table, following, value) else nearest
            restarted = step <= self._step
        if restarted or moved:
            self._seen = []
        branch = cache_context or self._branch_name(len(self._seen))
        reshaped = not restarted and self._shapes.get(branch, shape) != shape
        if restarted or reshaped:
            self._shapes = {}
        self._shapes[branch] = shape
        self._seen.append(branch)
        self.scheduler, self._timesteps, self._step = scheduler, scheduler.timesteps, step
        self._value, self._counter = value, counter
        return CallContext(step, len(table), branch, restarted, reshaped)

    def _values(self, schedulers: list[Any], timestep: Any) -> tuple[float, ...]:
        """The times of a call, latest first, without waiting for the device if that can be helped.

        Most pipelines pass a view of one entry of their scheduler's table, which is known on the
        host. Anything else is read from the device.
        """
        if "t" in self._times:
            for scheduler in schedulers:
                index = _index_of_view(scheduler.timesteps, timestep)
                if index is not None:
                    return (self._tables_of(scheduler)["t"][index],)
        if timestep.numel() == 1:
            return (float(timestep),)
        import torch  # not at the top: the table of hosts names the times without it

        low, high = map(float, torch.stack(timestep.aminmax()).tolist())
        return (high, low) if 0 < low < high else (high,)

    def _entry(
        self, schedulers: list[Any], timesteps: tuple[float, ...]
    ) -> tuple[Any, list[float], int, float]:
        """The scheduler that is running, its table, the nearest entry, and the value it is of."""
        known = [(s, self._tables_of(s)) for s in schedulers if s.timesteps is not None]
        # The scheduler of the previous call goes on while it still fits.
        known.sort(key=lambda entry: entry[0].timesteps is not self._timesteps)
        for scheduler, tables in known:
            running = scheduler.timesteps is self._timesteps
            for timestep in timesteps:
                fitting = []
                for time in (self._time,) if running else self._times:
                    table = tables[time]
                    if not table:
                        continue
                    nearest = min(range(len(table)), key=lambda i: abs(table[i] - timestep))
                    if _close(table, nearest, timestep):
                        fitting.append((nearest, time))
                if fitting:
                    # A generation begins at or near the first entry of the right one.
                    nearest, self._time = min(fitting, key=lambda entry: entry[0])
                    return scheduler, tables[self._time], nearest, timestep
        length = len(known[0][1][self._times[0]]) if known else 0
        raise ScheduleError(
            f"the transformer was called at timestep {timesteps[0]:g}, which is not among the "
            f"{length} timesteps of the accelerated pipeline's scheduler; if another scheduler or "
            "pipeline drives it, accelerate that pipeline too"
        )

    def _tables_of(self, scheduler: Any) -> dict[Time, list[float]]:
        """The tables of a scheduler on the host, read once per generation."""
        known = self._tables.get(id(scheduler))
        if known is None or known[0] is not scheduler.timesteps:
            steps = len(scheduler.timesteps)
            tables = {}
            for time in self._times:
                attribute, value = _TABLES[time]
                entries = getattr(scheduler, attribute, None)
                entries = [] if entries is None else entries[:steps].tolist()
                tables[time] = [value(float(entry)) for entry in entries]
            known = (scheduler.timesteps, tables)
            self._tables[id(scheduler)] = known
        return known[1]


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
    scale = max(abs(table[0]), abs(table[-1]))
    # Some pipelines cut the timestep to a whole number.
    whole = 1.0 if scale > 100.0 and timestep.is_integer() else 0.0
    return abs(table[index] - timestep) <= max(1e-6 * scale, _ROUNDING * abs(timestep), whole)
