"""SVG2: semantic permutation and variable-block sparse attention in the blocks that run."""

from vidaccel.svg2.settings import SVG2

__all__ = ["SVG2"]
