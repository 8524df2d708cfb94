"""The settings of a grid: schedulers, shifts, numbers of steps and guidance scales."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of the grid.

    Attributes:
        scheduler: a name in `SCHEDULERS`.
        shift: shift of its noise levels.
        steps: T.
        guidance: guidance scale; 1 is none.
    """

    scheduler: str
    shift: float
    steps: int
    guidance: float

    def __str__(self) -> str:
        return (
            f"{self.scheduler}, shift {self.shift:g}, {self.steps} steps, "
            f"guidance {self.guidance:g}"
        )


# Scheduler -> its class in Diffusers and its arguments but the shift, whose name is the last.
SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}, "shift"),
    "UniPC": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "flow_shift",
    ),
    "DPM++ 2M": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        "flow_shift",
    ),
}

# 12 of the 108 settings of {Euler, UniPC, DPM++ 2M} x shift {1, 3, 7} x {16, 30, 50, 100} steps x
# guidance {1, 5, 9}: every number of steps with each scheduler, each shift and each guidance once,
# and the first nine have each scheduler with each shift.
GRID = (
    Setting("Euler", 1.0, 50, 5.0),
    Setting("UniPC", 3.0, 50, 9.0),
    Setting("DPM++ 2M", 7.0, 50, 1.0),
    Setting("Euler", 3.0, 30, 1.0),
    Setting("UniPC", 7.0, 30, 5.0),
    Setting("DPM++ 2M", 1.0, 30, 9.0),
    Setting("Euler", 7.0, 16, 9.0),
    Setting("UniPC", 1.0, 16, 1.0),
    Setting("DPM++ 2M", 3.0, 16, 5.0),
    Setting("Euler", 1.0, 100, 1.0),
    Setting("UniPC", 3.0, 100, 5.0),
    Setting("DPM++ 2M", 7.0, 100, 9.0),
)


def scheduler_of(setting: Setting) -> Any:
    """Return a scheduler of Diffusers for a setting."""
    import diffusers

    name, arguments, shift = SCHEDULERS[setting.scheduler]
    return getattr(diffusers, name)(**arguments, **{shift: setting.shift})
