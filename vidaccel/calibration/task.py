"""The work of a build: cut into units, each of which leaves one small shard file.

A build that was killed goes on from the shards that are there. A folder of another build is
refused.
"""

import json
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.calibration.replay import find_metric
from vidaccel.calibration.segment_errors import GAIN_INTERVAL, Errors, segments
from vidaccel.errors import BuildError, PlanError
from vidaccel.files import write_text
from vidaccel.plans.plan import Plan

METHODS = ("exact", "gain", "lazy")

# A part of the work on one sample: all segments from one step on, one segment, or (None) all
# segments by their gain.
Unit = int | tuple[int, int] | None


@dataclass(frozen=True)
class Task:
    """What a build measures; equal tasks may share a work folder.

    Attributes:
        prompts, seeds: every prompt is run with every seed.
        num_inference_steps: T.
        max_skip: longest segment.
        method: "exact", "gain" or "lazy".
        call: the other arguments of the pipeline's call.
        model: what tells this model from others.
        lines: measure forecasts along lines too.
        metric: of `replay.METRICS`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_inference_steps: int
    max_skip: int
    method: str
    call: dict[str, Any]
    model: dict[str, Any]
    lines: bool = False
    metric: str = "l1"

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if steps < 3:
            raise PlanError(f"num_inference_steps: found {steps}, calibration needs 3 or more")
        if not 2 <= self.max_skip < steps:
            raise PlanError(f"max_skip: found {self.max_skip}, expected 2 to {steps - 1}")
        if self.method not in METHODS:
            raise PlanError(f"method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        find_metric(self.metric)
        for name in ("prompts", "seeds"):
            if not getattr(self, name):
                raise PlanError(f"{name}: found none, expected at least one")
        if not all(prompt.strip() for prompt in self.prompts):
            raise PlanError("prompts: found an empty one")

    def samples(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each generation that is measured."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def units(self) -> list[Unit]:
        """The units of one sample that are known before the work begins."""
        return list(range(self.num_inference_steps - 1)) if self.method == "exact" else [None]

    def cost(self, unit: Unit) -> int:
        """Forwards that a unit takes: steps with all their blocks."""
        steps = self.num_inference_steps
        if unit is None:
            return sum(steps - end for end in range(2, steps, GAIN_INTERVAL))
        if isinstance(unit, tuple):
            return steps - unit[1]
        return sum(steps - end for start, end in segments(steps, self.max_skip) if start == unit)

    def forwards(self) -> int:
        """Forwards of the whole task; of "lazy", whose last part is not known before, about."""
        steps = self.num_inference_steps
        each = steps + sum(map(self.cost, self.units()))
        if self.method == "lazy":
            # Seen on plans of a half to a fifth of 50 steps: 2 steps' worth of segments, 4 rounds.
            each += (2 * steps * steps) // 4 + 4 * steps
        return each * len(self.samples()) + steps - steps // 2

    def fingerprint(self) -> dict[str, Any]:
        """The task as JSON keeps it, without the options that are as in the paper."""
        kept = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
        return found


class WorkFolder:
    """The shards of one task.

    Args:
        path: the folder; made if need be.
        task: what is measured.

    Raises:
        BuildError: the folder belongs to another task, or cannot be written.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self.path = path
        manifest = path / "task.json"
        wanted = task.fingerprint()
        if manifest.exists():
            found = _read(manifest)
            keys = sorted({*wanted, *found})
            differing = [key for key in keys if found.get(key) != wanted.get(key)]
            if differing:
                raise BuildError(
                    f"{path} belongs to another build: its {', '.join(differing)} "
                    f"{'differs' if len(differing) == 1 else 'differ'}; use another work folder"
                )
        else:
            self._write(manifest, wanted)

    def load(self, sample: int, unit: Unit) -> Errors | None:
        """The errors of a unit, or None when it is still to be measured."""
        file = self._file(sample, unit)
        if not file.exists():
            return None
        found = Errors()
        try:
            for *ends, value in _read(file):
                if len(ends) == 2:
                    found.holds[int(ends[0]), int(ends[1])] = float(value)
                else:
                    start, end, previous = map(int, ends)
                    found.lines[start, end, previous] = tuple(map(float, value))
        except (TypeError, ValueError) as error:
            raise BuildError(f"cannot read {file} ({error}); remove it and run again") from error
        return found

    def extra(self, sample: int) -> list[tuple[int, int]]:
        """The single segments of a sample that were measured."""
        names = [file.stem.split("-") for file in self.path.glob(f"sample-{sample:04d}-*-*.json")]
        return sorted((int(start), int(end)) for _, _, start, end in names)

    def save(self, sample: int, unit: Unit, errors: Errors) -> None:
        """Keep the errors of a unit."""
        rows = [[*segment, error] for segment, error in errors.holds.items()]
        lines = [[*line, row] for line, row in errors.lines.items()]
        self._write(self._file(sample, unit), [*rows, *lines])

    def load_trial(self, sample: int, plan: Plan) -> float | None:
        """The error of a run with a plan, or None when it is still to be made."""
        file = self._trial(sample, plan)
        if not file.exists():
            return None
        try:
            return float(_read(file)["error"])
        except (TypeError, KeyError, ValueError) as error:
            raise BuildError(f"cannot read {file} ({error}); remove it and run again") from error

    def save_trial(self, sample: int, plan: Plan, error: float) -> None:
        """Keep the error of a run with a plan."""
        self._write(self._trial(sample, plan), {**_parts(plan), "error": error})

    def _trial(self, sample: int, plan: Plan) -> Path:
        digest = sha256(json.dumps(_parts(plan)).encode()).hexdigest()[:16]
        return self.path / f"trial-{sample:04d}-{digest}.json"

    def _file(self, sample: int, unit: Unit) -> Path:
        ends = unit if isinstance(unit, tuple) else (unit,)
        name = "all" if unit is None else "-".join(f"{end:04d}" for end in ends)
        return self.path / f"sample-{sample:04d}-{name}.json"

    def _write(self, file: Path, data: Any) -> None:
        try:
            write_text(file, json.dumps(data, sort_keys=True) + "\n")
        except OSError as error:
            raise BuildError(
                f"cannot write {file}: {error.strerror}; what was measured before is kept, and "
                "the same command goes on from there"
            ) from error


def _parts(plan: Plan) -> dict[str, Any]:
    return {"steps": plan.steps, "orders": plan.orders, "scales": plan.scales}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read {file} ({error}); remove it and run again") from error
