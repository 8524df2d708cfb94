"""Takes the hooks of offloading off a transformer while its layers are exchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vidaccel.engine import compat


@contextmanager
def offload_paused(transformer: nn.Module) -> Iterator[None]:
    """Let every layer hold its own weights for a while, and offload as before afterwards.

    Group offloading and sequential offloading keep weights by layer; offloading of the whole model
    moves whatever it has, and needs no pause.
    """
    sequential = compat.sequential_offload(transformer)
    if sequential is not None:
        compat.remove_sequential_offload(transformer)
    try:
        yield
    finally:
        if sequential is not None:
            compat.sequential_offload_again(transformer, sequential)
        compat.group_offload_again(transformer)
