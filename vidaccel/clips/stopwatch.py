"""The time of a run by three clocks: the wall's, CPU time of this process, and CPU time of others.

On a CPU that other programs use too, the clock on the wall says how busy the machine was as much as
how fast the run is. CPU time says what the run itself took; that of the others says why the two
differ. The load average (`os.getloadavg`) would not do: it is that of the last minute, counts this
process itself, and counts what waits for a disk. /proc/stat counts the CPU seconds of all programs
to within 10 ms, so that those of the others are exact over the very seconds of a run.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")


def machine_seconds() -> float | None:
    """Return the CPU seconds that all programs have used since the machine started.

    Time that a virtual machine's host gave to others (steal) counts: it was not to be had here.
    None where the system does not tell, as outside of Linux.
    """
    try:
        name, *ticks = STAT.read_text(encoding="ascii").partition("\n")[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
        if name != "cpu":
            return None
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Clocks:
    """Where times come from, in seconds.

    Attributes:
        wall: the clock on the wall.
        process: CPU time of this process, all its threads together.
        machine: CPU time of all programs; None where it is not known.
    """

    wall: Callable[[], float] = time.perf_counter
    process: Callable[[], float] = time.process_time
    machine: Callable[[], float | None] = machine_seconds


@dataclass(frozen=True)
class Times:
    """The seconds of a run, by three clocks.

    Attributes:
        wall: by the clock on the wall.
        cpu: CPU time of this process, all its threads together.
        others: CPU time of all other programs meanwhile; None where it is not known.
    """

    wall: float
    cpu: float
    others: float | None


class Stopwatch:
    """Runs from when it is made.

    Attributes:
        started: the clock on the wall then.
    """

    def __init__(self, clocks: Clocks | None = None) -> None:
        self._clocks = clocks or Clocks()
        self._machine, self._cpu = self._clocks.machine(), self._clocks.process()
        self.started = self._clocks.wall()

    def read(self) -> Times:
        """Return the times since."""
        wall = self._clocks.wall() - self.started
        cpu = self._clocks.process() - self._cpu
        machine = self._clocks.machine()
        if machine is None or self._machine is None:
            return Times(wall, cpu, None)
        return Times(wall, cpu, max(0.0, machine - self._machine - cpu))
