"""The work of a build, cut into items: what each of them costs, and how it is measured."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.calibration.replay import Replayer, find_metric
from vidaccel.calibration.segment_errors import (
    GAIN_INTERVAL,
    Errors,
    errors_from,
    gain_errors,
    segments,
)
from vidaccel.errors import BuildError, PlanError
from vidaccel.hosts.registry import config_of, find_transformers
from vidaccel.plans.plan import Plan
from vidaccel.shards import read_manifest

METHODS = ("exact", "gain", "lazy")

# A sample that is to be run with a plan; what comes back is the error of its outcome.
Trial = tuple[int, Plan]


@dataclass(frozen=True)
class SegmentsFrom:
    """All segments of one sample from one step on, each held one by a run of its own."""

    start: int

    @property
    def name(self) -> str:
        """The end of its shard's name, which tells it from others of the sample."""
        return f"{self.start:04d}"

    def forwards(self, task: "Task") -> int:
        """Count the steps with all their blocks that it takes."""
        total = task.num_inference_steps
        return sum(
            total - end for start, end in segments(total, task.max_skip) if start == self.start
        )

    def measure(self, replayer: Replayer, task: "Task") -> Errors:
        """Return the errors, and those of lines where the task asks for them."""
        return errors_from(replayer, task.max_skip, self.start, lines=task.lines)


@dataclass(frozen=True)
class OneSegment:
    """One held segment of one sample, by a run of its own."""

    start: int
    end: int

    @property
    def name(self) -> str:
        """The end of its shard's name, which tells it from others of the sample."""
        return f"{self.start:04d}-{self.end:04d}"

    def forwards(self, task: "Task") -> int:
        """Count the steps with all their blocks that it takes."""
        return task.num_inference_steps - self.end

    def measure(self, replayer: Replayer, task: "Task") -> Errors:
        """Return the error of this segment."""
        return Errors({(self.start, self.end): replayer.error(self.start, self.end)})


@dataclass(frozen=True)
class AllByGain:
    """All segments of one sample, estimated by how far they move it and how much that grows."""

    @property
    def name(self) -> str:
        """The end of its shard's name, which tells it from others of the sample."""
        return "all"

    def forwards(self, task: "Task") -> int:
        """Count the steps with all their blocks that it takes."""
        total = task.num_inference_steps
        return sum(total - end for end in range(2, total, GAIN_INTERVAL))

    def measure(self, replayer: Replayer, task: "Task") -> Errors:
        """Return the errors, and those of lines where the task asks for them."""
        return gain_errors(replayer, task.max_skip, lines=task.lines)


WorkItem = SegmentsFrom | OneSegment | AllByGain


@dataclass(frozen=True)
class Task:
    """All that decides what a build measures; equal tasks may share a work folder.

    Attributes:
        prompts, seeds: every prompt is run with every seed.
        num_inference_steps: T, the steps that a run makes.
        max_skip: longest segment.
        method: "exact", "gain" or "lazy".
        call: the arguments of the pipeline's call but the prompt.
        model: what tells this model from others, see `model_identity`.
        lines: measure forecasts along lines too.
        metric: a name of `replay.METRICS`.
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

    def asked_for(self, steps: int) -> int:
        """Return the `num_inference_steps` of a call that makes so many steps."""
        asked: int = self.call["num_inference_steps"]
        return steps + asked - self.num_inference_steps

    def samples(self) -> list[tuple[str, int]]:
        """Return (prompt, seed) of each generation that is measured."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def items(self) -> list[WorkItem]:
        """Return the items of one sample that are known before the work begins."""
        if self.method == "exact":
            return [SegmentsFrom(start) for start in range(self.num_inference_steps - 1)]
        return [AllByGain()]

    def forwards(self) -> int:
        """Count the forwards of the whole task; of "lazy", whose last part is not known, about."""
        steps = self.num_inference_steps
        each = steps + sum(item.forwards(self) for item in self.items())
        if self.method == "lazy":
            # Seen on plans of a half to a fifth of 50 steps: 2 steps' worth of segments, 4 rounds.
            each += (2 * steps * steps) // 4 + 4 * steps
        return each * len(self.samples()) + steps - steps // 2

    def manifest(self) -> dict[str, Any]:
        """Return the fields of the task, without the options that are as in the paper."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


def read_task(folder: Path) -> Task:
    """Read the task of a work folder; raises BuildError when there is none."""
    try:
        found = read_manifest(folder)
        return Task(**{**found, "prompts": tuple(found["prompts"]), "seeds": tuple(found["seeds"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BuildError(f"{folder} is no work folder of a build: {error}") from error


def model_identity(pipe: Any) -> dict[str, Any]:
    """Return what tells this pipeline's transformers from others: class, config, some weights."""
    found = {}
    for name, (transformer, _) in find_transformers(pipe).items():
        digest = sha256()
        for key, parameter in _small_parameters(transformer):
            digest.update(key.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        found[name] = {
            "class": type(transformer).__name__,
            "config": {key: str(value) for key, value in config_of(transformer).items()},
            "weights": digest.hexdigest(),
        }
    return found


def _small_parameters(transformer: Any) -> Iterator[tuple[str, Any]]:
    # Hashing billions of weights would take as long as a generation; every layer has small ones.
    return ((k, p) for k, p in transformer.named_parameters() if p.numel() <= 2**16)
