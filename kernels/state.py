"""The settings of semantic attention, and what a layer keeps from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vidaccel.kernels.common import KernelError, Selection, check_top_p, density


@dataclass(frozen=True)
class SemanticConfig:
    """Settings of clustering and selection; the names are those of `vidaccel.SVG2`.

    Attributes:
        query_clusters, key_clusters: number of clusters of the video tokens.
        top_p: attention mass that the selected key clusters of a query cluster exceed, in (0, 1].
        min_ratio: share of the key clusters that is selected at least, in [0, 1].
        kmeans_iters: k-means rounds when there are centroids from an earlier call.
        init_iters: k-means rounds when there are none.
        recluster_every: calls between two clusterings; in between, labels are kept.
        reselect_every: calls between two selections. A new clustering always selects anew.
        mass_averaging: select by the mean over each query's own mass, not by query centroids.
        compensation: let each cluster that is not selected count as one key, its mean.
        query_metric: cluster keys by how far apart queries see them.
        int8_qk: scores from queries and keys in 8 bits.
        scale: factor on the scores, 1/sqrt(D) if left out.

    Raises:
        KernelError: a value is outside its range.
    """

    query_clusters: int
    key_clusters: int
    top_p: float = 0.9
    min_ratio: float = 0.10
    kmeans_iters: int = 2
    init_iters: int = 10
    recluster_every: int = 1
    reselect_every: int = 1
    mass_averaging: bool = False
    compensation: bool = False
    query_metric: bool = False
    int8_qk: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        check_top_p(self.top_p, self.min_ratio)
        for name in ("query_clusters", "key_clusters", "recluster_every", "reselect_every"):
            if getattr(self, name) < 1:
                raise KernelError(f"{name} must be 1 or more, found {getattr(self, name)}")
        for name in ("kmeans_iters", "init_iters"):
            if getattr(self, name) < 0:
                raise KernelError(f"{name} must be 0 or more, found {getattr(self, name)}")


@dataclass
class Clustering:
    """One side, queries or keys, sorted by cluster.

    Attributes:
        centroids: [B, H, K, D] fp32, in the metric that the tokens were clustered in.
        labels: [B, H, S] int32; K marks text, K + 1 padding.
        sorted_idx: [B, H, S] int32, place in sorted order -> token.
        offsets: [B, H, K + 1 or K + 3] int32, where each label begins.
    """

    centroids: Tensor
    labels: Tensor
    sorted_idx: Tensor
    offsets: Tensor

    @property
    def counts(self) -> Tensor:
        """[B, H, K or K + 2] int32, tokens per label."""
        return self.offsets.diff()

    @property
    def real_counts(self) -> Tensor:
        """[B, H, K or K + 1] int32, tokens per label without padding."""
        counts = self.counts
        return counts if counts.shape[2] == self.centroids.shape[2] else counts[..., :-1]


@dataclass
class SemanticState:
    """State that one attention layer (and guidance branch) keeps from call to call.

    Attributes:
        calls: how often it was used since it was made or reset.
        query, key: the latest clustering.
        selection: the latest selection.
        on_phase_end: is told the name of each phase of a call as it ends; None: nobody asks.
    """

    calls: int = 0
    query: Clustering | None = None
    key: Clustering | None = None
    selection: Selection | None = None
    on_phase_end: Callable[[str], None] | None = None

    def end_phase(self, phase: str) -> None:
        """Tell whoever asks that a phase has ended."""
        if self.on_phase_end is not None:
            self.on_phase_end(phase)

    def reset(self) -> None:
        """Forget everything: the next call starts from tokens."""
        self.calls, self.query, self.key, self.selection = 0, None, None, None

    def fits(self, q: Tensor, config: SemanticConfig) -> bool:
        """Tell whether what is kept belongs to tensors and cluster counts like these."""
        if self.query is None or self.key is None:
            return True
        batch, heads, tokens, head_dim = q.shape
        return (
            self.query.centroids.shape == (batch, heads, config.query_clusters, head_dim)
            and self.key.centroids.shape == (batch, heads, config.key_clusters, head_dim)
            and self.query.labels.shape[2] == tokens
            and self.query.labels.device == q.device
        )

    def density(self) -> Tensor:
        """Return the computed share of all query-key pairs in the latest call: [B, H] fp32.

        Padding counts on neither side.

        Raises:
            KernelError: nothing was selected yet.
        """
        if self.selection is None or self.query is None or self.key is None:
            raise KernelError("nothing was selected yet")
        q_counts, k_counts = self.query.real_counts, self.key.real_counts
        selected_keys = self.selection.tokens[..., : q_counts.shape[2]]
        return density(selected_keys, q_counts, k_counts.sum(-1)).float()

    def empty_clusters(self) -> tuple[Tensor, Tensor]:
        """Count query and key clusters without tokens in the latest clustering: [B, H] int64 each.

        Raises:
            KernelError: nothing was clustered yet.
        """
        if self.query is None or self.key is None:
            raise KernelError("nothing was clustered yet")
        found = []
        for side in (self.query, self.key):
            found.append((side.counts[..., : side.centroids.shape[2]] == 0).sum(-1))
        return found[0], found[1]
