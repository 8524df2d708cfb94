"""The settings of SVG2: semantic permutation and variable-block sparse attention.

Queries and keys of a video's self-attention are grouped by k-means, each query group attends only
to the key groups that hold most of its attention mass, and everything else is left out
(Sparse VideoGen2, NeurIPS 2025). This module holds what can be chosen; runner.py runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from vidaccel.errors import AttentionError


@dataclass(frozen=True, kw_only=True)
class SVG2:
    """Settings of sparse self-attention.

    Attributes:
        top_p: share of the estimated attention mass that each query cluster keeps, in (0, 1]; at 1
            the result is that of dense attention.
        query_clusters, key_clusters: clusters per head; None chooses by the number of tokens.
        min_ratio: share of the key clusters that every query cluster keeps at least.
        dense_steps: the first denoising steps, which stay dense: a share of all steps as a float,
            or their number as an int. A step keeps its place in the schedule when others are
            skipped: what matters is its noise level.
        dense_layers: the first layers, which stay dense in every step; a share or a number.
        kmeans_iters: k-means iterations each time a layer is clustered again, from the centroids
            of the time before; 0 assigns the tokens to the old centroids.
        init_iters: iterations the first time, from centroids taken from the tokens.
        cluster_while_dense: cluster during the dense first steps too, so that the first sparse
            step finds centroids that have settled.
        recluster_every, reselect_every: executed sparse steps of a layer from one clustering to
            the next, and from one selection to the next; between them the last ones are used.
        mass_averaging: select by the attention mass of each query averaged over its cluster,
            instead of by the mass at the cluster's centroid (PARK).
        compensation: let the key clusters that are not selected take part as if all of their keys
            were their centroid (SVG-EAR).
        query_metric: cluster keys by the differences that they make to the logits of this head's
            queries, instead of by plain distance (PARK).
        int8_qk: compute scores from queries and keys in 8 bits, each token with its own scale and
            keys less a vector that they share (SageAttention, arXiv 2410.02367). Weights, values
            and the means of clusters stay as they are. It can only lose quality, for speed on
            tensor cores that do twice as many int8 products. By the code that is generated that
            pays at head size 128 on sm_80 and 120; on sm_90 the compiler makes the products wait
            for each other, and on sm_100 other units are as busy already. `vidaccel bench kernels`
            measures it.
        refresh_top_p: top_p of the steps whose result a cache keeps and uses again; None for the
            same as in other steps.
        min_tokens: video sequences shorter than this stay dense, since they gain nothing.
        recall_rows: query rows per head and call whose kept share of the true attention mass is
            measured; 0 measures none. It costs as much as dense attention of these rows.
        timed: measure how the time of attention divides between its phases. It costs up to four
            marks on the device's time line per call.

    Raises:
        AttentionError: a value is out of its range.
    """

    top_p: float = 0.9
    query_clusters: int | None = None
    key_clusters: int | None = None
    min_ratio: float = 0.10
    dense_steps: float | int = 0.2
    dense_layers: float | int = 0.03
    kmeans_iters: int = 2
    init_iters: int = 10
    cluster_while_dense: bool = False
    recluster_every: int = 1
    reselect_every: int = 1
    mass_averaging: bool = True
    compensation: bool = True
    query_metric: bool = False
    int8_qk: bool = False
    refresh_top_p: float | None = None
    min_tokens: int = 16_384
    recall_rows: int = 0
    timed: bool = False

    def __post_init__(self) -> None:
        for name in ("top_p", "refresh_top_p"):
            value = getattr(self, name)
            if not (name == "refresh_top_p" and value is None):
                _number(name, value, "in (0, 1]", lambda v: 0 < v <= 1)
        _number("min_ratio", self.min_ratio, "in [0, 1]", lambda v: 0 <= v <= 1)
        for name in ("dense_steps", "dense_layers"):
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool):
                _whole(name, value, 0)
            else:
                allowed = "a share in [0, 1] or a whole number"
                _number(name, value, allowed, lambda v: 0 <= v <= 1)
        for name in ("query_clusters", "key_clusters"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in ("init_iters", "recluster_every", "reselect_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("kmeans_iters", "min_tokens", "recall_rows"):
            _whole(name, getattr(self, name), 0)
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise AttentionError(
                    f"SVG2.{field.name} takes True or False, found {getattr(self, field.name)!r}"
                )

    @classmethod
    def faithful(cls, model: str) -> "SVG2":
        """Return the settings that the authors publish for one model and resolution.

        Everything that this project adds is off. Two things differ from their program, on
        purpose: guidance branches do not share centroids, and each generation starts afresh.

        Args:
            model: one of `SVG2.published()`; capitals do not matter.

        Raises:
            AttentionError: no settings are published for it.
        """
        key = model.lower()
        if key not in _PUBLISHED:
            raise AttentionError(
                f"no SVG2 settings are published for {model!r}; known are {', '.join(_PUBLISHED)}"
            )
        clusters, steps, layers, while_dense = _PUBLISHED[key]
        return cls(
            top_p=0.9,
            query_clusters=clusters[0],
            key_clusters=clusters[1],
            min_ratio=0.10,
            dense_steps=steps,
            dense_layers=layers,
            kmeans_iters=2,
            init_iters=50,
            cluster_while_dense=while_dense,
            mass_averaging=False,
            compensation=False,
            query_metric=False,
            int8_qk=False,
            min_tokens=0,
        )

    @staticmethod
    def published() -> tuple[str, ...]:
        """Return the models that `faithful` knows."""
        return tuple(_PUBLISHED)

    def clusters(self, tokens: int) -> tuple[int, int]:
        """Return query and key clusters for a video of so many tokens; never more than tokens.

        A query cluster should fill a tile of the attention kernel (64 rows or more); key clusters
        may be smaller, since adjacent selected ones are read as one run.
        """
        query = self.query_clusters or min(max(tokens // 512, 32), 256, max(tokens // 16, 1))
        key = self.key_clusters or min(max(tokens // 160, 128), 1000, max(tokens // 4, 1))
        return min(query, tokens), min(key, tokens)

    def is_dense_step(self, step: int, num_inference_steps: int) -> bool:
        """Tell whether every layer is dense in this step of the schedule."""
        return step < _count(self.dense_steps, num_inference_steps)

    def is_dense_layer(self, depth: int, layers: int) -> bool:
        """Tell whether the layer at this depth is dense in every step."""
        return depth < _count(self.dense_layers, layers)

    def at_refresh(self) -> "SVG2":
        """Return the settings of a step whose result a cache keeps."""
        return self if self.refresh_top_p is None else replace(self, top_p=self.refresh_top_p)

    def __str__(self) -> str:
        """Show the values that differ from the defaults, after `top_p`."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name == "top_p" or getattr(self, field.name) != field.default
        ]
        return f"SVG2({', '.join(changed)})"


# (query and key clusters), dense steps, dense layers, cluster_while_dense: the authors' scripts.
_PUBLISHED = {
    "wan2.1-t2v-14b-720p": ((300, 1000), 0.20, 0.03, False),
    "wan2.1-i2v-14b-720p": ((300, 1000), 0.35, 0.03, False),
    "wan2.1-i2v-14b-480p": ((200, 1000), 0.20, 0.03, True),
    "hunyuanvideo-t2v-720p": ((400, 1000), 0.10, 0.03, True),
    "hunyuanvideo-t2v-480p": ((200, 1000), 0.04, 0.0, True),
    "cosmos-1.0-14b-704p": ((400, 1000), 0.30, 0.03, False),
}


def _count(value: float | int, total: int) -> int:
    """Return a share of `total`, rounded down, or a number as it is."""
    # The tolerance keeps 0.29 * 100 from being 28.
    return value if isinstance(value, int) else int(value * total + 1e-9)


def _number(name: str, value: object, allowed: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise AttentionError(f"SVG2.{name} takes {allowed}, found {value!r}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AttentionError(f"SVG2.{name} takes a whole number from {least}, found {value!r}")
