"""The parts of a policy file, each with strict types and ranges."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from vidaccel.plans.edge import Edge
from vidaccel.plans.forecast import MAX_ORDER, MAX_SCALE
from vidaccel.plans.plan import Plan

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 1
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"

MAX_STEPS = 1000

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"


def _no_parent(text: str) -> str:
    if ".." in text:
        raise ValueError("a model id is no path")
    return text


Name = Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
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
Pixels = Annotated[int, Field(ge=1, le=16384)]
Budget = Annotated[str, StringConstraints(pattern=r"^[1-9]\d{0,3}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Objective = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(\(\d+(\.\d+)?\))?$")]


class Record(BaseModel):
    """Base of all parts: frozen, strict, finite numbers only."""

    # Lax only where JSON is: a list for a tuple, a whole number for a float.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)


class ModelInfo(Record):
    """The transformer: class, hub id and hash of its config (None: not checked)."""

    transformer: Name
    id: ModelId | None = None
    config_hash: Digest | None = None


class SchedulerInfo(Record):
    """The scheduler: class, shift and noise levels of the steps (None: not checked)."""

    name: Name | None = None
    shift: Annotated[float, Field(gt=0)] | None = None
    sigmas: Annotated[tuple[Error, ...], Field(min_length=1, max_length=MAX_STEPS)] | None = None


class GuidanceInfo(Record):
    """The guidance with which the errors were measured."""

    mode: Literal["sequential", "batched", "embedded"] | None = None
    scale: float | None = None


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
    """The result of one candidate end to end, on prompts that were not used for the errors."""

    budget: Steps
    candidate: Text
    kept: bool
    psnr: float
    worst_psnr: float
    ssim: float | None = None
    lpips: float | None = None
    speedup: Annotated[float, Field(gt=0)]
