"""Finds the step of a scheduler's walk down its noise levels that a transformer call belongs to.

Pipelines differ in what they tell their transformer. What all of them do is pass a timestep taken
from the scheduler's table, and step the scheduler before the next one. The tracker needs no more
than that. Chunked pipelines and a new call after an interrupt show up as a restart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.hosts.spec import Time

# Pipelines cast the timestep to the transformer's dtype, and some divide it by 1000 in that dtype,
# which rounds a second time; bfloat16 keeps 8 significant bits.
_ROUNDING = 2.0**-7 * 1.01
# Some round it before they shift it, too.
_ROUNDING_BEFORE = _ROUNDING / 2
# Closer than this, on the scale of the table, a time was not rounded.
_EXACT = 1e-6

# What a pipeline tells its transformer about the time, made of the tables of its scheduler.
_TABLES: dict[Time, tuple[str, Callable[[float], float]]] = {
    "t": ("timesteps", lambda t: t),
    "t - 1": ("timesteps", lambda t: t - 1),
    "t / 1000": ("timesteps", lambda t: t / 1000),
    "1 - t / 1000": ("timesteps", lambda t: 1 - t / 1000),
    "sigma": ("sigmas", lambda sigma: sigma),
    "sigma / (sigma + 1)": ("sigmas", lambda sigma: sigma / (sigma + 1)),
}


@dataclass(frozen=True)
class Table:
    """The times that a pipeline tells its transformer, in one form.

    Attributes:
        values: an entry per step.
        slack: how far each entry moves where the scheduler's was rounded before it was shifted;
            where nothing is shifted, that is as if the entry itself had been rounded.
    """

    values: list[float]
    slack: list[float]

    @classmethod
    def of(cls, entries: list[float], value: Callable[[float], float]) -> "Table":
        """Make the table of a form from that of a scheduler."""
        values = [value(entry) for entry in entries]
        rounded = [value(entry * (1 - _ROUNDING_BEFORE)) for entry in entries]
        moved = [abs(one - other) for one, other in zip(values, rounded, strict=True)]
        return cls(values, moved if value(0.0) else [0.0] * len(moved))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scale(self) -> float:
        """The largest entry."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    def nearest(self, value: float) -> int:
        """Return the index of the entry that is nearest to a time."""
        return min(range(len(self.values)), key=lambda i: abs(self.values[i] - value))

    def is_exact(self, index: int, value: float) -> bool:
        """Tell whether a time is an entry that was not rounded."""
        return abs(self.values[index] - value) <= _EXACT * self.scale

    def is_close(self, index: int, value: float) -> bool:
        """Tell whether a time is an entry, rounded maybe."""
        if not 0 <= index < len(self.values):
            return False
        # Some pipelines cut the timestep to a whole number.
        whole = 1.0 if self.scale > 100.0 and value.is_integer() else 0.0
        rounded = self.slack[index] + _ROUNDING * abs(value)
        tolerance = max(_EXACT * self.scale, rounded, whole)
        return abs(self.values[index] - value) <= tolerance


@dataclass(frozen=True)
class Place:
    """The place of a call in its scheduler's walk.

    Attributes:
        step: index of the denoising step in the scheduler's table.
        num_inference_steps: length of that table.
        restarted: a walk begins.
        moved: the first call of its step.
        stepped: the scheduler has taken the step before this one. Where it has not, the calls are
            no walk: a validation loss over shuffled clips, say.
    """

    step: int
    num_inference_steps: int
    restarted: bool
    moved: bool
    stepped: bool = True


class StepTracker:
    """Follows the walk of one scheduler.

    Args:
        scheduler: the scheduler that drives the transformer.
        times: what the transformer is told about the time, where pipelines differ.
        levels: it is told every noise level of a call once, as `HostSpec.levels` says.
    """

    def __init__(
        self, scheduler: Any, times: tuple[Time, ...] = ("t",), levels: bool = False
    ) -> None:
        self.scheduler = scheduler
        self._times, self._levels = times, levels
        self._time: Time = times[0]
        self._tables: tuple[Any, dict[Time, Table]] = (None, {})
        self._timesteps: Any = None
        self._step = -1
        self._value = float("nan")
        self._counter: int | None = None

    @property
    def is_set(self) -> bool:
        """The scheduler has been given the steps of a run, and not only those it was made with."""
        scheduler = self.scheduler
        if scheduler.timesteps is None:
            return False
        if hasattr(scheduler, "num_inference_steps"):
            return scheduler.num_inference_steps is not None
        # Some have the attribute only once they are set, others have none at all.
        config = getattr(scheduler, "config", {})
        return self.length != getattr(config, "num_train_timesteps", None)

    def index_of(self, timestep: torch.Tensor) -> int | None:
        """Return the entry of the table that all of `timestep` is a view of; None if it is not."""
        return _index_of_view(self.scheduler.timesteps, timestep) if "t" in self._times else None

    def expects(self, values: tuple[float, ...]) -> bool:
        """Tell whether a call at these times would be of the running step or the next one."""
        found = self._entry(values)
        if found is None:
            return False
        table, nearest, value = found
        if self._has_new_table:
            return nearest == (self._begin_index or 0)
        if self._counter != getattr(self.scheduler, "step_index", None):
            return table.is_close(self._step + 1, value)
        return value == self._value or table.is_close(self._step + 1, value)

    def fits(self, values: tuple[float, ...]) -> bool:
        """Tell whether one of these times is in the table."""
        return self._entry(values) is not None

    def place(self, values: tuple[float, ...], repeats: bool = False) -> Place:
        """Place a call.

        Args:
            values: the times it was given, latest first; `fits` holds for them.
            repeats: the step before has had a call of the same name.
        """
        found = self._entry(values)
        assert found is not None
        table, nearest, value = found
        # set_timesteps() makes a new table for every walk.
        restarted = self._has_new_table
        counter = getattr(self.scheduler, "step_index", None)
        following = self._step + 1
        moved, stepped, step = restarted, True, self._step
        if restarted:
            step = self._start(table, nearest, value)
        else:
            moved = value != self._value or counter != self._counter
            # Some schedulers do not count, and two neighbouring timesteps can round to one value.
            if not moved and repeats and counter is None:
                moved = table.is_close(following, value)
            if moved:
                step = following if table.is_close(following, value) else nearest
                restarted = step <= self._step
                stepped = restarted or counter is not None or not _counts(self.scheduler)
        self._timesteps, self._step = self.scheduler.timesteps, step
        self._value, self._counter = value, counter
        return Place(step, len(table), restarted, moved, stepped)

    @property
    def step(self) -> int:
        """Index of the running step in the table."""
        return self._step

    def read(self, timestep: torch.Tensor) -> tuple[float, ...] | None:
        """Return the times of a call, latest first.

        Most pipelines pass a view of one entry of their scheduler's table, which is known on the
        host. Anything else is read from the device, as `read_times` does.
        """
        index = self.index_of(timestep)
        if index is None:
            return read_times(timestep, self._levels)
        return (self._read_tables()["t"].values[index],)

    def _start(self, table: Table, nearest: int, value: float) -> int:
        """The entry at which a walk begins."""
        # The scheduler counts steps that were taken before, when none of their calls was placed.
        for begin in (getattr(self.scheduler, "step_index", None), self._begin_index):
            if begin is not None and table.is_close(begin, value):
                return begin
        # A rounded time may be nearer to a later entry than to the first.
        exact = table.is_exact(nearest, value)
        return nearest if exact or not table.is_close(0, value) else 0

    @property
    def length(self) -> int:
        """Number of entries of the table."""
        return len(self.scheduler.timesteps)

    @property
    def _has_new_table(self) -> bool:
        return self.scheduler.timesteps is not self._timesteps

    @property
    def _begin_index(self) -> int | None:
        """The entry at which an image-to-image pipeline has its scheduler begin."""
        return getattr(self.scheduler, "begin_index", None)

    def _entry(self, values: tuple[float, ...]) -> tuple[Table, int, float] | None:
        """The table, the entry nearest to one of the times, and that time; None: none is close."""
        tables = self._read_tables()
        if len(values) > 1 and not self._has_new_table:
            # Conditioning frames have a time of their own, which may be in the table too.
            values = tuple(sorted(values, key=self._is_unexpected))
        for value in values:
            fitting = []
            for time in self._times if self._has_new_table else (self._time,):
                table = tables[time]
                if not len(table):
                    continue
                nearest = table.nearest(value)
                if table.is_close(nearest, value):
                    fitting.append((nearest, time))
            if fitting:
                # A walk begins at or near the first entry of the right one.
                nearest, self._time = min(fitting, key=lambda entry: entry[0])
                return tables[self._time], nearest, value
        return None

    def _is_unexpected(self, value: float) -> tuple[bool, bool]:
        """A key that sorts the times of a call by how well they go on from the last one."""
        same = value == self._value
        follows = self._tables[1][self._time].is_close(self._step + 1, value)
        counter = getattr(self.scheduler, "step_index", None)
        went_on = counter is None or counter != self._counter
        return (not follows, not same) if went_on else (not same, not follows)

    def _read_tables(self) -> dict[Time, Table]:
        """The tables on the host, read once per walk."""
        if self._tables[0] is not self.scheduler.timesteps:
            steps, tables = self.length, {}
            for time in self._times:
                attribute, value = _TABLES[time]
                entries = getattr(self.scheduler, attribute, None)
                entries = [] if entries is None else entries[:steps].tolist()
                tables[time] = Table.of(list(map(float, entries)), value)
            self._tables = (self.scheduler.timesteps, tables)
        return self._tables[1]


def read_times(timestep: torch.Tensor, levels: bool = False) -> tuple[float, ...] | None:
    """Read the times of a call from its device, latest first.

    Args:
        timestep: a tensor of any shape. Image conditioning gives its clean frames time 0, or one of
            their own that may be above that of the others.
        levels: it holds every noise level of the call once, which are returned in rising order.

    Returns:
        None when the samples of the batch are at different times, as in training.
    """
    if timestep.numel() == 1:
        return (float(timestep),)
    if levels:
        return tuple(sorted(map(float, timestep.flatten().tolist())))
    rows = timestep.reshape(timestep.shape[0], -1)
    lows, highs = rows.aminmax(dim=1)
    bounds = torch.stack([lows.amin(), highs.amax(), lows.amax(), highs.amin()])
    low, high, other_low, other_high = map(float, bounds.tolist())
    if (low, high) != (other_low, other_high):
        return None
    return (high, low) if 0 < low < high else (high,)


def _counts(scheduler: Any) -> bool:
    """Tell whether a scheduler counts its steps."""
    return hasattr(scheduler, "step_index")


def _index_of_view(table: Any, timestep: torch.Tensor) -> int | None:
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
