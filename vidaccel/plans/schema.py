"""The parts of a policy file, each with strict types and ranges."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from vidaccel.plans.edge import Edge, edges_of
from vidaccel.plans.forecast import MAX_ORDER, MAX_SCALE, is_guided
from vidaccel.plans.plan import Plan, RunSettings

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 4
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"

# By `Edge.action`: what an edge does -> what it costs.
Errors = Mapping[tuple[int, int, int, float, int | None], float]

MAX_STEPS = 1000
MAX_ENTRIES, MAX_WORD, MAX_NUMBER = 256, 128, 2**53

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"


def _no_parent(text: str) -> str:
    if ".." in text:
        raise ValueError("a model id is no path")
    return text


def _plain(value: Any) -> Any:
    short = len(value) <= MAX_WORD if isinstance(value, str) else value is None
    if not short and not (isinstance(value, int) and abs(value) <= MAX_NUMBER):
        raise ValueError(
            f"an entry is a whole number, true, false, null or a text of at most {MAX_WORD} letters"
        )
    return value


Name = Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
Entry = Annotated[Any, BeforeValidator(_plain)]
ModelId = Annotated[
    str,
    StringConstraints(pattern=rf"^{_NAME}(/{_NAME})?$"),
    AfterValidator(_no_parent),
]
Text = Annotated[str, StringConstraints(max_length=4000)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Step = Annotated[int, Field(ge=0, le=MAX_STEPS)]
Order = Annotated[int, Field(ge=0, le=MAX_ORDER)]
Scale = Annotated[float, Field(ge=0.0, le=MAX_SCALE)]
Error = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
FidelityPoint = tuple[Annotated[float, Field(gt=0)], float]
LatentSize = Annotated[int, Field(ge=1, le=10_000_000)]
Pixels = Annotated[int, Field(ge=1, le=16384)]
Budget = Annotated[str, StringConstraints(pattern=r"^[1-9]\d{0,3}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Objective = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(\(\d+(\.\d+)?\))?$")]


class Record(BaseModel):
    """Base of all parts: frozen, strict, finite numbers only."""

    # Lax only where JSON is: a list for a tuple, a whole number for a float.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)


class ModelInfo(Record):
    """The model: class, hub id and config of its transformer, and its pipeline (None: not known).

    `config` are the entries of the config that tell it from others, where None is a value;
    `precision` is the low precision that it was measured in; None: as it was loaded.
    `config_hash` is the hash of all that are no defaults of the class; in files of before, that of
    all. `experts` is the number of transformers.
    """

    transformer: Name
    id: ModelId | None = None
    config_hash: Digest | None = None
    config: Annotated[dict[Name, Entry], Field(max_length=MAX_ENTRIES)] | None = None
    pipeline: Name | None = None
    experts: Annotated[int, Field(ge=1, le=16)] | None = None
    precision: Annotated[str, StringConstraints(max_length=256)] | None = None

    @classmethod
    def of(cls, run: RunSettings) -> Self:
        """Return the record of the model of a run."""
        return cls(
            transformer=str(run.transformer),
            id=run.model_id,
            config_hash=run.config_hash,
            config=None if run.config is None else dict(run.config),
            pipeline=run.pipeline,
            experts=run.experts,
            precision=run.precision,
        )

    def contradictions(self, run: RunSettings) -> Iterator[tuple[str, Any, Any]]:
        """Find the fields in which a run has another model: name, value here, value there."""
        known = {
            "transformer": run.transformer,
            "id": run.model_id,
            "experts": run.experts,
        }
        for name, actual in known.items():
            stored = getattr(self, name)
            if stored is not None and actual is not None and stored != actual:
                yield name, stored, actual
        for name, stored in (self.config or {}).items():
            if run.config is not None and run.config.get(name, stored) != stored:
                yield f"config.{name}", stored, run.config[name]
        if None not in (self.config_hash, run.config_hash) and not self._has_hash_of(run):
            yield "config_hash", self.config_hash, run.config_hash

    def proof(self, run: RunSettings) -> Literal["id", "hash", "config"] | None:
        """Return what shows that a run without contradictions has this model; None: nothing does.

        A config shows it only in the same pipeline, since others edit pictures with the same one.
        """
        if self.id is not None and self.id == run.model_id:
            return "id"
        same = self.pipeline in (None, run.pipeline)
        if self._has_hash_of(run):
            return "hash" if same or run.pipeline is None else None
        same = same and self.experts in (None, run.experts)
        if self.config and run.config and self.config.items() <= run.config.items():
            return "config" if same else None
        return None

    def _has_hash_of(self, run: RunSettings) -> bool:
        known = (run.config_hash, run.full_config_hash)
        return self.config_hash is not None and self.config_hash in known

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a file of schema 1.1 has not."""
        newer = ("config", "pipeline", "experts", "precision")
        found: dict[str, Any] = handler(self)
        return {k: v for k, v in found.items() if v is not None or k not in newer}


class SchedulerInfo(Record):
    """The scheduler: class, shift and noise levels of the steps (None: not checked)."""

    name: Name | None = None
    shift: Annotated[float, Field(gt=0)] | None = None
    sigmas: Annotated[tuple[Error, ...], Field(min_length=1, max_length=MAX_STEPS)] | None = None


class GuidanceInfo(Record):
    """The guidance with which the errors were measured."""

    mode: Literal["sequential", "batched", "embedded"] | None = None
    scale: float | None = None

    @property
    def guided(self) -> bool:
        """Tell whether outputs with and without the prompt were combined, see `is_guided`."""
        return is_guided(self.scale)


class StoredEdge(Record):
    """The measured error of computing at `start` and `end` and reusing in between.

    With an order above 0 the reused steps are forecast, `scale` of the way, from the steps
    `previous` and `start`. `mean` is the error, `spread` its standard deviation over `count`
    samples.
    """

    start: Step
    end: Step
    order: Order = 0
    scale: Scale = 1.0
    previous: Step | None = None
    mean: Error
    spread: Error | None = None
    count: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def of(cls, edge: Edge, *, spread: float | None = None, count: int = 1) -> Self:
        """Return the record of an edge of the search."""
        return cls(
            start=edge.start,
            end=edge.end,
            order=edge.order,
            scale=edge.scale,
            previous=edge.previous,
            mean=edge.error,
            spread=spread,
            count=count,
        )

    def to_edge(self) -> Edge:
        """Return the edge as the search takes it."""
        return Edge(self.start, self.end, self.mean, self.order, self.scale, self.previous)


class StoredPlan(Record):
    """The computed steps of one budget, and of each segment the error, forecast order and scale.

    `stability` is the fraction of resamples of the samples whose plan computes each of the steps.
    `chosen_as` names the candidate that it was; None: the path of the policy's objective.
    """

    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=MAX_STEPS)]
    errors: Annotated[tuple[Error, ...], Field(max_length=MAX_STEPS)] = ()
    orders: Annotated[tuple[Order, ...], Field(max_length=MAX_STEPS)] = ()
    scales: Annotated[tuple[Scale, ...], Field(max_length=MAX_STEPS)] = ()
    stability: Annotated[tuple[Share, ...], Field(max_length=MAX_STEPS)] = ()
    chosen_as: Text | None = None

    @classmethod
    def of(
        cls, plan: Plan, *, stability: Iterable[float] = (), chosen_as: str | None = None
    ) -> Self:
        """Return the record of a plan."""
        return cls(
            steps=plan.steps,
            errors=plan.errors,
            orders=plan.orders,
            scales=plan.scales,
            stability=tuple(stability),
            chosen_as=chosen_as,
        )

    def to_plan(self, num_inference_steps: int) -> Plan:
        """Return the plan for a run of so many steps; raises PlanError where there is none."""
        return Plan(self.steps, num_inference_steps, self.errors, self.orders, self.scales)


class Validation(Record):
    """The result of one candidate end to end, on prompts that were not used for the errors.

    `worst_frame_psnr` is that of the worst frame of all, `flicker` in grey levels more than those
    of the plain clips; None: not measured, as in files of schema 1.3 and before.
    """

    budget: Steps
    candidate: Text
    kept: bool
    psnr: float
    worst_psnr: float
    worst_frame_psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    vmaf: float | None = None
    cvvdp: float | None = None
    flicker: float | None = None
    speedup: Annotated[float, Field(gt=0)]

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a file of schema 1.3 has not."""
        newer = ("worst_frame_psnr", "vmaf", "cvvdp", "flicker")
        found: dict[str, Any] = handler(self)
        return {k: v for k, v in found.items() if v is not None or k not in newer}


def check_errors(budget: str, plan: Plan, errors: Errors) -> None:
    """Raise ValueError where an error that a plan states is not the one of its edge."""
    for edge in edges_of(plan):
        expected = errors.get(edge.action, 0.0 if edge.end == edge.start + 1 else None)
        if expected is None or not math.isclose(edge.error, expected, rel_tol=1e-6, abs_tol=1e-12):
            raise ValueError(
                f"plans.{budget}.errors: found {edge.error:g} from step {edge.start} to "
                f"{edge.end}, expected {'an edge' if expected is None else format(expected, 'g')}"
            )
