"""Clips of noise."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def with_one_bad_frame(bad: int = 4) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """A clip of noise [6, 32, 40, 3], and the same with another frame of that index."""
    generator = np.random.default_rng(0)
    first = generator.integers(60, 200, (6, 32, 40, 3), dtype=np.uint8)
    second = first.copy()
    second[bad] += generator.integers(0, 40, first[bad].shape, dtype=np.uint8)
    return first, second
