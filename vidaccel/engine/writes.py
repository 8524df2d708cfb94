"""Finds out whether blocks write into the streams that they are given, and copies those."""

from typing import Any

import torch


class WriteWatch:
    """Keeps streams as they are now, whatever blocks write into them later.

    Fused kernels and models of one's own may write their result into the stream that they are
    given. Whether these do is found out once per generation, in its first computed call, at the
    cost of one copy and one comparison.
    """

    def __init__(self) -> None:
        self._written: dict[str, bool] = {}  # by stream, as far as it is known
        self._originals: dict[int, torch.Tensor] = {}  # of the copies that are looked at

    def restart(self) -> None:
        """Begin a generation: find out anew."""
        self._written.clear()
        self._originals.clear()

    def keep(self, name: str, stream: Any) -> Any:
        """Return a stream, or a copy of it where blocks write into it or may do so."""
        written = self._written.get(name)
        if written is False or not isinstance(stream, torch.Tensor):
            return stream
        copy = stream.clone()
        if written is None:
            self._originals[id(copy)] = stream
        return copy

    def look(self, name: str, kept: Any) -> None:
        """Find out, after the blocks, whether they have written into a stream that was kept."""
        original = self._originals.pop(id(kept), None)
        if original is not None:
            self._written[name] = not torch.equal(original, kept)
