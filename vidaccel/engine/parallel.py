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

from vidaccel.errors import UnsupportedPipelineError

SequenceParallelMode = Literal["ulysses", "ring"]


def refuse_unsupported(transformer: nn.Module) -> None:
    """Refuse kinds of parallelism other than context parallelism.

    Raises:
        UnsupportedPipelineError: the weights of the transformer are split over ranks.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is not None and getattr(config, "tensor_parallel_config", None) is not None:
        raise UnsupportedPipelineError(
            "tensor parallelism is not supported: use context parallelism, "
            "pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))"
        )


def group_of(transformer: nn.Module) -> Any:
    """The process group that shares the tokens of `transformer`; None when it runs alone.

    It is that of its own context-parallel mesh, whatever other ranks there are: those that run
    another prompt or another guidance branch decide for themselves.
    """
    config = getattr(transformer, "_parallel_config", None)
    context = None if config is None else config.context_parallel_config
    return None if context is None else context._flattened_mesh.get_group()


def sequence_parallel_mode(transformer: nn.Module) -> SequenceParallelMode | None:
    """How the attention of `transformer` works on tokens of several ranks; None: it runs alone."""
    config = getattr(transformer, "_parallel_config", None)
    context = None if config is None else config.context_parallel_config
    if context is None:
        return None
    return "ring" if context.ring_degree > 1 else "ulysses"


def seen_by(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the forward of `block` sees them.

    Where the tokens are split in a hook of the first block, its caller holds those of all ranks,
    and only the block itself those of this one.
    """
    registry = vars(block).get("_diffusers_hook")
    for name, hook in () if registry is None else registry.hooks.items():
        if name.startswith("cp_input"):
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def relative_change(last: torch.Tensor, now: torch.Tensor, group: Any = None) -> torch.Tensor:
    """sum(|last - now|) / sum(|last|), over the tokens of all ranks of `group`, as a scalar.

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
