"""The work of a build: cut into units, each of which leaves one small shard file.

A build that was killed goes on from the shards that are there. A folder of another build is
refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.errors import BuildError, PlanError
from vidaccel.files import write_text
from vidaccel.lemica.calibrate import segments

METHODS = ("exact", "gain")

Errors = dict[tuple[int, int], float]


@dataclass(frozen=True)
class Task:
    """What a build measures; equal tasks may share a work folder.

    Attributes:
        prompts, seeds: every prompt is run with every seed.
        num_inference_steps: T.
        max_skip: longest segment.
        method: "exact" or "gain".
        call: the other arguments of the pipeline's call.
        model: what tells this model from others.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    num_inference_steps: int
    max_skip: int
    method: str
    call: dict[str, Any]
    model: dict[str, Any]

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        if steps < 3:
            raise PlanError(f"num_inference_steps: found {steps}, calibration needs 3 or more")
        if not 2 <= self.max_skip < steps:
            raise PlanError(f"max_skip: found {self.max_skip}, expected 2 to {steps - 1}")
        if self.method not in METHODS:
            raise PlanError(f"method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        for name in ("prompts", "seeds"):
            if not getattr(self, name):
                raise PlanError(f"{name}: found none, expected at least one")
        if not all(prompt.strip() for prompt in self.prompts):
            raise PlanError("prompts: found an empty one")

    def samples(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each generation that is measured."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def starts(self) -> list[int | None]:
        """The units of one sample: the step that its segments start from; None for all at once."""
        return list(range(self.num_inference_steps - 1)) if self.method == "exact" else [None]

    def cost(self, start: int | None) -> int:
        """Steps that a unit computes, roughly."""
        steps = self.num_inference_steps
        if start is None:
            return 8 * steps
        ends = [end for s, end in segments(steps, self.max_skip) if s == start]
        return sum(steps - end + 1 for end in ends)

    def fingerprint(self) -> dict[str, Any]:
        """The task as JSON keeps it."""
        return json.loads(json.dumps(vars(self), default=str))


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
            differing = [key for key in wanted if found.get(key) != wanted[key]]
            if differing:
                raise BuildError(
                    f"{path} belongs to another build: its {', '.join(differing)} "
                    f"{'differs' if len(differing) == 1 else 'differ'}; use another work folder"
                )
        else:
            self._write(manifest, wanted)

    def load(self, sample: int, start: int | None) -> Errors | None:
        """The errors of a unit, or None when it is still to be measured."""
        file = self._file(sample, start)
        if not file.exists():
            return None
        return {(int(s), int(e)): float(error) for s, e, error in _read(file)}

    def save(self, sample: int, start: int | None, errors: Errors) -> None:
        """Keep the errors of a unit."""
        self._write(self._file(sample, start), [[s, e, error] for (s, e), error in errors.items()])

    def _file(self, sample: int, start: int | None) -> Path:
        return self.path / f"sample-{sample:04d}-{'all' if start is None else f'{start:04d}'}.json"

    def _write(self, file: Path, data: Any) -> None:
        try:
            write_text(file, json.dumps(data, sort_keys=True) + "\n")
        except OSError as error:
            raise BuildError(
                f"cannot write {file}: {error.strerror}; what was measured before is kept, and "
                "the same command goes on from there"
            ) from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot read {file} ({error}); remove it and run again") from error
