"""The clusters that sparse attention keeps from step to step."""

from dataclasses import dataclass, field
from typing import Any

import torch

from vidaccel.kernels.state import Clustering, SemanticState
from vidaccel.svg2.settings import SVG2


@dataclass
class Layer:
    """Clusters that one layer of one guidance branch keeps from step to step.

    Attributes:
        shape: sizes, dtype and device that it was made for; others need another layer.
        state: clusters and selection.
        top_p: the share of mass that the selection was made with.
    """

    shape: tuple[Any, ...]
    state: SemanticState = field(default_factory=SemanticState)
    top_p: float | None = None

    def trim(self, config: SVG2, dtype: torch.dtype) -> None:
        """Let go of what the next step makes anew, which is most of the memory."""
        if config.recluster_every > 1:
            return
        self.state.selection = None
        for side in ("query", "key"):
            clustering: Clustering = getattr(self.state, side)
            # Tensors without storage keep the shapes that say whom the centroids belong to.
            rest = {
                name: tensor.new_zeros(()).expand(tensor.shape)
                for name, tensor in vars(clustering).items()
                if name != "centroids"
            }
            centroids = clustering.centroids.to(dtype)
            setattr(self.state, side, Clustering(centroids=centroids, **rest))

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors."""
        parts = (self.state.query, self.state.key, self.state.selection)
        tensors = [tensor for part in parts if part is not None for tensor in vars(part).values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
