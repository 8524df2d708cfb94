"""The items of `vidaccel bench gpu`: each measures one thing, on real sizes or on tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vidaccel.bench.gpu_device import Device
from vidaccel.bench.kernels import SHAPES, Shape
from vidaccel.kernels.launch import chip


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        name: unlike all others of its part.
        run: measures, and returns what a JSON file can hold.
        seconds: about how long it takes on an H100, compiling included; one that takes longer
            than there is time for is left for another run.
        gib: memory of the device that it takes; where less is free it is not started.
        repeats: an item before it goes through the same code, so that a dry run leaves it out.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 10.0
    gib: float = 8.0
    repeats: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run: real ones on a GPU, or tiny ones that go through the same code on a CPU.

    Attributes:
        dry: tiny ones.
    """

    dry: bool = False

    @property
    def device(self) -> Device:
        """Return where the run measures."""
        return Device("cpu" if self.dry else "cuda")

    @property
    def on_hopper(self) -> bool:
        """Tell whether it is a chip of compute capability 9.0."""
        return not self.dry and torch.cuda.is_available() and chip(torch.device("cuda")) == 90

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of tensors; Triton's interpreter is at its best with fp32."""
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def repeat_ms(self) -> int:
        """Return how long one measurement repeats, in milliseconds."""
        return 1 if self.dry else 200

    def shape(self, name: str) -> Shape:
        """Return the attention of a model, by its name in SHAPES."""
        return Shape(1, 40, 64, 2, 3) if self.dry else SHAPES[name]

    def clustered(self, name: str, query_clusters: int, key_clusters: int) -> Shape:
        """Return the same with other numbers of clusters."""
        if self.dry:
            return self.shape(name)
        return replace(self.shape(name), query_clusters=query_clusters, key_clusters=key_clusters)

    def of(self, real: Any, tiny: Any) -> Any:
        """Return the first for a real run and the second for a dry one."""
        return tiny if self.dry else real
