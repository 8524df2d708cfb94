"""Runs the head of a transformer around other residuals, at a sample of the tokens.

A head works on each token alone: a norm, a modulation, a projection. So one more pass of the
embedding and the head, which costs about a hundredth of a step, can evaluate many residuals at
once: each at the sampled tokens, put into slots of their own among the tokens of the stream. Which
elements of the output a slot becomes is found out by giving the slots their numbers, bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.errors import VidaccelError

# Main stream at the first block [B, S, C] -> what goes into the head.
Put = Callable[[torch.Tensor], torch.Tensor]
# Runs the embedding and the head once more, and gives the output of the transformer.
Tail = Callable[[Put], Any]

# What a reference token may differ by in another slot, relative to the size of the output: rounding
# of the dtype, no more.
_TOLERANCE = 0.02

# So many sampled tokens that fit into one pass are not worth a second one.
ENOUGH = 32


class NotLearnable(VidaccelError):
    """The head of this transformer does not work on each token alone."""


@dataclass(frozen=True)
class TokenSlots:
    """The slots of a stream and what they become.

    Attributes:
        slots: the tokens of the stream that can be told apart in the output [N].
        elements: the elements of each in the output of one sample, flat [N, E].
        sampled: positions in `slots` of the tokens at which residuals are compared [n].
    """

    slots: torch.Tensor
    elements: torch.Tensor
    sampled: torch.Tensor

    @classmethod
    def find(cls, tail: Tail, *, most: int, passes: int, rows: int) -> "TokenSlots":
        """Find out what the tokens of a stream become.

        Args:
            tail: runs embedding and head.
            most: the most tokens to sample.
            passes: how many passes one evaluation may take where one holds few tokens.
            rows: the most residuals that are evaluated at once.

        Raises:
            NotLearnable: tokens cannot be told apart in the output.
        """
        streams: list[torch.Tensor] = []
        numbered = _Numbered(tail, streams)
        none, every = numbered.output(-1), numbered.output(-2)
        length = streams[0].shape[1]
        apart = (every - none).abs()
        found = torch.zeros_like(none, dtype=torch.int64)
        # Elements that both marks turn into the same number tell nothing.
        clear = apart > _TOLERANCE * apart.mean()
        for bit in range((length - 1).bit_length()):
            output = numbered.output(bit)
            to_none, to_every = (output - none).abs(), (output - every).abs()
            if bool((torch.minimum(to_none, to_every) > _TOLERANCE * apart)[clear].any()):
                raise NotLearnable("its head mixes tokens")
            found += (to_every < to_none).to(torch.int64) << bit
        of_first, clear = found[0].flatten(), clear.all(0).flatten()
        number = torch.where(clear, of_first, length)
        order = torch.sort(number, stable=True).indices
        counts = torch.bincount(number, minlength=length + 1)[:length]
        size = int(counts.max()) if length else 0
        whole = torch.nonzero(counts == size).flatten()
        if size == 0 or len(whole) < 2:
            raise NotLearnable("its tokens cannot be told apart in its output")
        starts = torch.cumsum(counts, 0) - counts
        elements = order[starts[whole, None] + torch.arange(size, device=order.device)]
        fitting = (1 if len(whole) >= ENOUGH * rows else passes) * len(whole) // rows
        count = max(1, min(most, len(whole), fitting))
        # The same ones in every run, from all over the picture.
        drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:count]
        return cls(whole, elements, drawn.sort().values.to(whole.device))

    def take(self, stream: torch.Tensor) -> torch.Tensor:
        """Return the sampled tokens [B, n, C] of a stream [B, S, C]."""
        return stream[:, self.slots[self.sampled]]

    def evaluate(self, tail: Tail, residuals: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the sampled tokens become around each of several residuals.

        Args:
            tail: runs embedding and head.
            residuals: [B, n, C] each, at the sampled tokens.

        Returns:
            [R, B, n * E] in float32.
        """
        total, count = len(residuals) * len(self.sampled), len(self.slots)
        rows = torch.cat(list(residuals), dim=1)  # [B, R * n, C]
        parts = []
        for first in range(0, total, count):
            part = rows[:, first : first + count]
            slots = self.slots[: part.shape[1]]
            numbers = torch.arange(first, first + part.shape[1], device=rows.device)
            tokens = self.slots[self.sampled[numbers % len(self.sampled)]]

            def put(
                start: torch.Tensor,
                part: torch.Tensor = part,
                slots: torch.Tensor = slots,
                tokens: torch.Tensor = tokens,
            ) -> torch.Tensor:
                given = start.clone()
                given[:, slots] = start[:, tokens] + part.to(start)
                return given

            output = first_tensor(tail(put))
            parts.append(output.flatten(1)[:, self.elements[: part.shape[1]]])
        out = torch.cat(parts, dim=1).float()  # [B, R * n, E]
        batch, _, size = out.shape
        return out.view(batch, len(residuals), -1, size).transpose(0, 1).flatten(2)

    def of_output(self, output: Any) -> torch.Tensor:
        """Return what the sampled tokens have become in an output [B, n * E], in float32."""
        flat = first_tensor(output).flatten(1)
        return flat[:, self.elements[self.sampled]].flatten(1).float()

    def check(self, output: Any, again: torch.Tensor) -> None:
        """Hold the sampled tokens of a call against themselves in other slots.

        Args:
            output: that of the call.
            again: [B, n * E], evaluated around the residual of the call.

        Raises:
            NotLearnable: they differ: the head treats the places of the stream differently.
        """
        wanted = self.of_output(output)
        if not bool((again - wanted).abs().mean() <= _TOLERANCE * wanted.abs().mean()):
            raise NotLearnable("its head treats the places of its stream differently")


class _Numbered:
    """Outputs for streams whose tokens are marked by a bit of their number."""

    def __init__(self, tail: Tail, streams: list[torch.Tensor]) -> None:
        self._tail, self._streams = tail, streams

    def output(self, bit: int) -> torch.Tensor:
        """Return the output [B, ...] in float32; bit -1 marks no token, -2 every one."""

        def put(start: torch.Tensor) -> torch.Tensor:
            if start.dim() != 3:
                raise NotLearnable(f"its stream is {start.dim()}-dimensional")
            self._streams[:] = [start]
            marks = torch.randn(2, start.shape[2], generator=torch.Generator().manual_seed(0))
            numbers = torch.arange(start.shape[1])
            chosen = numbers >> bit & 1 if bit >= 0 else torch.full_like(numbers, -1 - bit)
            return marks[chosen].to(start).expand_as(start)

        output = first_tensor(self._tail(put))
        if output.shape[0] != self._streams[0].shape[0]:
            raise NotLearnable("its output has another batch size than its stream")
        return output.float()


def first_tensor(output: Any) -> torch.Tensor:
    """Return the first tensor of a transformer's output; raises NotLearnable without one."""
    while isinstance(output, tuple | list | dict):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    if not isinstance(output, torch.Tensor):
        raise NotLearnable(f"its output is {type(output).__name__}")
    return output
