"""The policy file: which steps to compute for one model and number of steps, and what that costs.

One JSON file, schema version 1. It is untrusted input: its size is bounded, every value has a
strict type and range, names cannot be paths, and nothing in it is executed. `policies/README.md`
explains every field.
"""

import itertools
import math
import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from vidaccel.errors import PlanError, PolicyError
from vidaccel.plans import store
from vidaccel.plans.edge import Edge, without_reuse
from vidaccel.plans.fidelity import predicted_psnr
from vidaccel.plans.plan import FEW_STEPS, PRESETS, Plan, RunSettings
from vidaccel.plans.schema import (
    MAX_STEPS,
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    Budget,
    Digest,
    Error,
    Errors,
    FidelityPoint,
    GuidanceInfo,
    LatentSize,
    ModelInfo,
    Name,
    Objective,
    Pixels,
    Record,
    SchedulerInfo,
    Steps,
    StoredEdge,
    StoredPlan,
    Text,
    Validation,
    check_errors,
)
from vidaccel.plans.store import shortened
from vidaccel.plans.table import plan_table, ranges, what_is_missing

FULL = "full precision"

# Noise grids agree when every entry does to this relative difference: float32 rounding, no more.
GRID_TOLERANCE = 1e-4

# What files of schema 1.2 have not.
_NEWER = ("latents", "adapters", "level", "fidelity")


class CachePolicy(Record):
    """A policy: plans for every budget of one model and number of steps, with their evidence."""

    schema_version: Annotated[str, StringConstraints(pattern=r"^\d{1,4}\.\d{1,4}$")]
    model: ModelInfo
    num_inference_steps: Steps
    scheduler: SchedulerInfo = SchedulerInfo()
    guidance: GuidanceInfo = GuidanceInfo()
    width: Pixels | None = None
    height: Pixels | None = None
    frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    latents: Annotated[tuple[LatentSize, ...], Field(max_length=8)] | None = None
    adapters: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    level: Error | None = None
    quantity: Literal["stack_residual"] = "stack_residual"
    max_skip: Steps | None = None
    edges: Annotated[tuple[StoredEdge, ...], Field(max_length=200_000)] = ()
    noise_floor: Error | None = None
    objective: Objective | None = None
    plans: Annotated[dict[Budget, StoredPlan], Field(min_length=1, max_length=MAX_STEPS)]
    prompts: Annotated[tuple[Text, ...], Field(max_length=10_000)] = ()
    prompts_hash: Digest | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=10_000)] = ()
    attention: Name | None = None
    fidelity: Annotated[tuple[FidelityPoint, ...], Field(max_length=100)] = ()
    validation: Annotated[tuple[Validation, ...], Field(max_length=10_000)] | None = None
    provenance: Literal["measured", "learned", "published", "transferred"]
    source: Text | None = None
    versions: Annotated[dict[Name, Text], Field(default_factory=dict, max_length=100)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = self.num_inference_steps
        sigmas = self.scheduler.sigmas
        if sigmas is not None and len(sigmas) != total:
            raise ValueError(f"scheduler.sigmas: found {len(sigmas)} entries, expected {total}")
        errors = self._edge_errors()
        for budget, stored in self.plans.items():
            try:
                plan = stored.to_plan(total)
            except PlanError as error:
                raise ValueError(f"plans.{budget}: {error}") from error
            steps = len(plan.steps)
            if steps != int(budget):
                raise ValueError(f"plans.{budget}: found {steps} steps, expected {budget}")
            if stored.stability and len(stored.stability) != steps:
                raise ValueError(
                    f"plans.{budget}.stability: found {len(stored.stability)} entries, "
                    f"expected {steps}"
                )
            if errors:
                check_errors(budget, plan, errors)
        for (low, above), (high, below) in itertools.pairwise(self.fidelity):
            if not (low < high and above >= below):
                raise ValueError(
                    f"fidelity: found {high} after {low}, expected rising errors and falling PSNR"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a file of schema 1.2 has not."""
        found: dict[str, Any] = handler(self)
        return {k: v for k, v in found.items() if v or k not in _NEWER}

    def _edge_errors(self) -> Errors:
        """Return the error of each edge; raises ValueError when one cannot be or is there twice."""
        total = self.num_inference_steps
        errors = {}
        for edge in map(StoredEdge.to_edge, self.edges):
            if not edge.start < edge.end <= total:
                raise ValueError(f"edges: found {edge.start} to {edge.end} in {total} steps")
            if edge.order and not (edge.previous is not None and edge.previous < edge.start):
                raise ValueError(
                    f"edges: found a forecast from {edge.start} to {edge.end} with previous "
                    f"{edge.previous}, expected a step before {edge.start}"
                )
            if edge.action in errors:
                raise ValueError(f"edges: found {edge.start} to {edge.end} twice, expected once")
            errors[edge.action] = edge.error
        return errors

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CachePolicy":
        """Read a policy file.

        Raises:
            PolicyError: missing, too large, not JSON, or a field that is wrong: the message names
                the field, what was found and what is expected.
        """
        file = Path(path)
        raw = store.read(file)
        try:
            return cls.from_json(raw)
        except PolicyError as error:
            raise PolicyError(f"policy {file}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "CachePolicy":
        """Read a policy from a file, a folder with a `vidaccel_policy.json`, or a hub id.

        Args:
            source: where the policy is.
            revision: branch, tag or commit of a hub repository.
            token: for the hub; None uses the one that is logged in.

        Raises:
            PolicyError: as `load` does, or when the hub has no such repository or file.
        """
        return cls.load(store.find(source, revision, token))

    @classmethod
    def from_json(cls, raw: bytes | str) -> "CachePolicy":
        """Parse the text of a policy file; raises PolicyError as `load` does."""
        text, data = store.parse(raw)
        version = store.version_of(data.get("schema_version"), SCHEMA_MAJOR)
        if version > (SCHEMA_MAJOR, SCHEMA_MINOR):
            warnings.warn(
                f"policy of schema {version[0]}.{version[1]}: fields newer than "
                f"{SCHEMA_MAJOR}.{SCHEMA_MINOR} are left out; update vidaccel to use them",
                stacklevel=3,
            )
        elif unknown := sorted(set(data) - set(cls.model_fields)):
            raise PolicyError(f"{shortened(unknown[0])}: found an unknown field")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(shortened(str(part)) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            found = "" if not where else f", found {shortened(repr(first['input']))}"
            raise PolicyError(f"{where}: {message}{found}" if where else message) from error

    def to_json(self) -> str:
        """Return the text of the file: sorted keys, one line per list of numbers and per edge."""
        return store.to_text(self.model_dump(mode="json"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy file, whole or not at all."""
        store.write(Path(path), self.to_json())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the policy into a folder, under the name that `from_pretrained` looks for."""
        self.save(Path(folder) / store.FILE_NAME)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload the policy to a model repository on the hub, which is made if need be.

        Args:
            repo_id: user/name.
            commit_message: None says how many steps the policy is for.
            private: whether a new repository is private; None takes the account's default.
            token: None uses the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            PolicyError: the hub refused it or cannot be reached.
        """
        message = commit_message or f"Upload a policy of {self.num_inference_steps} steps"
        return store.upload(self.to_json(), repo_id, message=message, private=private, token=token)

    def search_edges(self) -> list[Edge]:
        """Return the stored edges and those without reuse, for `lemica.search.solve_edges`."""
        return without_reuse(self.num_inference_steps) + [edge.to_edge() for edge in self.edges]

    def budgets(self) -> list[int]:
        """Return the numbers of computed steps that have a plan, in order."""
        return sorted(map(int, self.plans))

    def table(self) -> str:
        """Return what the policy says, for people: a line per budget, C computed, - reused."""
        name = self.model.id or self.model.transformer
        heading = f"{name}: {self.num_inference_steps} steps, {self.provenance}"
        if self.source:
            heading += f", {self.source}"
        psnr = {row.budget: row.psnr for row in self.validation or () if row.kept}
        plans = {budget: self.plan(budget=budget) for budget in self.budgets()}
        missing = what_is_missing(plans, psnr, published=self.provenance == "published")
        return "\n".join(
            [heading, "", *plan_table(plans, psnr), *([""] if missing else []), *missing]
        )

    @property
    def fastest(self) -> float:
        """The largest speedup of any plan, counting computed steps alone."""
        return self.num_inference_steps / min(self.budgets())

    def plan(
        self,
        *,
        budget: int | None = None,
        speedup: float | None = None,
        max_error: float | None = None,
        psnr: float | None = None,
    ) -> Plan:
        """Return the plan for one wish.

        Args:
            budget: exactly this many computed steps.
            speedup: the largest budget that is at least this many times faster, counting computed
                steps alone.
            max_error: the smallest budget of which no segment has a larger error.
            psnr: the smallest budget whose clip is predicted to come so close to the plain one, in
                dB.

        Raises:
            PolicyError: not exactly one wish, or no plan that fulfils it.
        """
        wishes = {"budget": budget, "speedup": speedup, "max_error": max_error, "psnr": psnr}
        given = {name: value for name, value in wishes.items() if value is not None}
        if len(given) != 1:
            raise PolicyError(f"plan() takes one of {', '.join(wishes)}, found {len(given)}")
        total, known = self.num_inference_steps, self.budgets()
        if budget is not None:
            fitting = [b for b in known if b == budget]
        elif speedup is not None:
            fitting = [b for b in reversed(known) if total / b >= speedup]
        elif psnr is not None:
            if not self.fidelity:
                raise PolicyError(
                    f"psnr: found {psnr}, but this policy predicts none: it was never validated"
                )
            fitting = [b for b in known if (self.predicted_psnr(b) or 0.0) >= psnr]
        else:
            fitting = [b for b in known if self._largest_error(b) <= (max_error or 0.0)]
        if not fitting:
            (name, value), *_ = given.items()
            raise PolicyError(
                f"{name}: found {value}, expected one that a plan fulfils; this policy has the "
                f"budgets {ranges(known)} of {total} steps"
            )
        return self.plans[str(fitting[0])].to_plan(total)

    def predicted_psnr(self, budget: int) -> float | None:
        """Return the PSNR in dB that the plan of a budget is predicted to reach; None: unknown."""
        plan = self.plans[str(budget)].to_plan(self.num_inference_steps)
        run = {row.budget: row.psnr for row in self.validation or () if row.kept}
        return predicted_psnr(self.fidelity, plan, run) if self.fidelity else None

    def _largest_error(self, budget: int) -> float:
        return max(self.plans[str(budget)].errors, default=math.inf)

    def preset(self, name: str) -> Plan:
        """Return the plan for "quality", "balanced" or "fast", or the fastest there is."""
        return self.plan(speedup=min(PRESETS[name], self.fastest))

    def fits(self, run: RunSettings) -> bool:
        """Tell whether the policy is for this run: known to be of its model, and passes `check`."""
        if self.model.proof(run) is None:
            return False
        try:
            self.check(run)
        except PolicyError:
            return False
        return True

    def check(self, run: RunSettings) -> None:
        """Hold the policy against a run.

        Raises:
            PolicyError: naming the first field that does not match, what it has and what the run
                has. Fields that are null are not checked.
        """
        self.check_model(run)
        total, steps = self.num_inference_steps, run.num_inference_steps
        if total != steps:
            raise _other("num_inference_steps", total, steps, run)
        name = self.scheduler.name
        if None not in (name, run.scheduler) and name != run.scheduler:
            raise _other("scheduler.name", name, run.scheduler, run)
        grid, other = self.scheduler.sigmas, run.sigmas
        if grid is None or other is None:
            shift = self.scheduler.shift
            if None not in (shift, run.shift) and shift != run.shift:
                raise _other("scheduler.shift", shift, run.shift, run)
            return
        for step, (a, b) in enumerate(zip(grid, other, strict=True)):
            if abs(a - b) > GRID_TOLERANCE * max(a, b):
                raise PolicyError(
                    f"scheduler.sigmas: the policy has {a:.5f} at step {step}, this run has "
                    f"{b:.5f}: use the scheduler settings that it was measured with"
                )

    def check_model(self, run: RunSettings) -> None:
        """Hold the model alone against a run; raises PolicyError as `check` does."""
        for field, stored, actual in self.model.contradictions(run):
            raise _other(f"model.{field}", stored, actual, run)

    def doubt(self, run: RunSettings) -> str:
        """Return what is not known of the model of a run that passes `check`; empty: nothing."""
        doubts = [self._doubt_of_model(run)]
        if self.model.precision != run.precision:
            there, here = self.model.precision or FULL, run.precision or FULL
            doubts.append(f"measured in {there}, and this run is in {here}")
        return "; ".join(filter(None, doubts))

    def _doubt_of_model(self, run: RunSettings) -> str:
        model, proof = self.model, self.model.proof(run)
        if proof in ("id", "hash"):
            return ""
        if proof == "config":
            told = "model told" if model.id is None else f"model taken for {model.id}"
            return f"{told} by its class and config alone"
        if run.pipeline is not None and model.pipeline not in (None, run.pipeline):
            return f"model not checked: the policy is for {model.pipeline}, this is {run.pipeline}"
        wanted = model.id or "the one it was made for"
        return f"model not checked beyond its class: nothing says that this is {wanted}"


def _other(field: str, stored: Any, actual: Any, run: RunSettings) -> PolicyError:
    """Return the error about a field that does not match."""
    message = f"{field}: the policy is for {stored}, this run has {actual}"
    if run.adapters and run.num_inference_steps < FEW_STEPS:
        message += (
            f" and the adapters {', '.join(run.adapters)}: a few-step model has no step to spare, "
            "use policy=None"
        )
    return PolicyError(message)
