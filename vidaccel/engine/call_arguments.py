"""Reads what a call of a transformer is given, by the names in its row of the table."""

from typing import Any

import torch
from torch import nn

from vidaccel.engine.block_proxies import Argument
from vidaccel.engine.conditions import Conditions
from vidaccel.hosts.spec import HostSpec

# Why a call is run as if the transformer were not accelerated.
ASIDE = "they fill a cache that the calls of other steps read"


class CallArguments:
    """Reads what the calls of one transformer are given.

    Args:
        transformer: an instance of the class that `host` describes.
        host: its row of the table.
    """

    def __init__(self, transformer: nn.Module, host: HostSpec) -> None:
        cls = type(transformer)
        self._sample = Argument.of_forward(cls, host.sample)
        self._timestep = Argument.of_forward(cls, host.timestep)
        self._prompt = Argument.find(cls, host.prompt)
        self._video_rows = Argument.find(cls, host.video_rows)
        self._run: tuple[Any, tuple[int, int]] = (None, (0, 0))  # of the last such argument
        self._aside, self._left_out = (
            None if known is None else (Argument.of_forward(cls, known[0]), known[1])
            for known in (host.aside, host.left_out)
        )

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the time."""
        return self._timestep.value(args, kwargs)

    def samples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return the latents; several where each sample is a tensor of its own."""
        given = self._sample.value(args, kwargs)
        return [given] if isinstance(given, torch.Tensor) else list(given)

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Return the shape of the latents of one sample."""
        given = self._sample.value(args, kwargs)
        return tuple(given.shape[1:] if isinstance(given, torch.Tensor) else given[0].shape)

    def conditions(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Conditions:
        """Return what is given besides latents and time."""
        return Conditions.of(transformer, self._prompt, args, kwargs)

    def video_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Return first and last + 1 of the generated rows; None where the row does not tell.

        Waits for the device once for each tensor of places.
        """
        if self._video_rows is None:
            return None
        places = self._video_rows.value(args, kwargs)
        if self._run[0] is not places:
            found = places.tolist()
            start = len(found) - 1
            while start and found[start - 1] == found[start] - 1:
                start -= 1
            self._run = (places, (found[start], found[-1] + 1))
        return self._run[1]

    def why_aside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return why a call only fills a cache; empty where it does not."""
        if self._aside is None:
            return ""
        argument, value = self._aside
        return ASIDE if argument.value(args, kwargs) == value else ""

    def blocks(self, total: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Count the blocks, of `total`, that a call reaches."""
        if self._left_out is None:
            return total
        argument, index = self._left_out
        return total - bool(index < total and argument.value(args, kwargs))
