"""The segments that a plan may use, as an exact, integer-weighted DAG over the denoising steps."""

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidaccel.errors import PlanError
from vidaccel.plan import Plan

EVERY_COUNT = -1  # as a bit set: every number of segments


class Edge(NamedTuple):
    """A segment: compute `start` and `stop`, reuse in between."""

    start: int
    stop: int
    rank: int  # of the quantised error among all of them; 0 is no error
    raw: int  # the error as an exact integer, on one scale for the whole graph
    counts: int  # bit k: the segment may be used where k segments are left, itself included


@dataclass(frozen=True)
class Dag:
    """The allowed segments, in order of start, then stop.

    Attributes:
        errors: [n, n] as measured; n is the number of steps, plus one with a virtual end.
        steps: number of denoising steps T.
        edges: the allowed segments.
        quantised: [len(edges)] their errors after rounding.
    """

    errors: NDArray[np.float64]
    steps: int
    edges: list[Edge]
    quantised: NDArray[np.float64]

    @property
    def end(self) -> int:
        """The node at which every path ends."""
        return len(self.errors) - 1

    def segments(self, budget: int) -> int:
        """How many segments a path over `budget` computed steps has."""
        return budget - 1 + (self.end == self.steps)

    def plan(self, path: Sequence[int]) -> Plan:
        """The plan of a path; the virtual end is no step, and its empty segment no error."""
        errors = [float(self.errors[segment]) for segment in itertools.pairwise(path)]
        steps = [node for node in path if node < self.steps]
        tail = steps[-1] < self.steps - 1
        return Plan(tuple(steps), self.steps, tuple(errors[: len(steps) - 1 + tail]))


def segment_dag(
    errors: ArrayLike,
    forced: Iterable[int],
    forbidden: Iterable[int],
    virtual_end: bool,
    quantum: float,
) -> Dag:
    """The segments that the arguments of `search.solve` allow.

    Raises:
        PlanError: when `errors` is no such array, or an option contradicts it.
    """
    matrix = _checked(errors)
    end = len(matrix) - 1
    steps = len(matrix) - bool(virtual_end)
    if steps < 3:
        raise PlanError(f"a plan is searched over 3 steps or more, found {steps}")
    computed, reused = whole_numbers(forced, "forced"), whole_numbers(forbidden, "forbidden")
    for name, nodes in (("forced", computed), ("forbidden", reused)):
        for node in nodes:
            if not 0 <= node < steps:
                raise PlanError(f"{name} step {node} is outside 0 to {steps - 1}")
    clash = sorted({*computed, 0, end} & set(reused))
    if clash:
        raise PlanError(f"step {clash[0]} is forbidden, but it must be computed")

    allowed = np.triu(np.isfinite(matrix), 1)
    for node in computed:
        allowed[:node, node + 1 :] = False
    allowed[reused, :] = allowed[:, reused] = False
    starts, stops = np.nonzero(allowed)
    values = matrix[starts, stops]
    quantised = values
    if quantum != 0:
        if not 0 < quantum < math.inf or float(values.max(initial=0.0)) / quantum == math.inf:
            raise PlanError(f"quantum is 0, or a number on the scale of errors, found {quantum!r}")
        quantised = np.rint(values / quantum)
    ranks = np.unique(np.append(0.0, quantised), return_inverse=True)[1][1:]
    rows = zip(starts.tolist(), stops.tolist(), ranks.tolist(), integers(values), strict=True)
    return Dag(matrix, steps, [Edge(*row, EVERY_COUNT) for row in rows], quantised)


def _checked(errors: ArrayLike) -> NDArray[np.float64]:
    """`errors` as a float array, or a PlanError that says what is wrong with it."""
    try:
        matrix = np.asarray(errors, dtype=np.float64)
    except (TypeError, ValueError):
        raise PlanError("errors must be a square array of numbers") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise PlanError(f"errors must be a square array, found shape {matrix.shape}")
    for name, wrong in (("NaN", np.isnan(matrix)), ("negative", matrix < 0)):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise PlanError(f"errors[{i}, {j}] is {name}: errors are >= 0, or inf for no edge")
    above = np.diagonal(matrix, 1)
    if above.any():
        i = int(np.flatnonzero(above)[0])
        raise PlanError(f"errors[{i}, {i + 1}] is {above[i]:g}: without a reused step it must be 0")
    return matrix


def whole_numbers(values: Iterable[Any], name: str) -> list[int]:
    """`values` as whole numbers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise PlanError(f"{name} must be a list of whole numbers, found {values!r}") from None


def integers(values: Sequence[float] | NDArray[np.float64]) -> list[int]:
    """Integers in exactly the proportions of `values`, which are finite and >= 0."""
    mantissas, exponents = np.frexp(values)
    shifts = exponents - exponents[mantissas != 0].min(initial=exponents.max(initial=0))
    whole = (mantissas * 2.0**53).astype(np.int64).tolist()
    return [m << s if m else 0 for m, s in zip(whole, shifts.tolist(), strict=True)]
