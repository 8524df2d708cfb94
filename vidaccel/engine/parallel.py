"""Context parallelism as Diffusers runs it: each rank holds a part of the tokens.

Diffusers splits and gathers in hooks of its own, on the transformer, its rotary embedding or its
first block, and gathers at the projection of the head. Between those, the engine sees the tokens of
its own rank and keeps residuals of them: plans need no communication at all. A decision that is
made from the tokens has to be the same on every rank, or some would wait for ever in the attention
of a block that the others do not run; that takes one all-reduce of two numbers.
"""

from typing import Any, Literal

import torch
from torch import nn

from vidaccel.engine.compat import context_parallel_group, input_split_hooks, parallel_config

SequenceParallelMode = Literal["ulysses", "ring"]


def group_of(transformer: nn.Module) -> Any:
    """Return the process group that shares the tokens of `transformer`; None when it runs alone.

    It is that of its own context-parallel mesh, whatever other ranks there are: those that run
    another prompt or another guidance branch decide for themselves.
    """
    config = parallel_config(transformer)
    context = None if config is None else config.context_parallel_config
    return None if context is None else context_parallel_group(context)


def sequence_parallel_mode(transformer: nn.Module) -> SequenceParallelMode | None:
    """Return how attention works on the tokens of several ranks; None where one has them all."""
    config = parallel_config(transformer)
    context = None if config is None else config.context_parallel_config
    if context is None:
        return None
    return "ring" if context.ring_degree > 1 else "ulysses"


def seen_by(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as the forward of `block` sees them.

    Where the tokens are split in a hook of the first block, its caller holds those of all ranks,
    and only the block itself those of this one.
    """
    for hook in input_split_hooks(block):
        args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def relative_change(last: torch.Tensor, now: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Return sum(|last - now|) / sum(|last|), over the tokens of all ranks of `group`, as a scalar.

    It takes the memory of one tensor more, in the dtype of the two, and sums in float32.
    """
    room = last - now
    changed = room.abs_().sum(dtype=torch.float32)
    whole = torch.abs(last, out=room).sum(dtype=torch.float32)
    if group is not None:
        sums = torch.stack([changed, whole])
        torch.distributed.all_reduce(sums, group=group)
        changed, whole = sums
    return changed / whole
