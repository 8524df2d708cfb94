"""Compares what calls of a transformer are given besides latents and time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vidaccel.engine.adapters import adapter_state
from vidaccel.engine.block_proxies import Argument


@dataclass(frozen=True)
class Conditions:
    """Everything that one call is given besides latents and time.

    A residual is that of its conditions: with another prompt, another set of control inputs or
    other adapters it belongs to a call that was never made.

    Attributes:
        names: the arguments that are not None.
        prompts: the tensors of the prompt.
        adapters: the adapters at work and their strengths.
    """

    names: frozenset[str | int]
    prompts: tuple[torch.Tensor, ...]
    adapters: tuple[Any, ...]

    @classmethod
    def of(
        cls, transformer: nn.Module, prompt: Argument | None, args: Any, kwargs: dict[str, Any]
    ) -> "Conditions":
        """Collect the conditions of one call."""
        given: set[str | int] = {name for name, value in kwargs.items() if value is not None}
        given.update(index for index, value in enumerate(args) if value is not None)
        value = None if prompt is None else prompt.value(args, kwargs)
        found = value if isinstance(value, list | tuple) else (value,)
        prompts = tuple(tensor for tensor in found if isinstance(tensor, torch.Tensor))
        return cls(frozenset(given), prompts, adapter_state(transformer))

    def same_as(self, other: "Conditions") -> bool:
        """Tell whether two calls are given the same.

        Most pipelines pass the very tensor in every step. Values are compared, which waits for the
        device, only where they do not.
        """
        return (
            self.names == other.names
            and self.adapters == other.adapters
            and len(self.prompts) == len(other.prompts)
            and all(map(_equal, self.prompts, other.prompts))
        )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(one, other)
