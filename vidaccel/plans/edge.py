"""The way from one computed step to the next: what is done in between, and what that costs."""

from typing import NamedTuple

from vidaccel.plans.plan import Plan

Segment = tuple[int, int]  # start, end: compute both, reuse in between
Line = tuple[int, int, int]  # the same and the computed step before start, for a line through both

# How far along a line the residual of a reused step is taken to be; holding is 0.
SCALES = (0.25, 0.5, 0.75, 1.0)


class Edge(NamedTuple):
    """One way to get from a computed step to the next. Two between the same steps are alternatives.

    Attributes:
        start, end: compute both, reuse in between; T as `end` reuses to the end.
        error: what that costs in quality, >= 0.
        order, scale: the forecast on the reused steps; order 0 holds.
        previous: the computed step before `start` that the error holds for; None for any.
        cost: what the reused steps take of the budget, in units of the search's `step_cost`.
    """

    start: int
    end: int
    error: float
    order: int = 0
    scale: float = 1.0
    previous: int | None = None
    cost: int = 0

    @property
    def action(self) -> tuple[int, int, int, float, int | None]:
        """All but the error and cost: start, end, order, scale and previous step."""
        return self.start, self.end, self.order, self.scale, self.previous


def without_reuse(num_inference_steps: int) -> list[Edge]:
    """Return the edge from each step to the next, where nothing is reused; the last ends at T."""
    return [Edge(step, step + 1, 0.0) for step in range(num_inference_steps)]


def edges_of(plan: Plan) -> list[Edge]:
    """Return the path of a plan whose errors are known: an edge for each of them, in step order."""
    ends = (*plan.steps[1:], plan.num_inference_steps)
    found = []
    for position, (start, end, error) in enumerate(
        zip(plan.steps, ends, plan.errors, strict=False)  # after step T - 1 nothing is reused
    ):
        order = plan.orders[position] if plan.orders else 0
        scale = plan.scales[position] if plan.scales and order else 1.0
        previous = plan.steps[position - 1] if order and position else None
        found.append(Edge(start, end, error, order, scale, previous))
    return found
