"""Weights that wait for `restore`: in host memory, in a file without a name, or nowhere."""

import mmap
import tempfile
from typing import IO

import torch

from vidaccel.errors import PrecisionError
from vidaccel.precision.settings import KeepWeights

DROPPED = (
    'the weights were dropped (keep_weights="drop") and can neither come back nor be saved: load '
    "the pipeline again"
)


class WeightKeeper:
    """Puts the weights of layers away, each into the storage of its own parameter.

    A file is unlinked before anything is written to it: whatever ends the process frees its space.

    Args:
        keep: where weights go.

    Attributes:
        bytes_held: bytes of what was put away and is still there.
        gone: the weights were dropped.
    """

    def __init__(self, keep: KeepWeights) -> None:
        self.keep = keep
        self.bytes_held = 0
        self.gone = False
        self._file: IO[bytes] | None = None
        self._dropped: list[torch.nn.Parameter] = []

    def put_away(self, weight: torch.nn.Parameter) -> None:
        """Take a weight off its device.

        Raises:
            PrecisionError: the disk is full, or cannot be written.
        """
        if self.keep == "drop":
            self._dropped.append(weight)
            return
        held = weight.data.cpu()
        weight.data = held if self.keep == "cpu" else self._on_disk(held)
        self.bytes_held += held.nbytes

    def settle(self) -> None:
        """Let go of weights that are to be dropped, now that nothing can fail any more."""
        self.gone = self.keep == "drop"
        for weight in self._dropped:
            weight.data = weight.data.new_empty(0)
        self._dropped.clear()

    def give_back(
        self, weight: torch.nn.Parameter, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Put a weight back onto a device.

        Raises:
            PrecisionError: it was dropped.
        """
        if self.gone:
            raise PrecisionError(DROPPED)
        if self.keep != "drop":
            self.bytes_held -= weight.data.nbytes
        # A copy in any case of what lies in a file, so that the file can go.
        weight.data = weight.data.to(device, dtype, copy=self.keep == "disk")

    def _on_disk(self, held: torch.Tensor) -> torch.Tensor:
        """Return the same numbers, mapped from a file."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="vidaccel-")  # noqa: SIM115
            page = mmap.ALLOCATIONGRANULARITY
            start = -(-self._file.seek(0, 2) // page) * page
            self._file.seek(start)
            self._file.write(held.contiguous().view(torch.uint8).numpy().tobytes())
            self._file.flush()
            mapped = mmap.mmap(
                self._file.fileno(), held.nbytes, access=mmap.ACCESS_COPY, offset=start
            )
        except OSError as error:
            raise PrecisionError(
                f"cannot keep the weights on the disk in {tempfile.gettempdir()}: "
                f'{error.strerror}; set TMPDIR, or take keep_weights="cpu"'
            ) from error
        return torch.frombuffer(mapped, dtype=held.dtype).view(held.shape)
