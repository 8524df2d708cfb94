"""The work folder of a build: a small file for each work item that was measured.

A build that was killed goes on from the files that are there. A folder of another build is refused.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.calibration.segment_errors import Errors
from vidaccel.calibration.task import Task, WorkItem
from vidaccel.errors import BuildError
from vidaccel.plans.plan import Plan
from vidaccel.shards import ShardFolder


class WorkFolder:
    """The shards of one task.

    Args:
        path: the folder; made if need be.
        task: what is measured.

    Raises:
        BuildError: the folder belongs to another task, or cannot be read or written.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self._shards = ShardFolder(path, task.manifest(), "build", BuildError)

    def load(self, sample: int, item: WorkItem) -> Errors | None:
        """Read the errors of a work item; None when it is still to be measured."""
        return self._shards.read(_item_name(sample, item), _parsed)

    def save(self, sample: int, item: WorkItem, errors: Errors) -> None:
        """Keep the errors of a work item."""
        rows = [[*segment, error] for segment, error in errors.holds.items()]
        lines = [[*line, row] for line, row in errors.lines.items()]
        self._shards.write(_item_name(sample, item), [*rows, *lines])

    def load_trial(self, sample: int, plan: Plan) -> float | None:
        """Read the error of a run with a plan; None when it is still to be made."""
        return self._shards.read(_trial_name(sample, plan), lambda data: float(data["error"]))

    def save_trial(self, sample: int, plan: Plan, error: float) -> None:
        """Keep the error of a run with a plan."""
        self._shards.write(_trial_name(sample, plan), {**_parts(plan), "error": error})


def _item_name(sample: int, item: WorkItem) -> str:
    return f"sample-{sample:04d}-{item.name}"


def _trial_name(sample: int, plan: Plan) -> str:
    digest = sha256(json.dumps(_parts(plan)).encode()).hexdigest()[:16]
    return f"trial-{sample:04d}-{digest}"


def _parts(plan: Plan) -> dict[str, Any]:
    return {"steps": plan.steps, "orders": plan.orders, "scales": plan.scales}


def _parsed(rows: list[Any]) -> Errors:
    """Read the rows of a shard: start, end and error, and of a line the previous step, too."""
    found = Errors()
    for *ends, value in rows:
        if len(ends) == 2:
            found.holds[int(ends[0]), int(ends[1])] = float(value)
        else:
            start, end, previous = map(int, ends)
            found.lines[start, end, previous] = tuple(map(float, value))
    return found
