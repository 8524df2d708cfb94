"""Counts what sparse attention did, without waiting for the device until somebody asks."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vidaccel.engine.report import AttentionReport
from vidaccel.engine.timing import Stopwatch
from vidaccel.kernels.common import density
from vidaccel.kernels.state import SemanticState

# Layers, and for each: density, share of empty query and of empty key clusters, recall.
_Table = tuple[list[int], torch.Tensor]


class _Call(NamedTuple):
    """One sparse call of attention.

    Attributes:
        layer: position of the block.
        selected_keys: [B, H, Qc] keys that each query cluster, and text, attends to.
        q_counts, k_counts: [B, H, Qc] and [B, H, Kc] tokens of each cluster, and of text; padding
            is left out.
        num_clusters: query and key clusters without text.
        recall: scalar; None where it is not measured.
    """

    layer: int
    selected_keys: torch.Tensor
    q_counts: torch.Tensor
    k_counts: torch.Tensor
    num_clusters: tuple[int, int]
    recall: torch.Tensor | None


@dataclass
class _Sums:
    """Sums over the sparse calls of a layer, or of all."""

    calls: int = 0
    density: float = 0.0
    empty_query_clusters: float = 0.0
    empty_key_clusters: float = 0.0
    recall: float = 0.0

    def add(
        self,
        density: float,
        empty_query_clusters: float,
        empty_key_clusters: float,
        recall: float = 0.0,
        calls: int = 1,
    ) -> None:
        """Add a call, or the sums of several."""
        self.calls += calls
        self.density += density
        self.empty_query_clusters += empty_query_clusters
        self.empty_key_clusters += empty_key_clusters
        self.recall += recall


@dataclass
class CallSparsity:
    """Counts what was sparse in one call of the transformer, and how sparse it was.

    Attributes:
        dense: dense calls of attention, by reason.
        watches: those of each call of attention, if they are timed.
    """

    dense: Counter[str] = field(default_factory=Counter)
    watches: list[Stopwatch] = field(default_factory=list)
    _calls: list[_Call] = field(default_factory=list)

    def add(self, layer: int, state: SemanticState, recall: torch.Tensor | None) -> None:
        """Count one sparse call of attention in."""
        assert state.selection is not None
        assert state.query is not None
        assert state.key is not None
        q_counts, k_counts = state.query.real_counts, state.key.real_counts
        selected_keys = state.selection.tokens[..., : q_counts.shape[2]]
        num_clusters = state.query.centroids.shape[2], state.key.centroids.shape[2]
        self._calls.append(_Call(layer, selected_keys, q_counts, k_counts, num_clusters, recall))

    def watch(self, device: torch.device) -> Stopwatch:
        """Start to time one call of attention."""
        self.watches.append(Stopwatch(device))
        return self.watches[-1]

    def tables(self) -> Iterator[_Table]:
        """Reduce what was added to a few numbers: a few launches for all layers together."""
        alike = defaultdict(list)
        for call in self._calls:
            shapes = call.selected_keys.shape, call.k_counts.shape
            alike[shapes, call.num_clusters, call.k_counts.device].append(call)
        for (_, (num_q, num_k), _), calls in alike.items():
            q_counts = torch.stack([call.q_counts for call in calls])
            k_counts = torch.stack([call.k_counts for call in calls])
            selected_keys = torch.stack([call.selected_keys for call in calls])
            columns = [
                density(selected_keys, q_counts, k_counts.sum(-1)).mean((1, 2)),
                (q_counts[..., :num_q] == 0).double().mean((1, 2, 3)),
                (k_counts[..., :num_k] == 0).double().mean((1, 2, 3)),
            ]
            recalls = [call.recall for call in calls if call.recall is not None]
            if recalls:
                columns.append(torch.stack(recalls).double())
            yield [call.layer for call in calls], torch.stack(columns, 1)


class SparsityStats:
    """Adds up what was sparse over calls, which several threads may hand in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dense: Counter[str] = Counter()
        self._tables: list[_Table] = []
        self._watches: list[Stopwatch] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._layers: dict[int, _Sums] = defaultdict(_Sums)

    def add(self, call: CallSparsity) -> None:
        """Count one call of the transformer in."""
        tables = list(call.tables())
        with self._lock:
            self._dense.update(call.dense)
            self._tables += tables
            self._watches += call.watches

    def finalize(self) -> None:
        """Add everything up on the host; waits for the device."""
        with self._lock:
            self._finalize()

    def _finalize(self) -> None:
        alike = defaultdict(list)  # that come to the host together: one wait for all of them
        for layers, table in self._tables:
            alike[table.shape[1], table.device].append((layers, table))
        for tables in alike.values():
            rows = torch.cat([table for _, table in tables]).tolist()
            for layer, row in zip((n for layers, _ in tables for n in layers), rows, strict=True):
                self._layers[layer].add(*row)
        for watch in self._watches:
            for phase, seconds in watch.seconds():
                self._seconds[phase] += seconds
        self._tables, self._watches = [], []

    def report(self, settings: str, bytes_held: int) -> AttentionReport:
        """Return the means as they stand; waits for the device."""
        with self._lock:
            self._finalize()
            return self._report(settings, bytes_held)

    def _report(self, settings: str, bytes_held: int) -> AttentionReport:
        total = _Sums()
        for sums in self._layers.values():
            total.add(**vars(sums))
        calls, dense = total.calls, sum(self._dense.values())

        def mean(value: float) -> float | None:
            return value / calls if calls else None

        return AttentionReport(
            settings=settings,
            sparse_calls=calls,
            dense_calls=dict(self._dense),
            density=mean(total.density),
            density_with_dense=(total.density + dense) / (calls + dense) if calls + dense else None,
            empty_query_clusters=mean(total.empty_query_clusters),
            empty_key_clusters=mean(total.empty_key_clusters),
            recall=mean(total.recall) or None,
            seconds=dict(self._seconds),
            layers={
                layer: {
                    "density": sums.density / sums.calls,
                    "recall": sums.recall / sums.calls or None,
                }
                for layer, sums in sorted(self._layers.items())
            },
            bytes_held=bytes_held,
        )
