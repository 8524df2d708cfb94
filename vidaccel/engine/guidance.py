"""Names the guidance branch of a call that a guider of a modular pipeline has prepared."""

from collections.abc import Iterable
from typing import Any

from vidaccel.engine import compat


class GuidedCalls:
    """Follows the guiders of pipelines whose loops do not name their calls by a cache context.

    A guider counts the conditions that it has prepared a model for in the running step. One whose
    count has moved since the last call has prepared this one; blocks that call the transformer for
    reasons of their own move none.
    """

    def __init__(self) -> None:
        self._counts: dict[int, Any] = {}

    def branch(self, pipelines: Iterable[Any], times: tuple[float, ...]) -> str | None:
        """Name the branch of a call that begins; None where no guider has prepared it.

        Args:
            pipelines: those that may have made the call.
            times: the times that it was given.
        """
        found = {id(guider): guider for pipe in pipelines for guider in compat.guiders_of(pipe)}
        counts = {key: compat.prepared_by(guider) for key, guider in found.items()}
        moved = [
            guider
            for key, guider in found.items()
            if counts[key] is not None and counts[key] != self._counts.get(key)
        ]
        self._counts = counts
        if len(moved) > 1:
            # Of two experts, each with its guider, the other one has run at other times.
            moved.sort(key=lambda guider: _distance(compat.time_of(guider), times))
        return compat.guidance_branch(moved[0]) if moved else None


def _distance(time: float, times: tuple[float, ...]) -> float:
    """Return how far a time is from the nearest of others; 0 from none."""
    return min((abs(time - other) for other in times), default=0.0)
