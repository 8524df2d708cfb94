"""Refuses transformers that an engine cannot work with, and tells which calls it leaves alone."""

import torch
from torch import nn

from vidaccel.engine import compat
from vidaccel.errors import UnsupportedPipelineError

_WHOLE_MODEL = (
    "the transformer is compiled as a whole, which freezes the decision of every step into one "
    "graph; compile its blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True)"
)
_NATIVE_CACHE = (
    "the transformer has a Diffusers cache enabled, which would skip the same blocks a second "
    "time; call pipe.transformer.disable_cache() first"
)
_TENSOR_PARALLEL = (
    "tensor parallelism is not supported: use context parallelism, "
    "pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))"
)


def refuse_unsupported(transformer: nn.Module) -> None:
    """Refuse a transformer that cannot be accelerated as it stands.

    Raises:
        UnsupportedPipelineError: it is compiled as a whole, another cache is at work on it, or its
            weights are split over ranks.
    """
    if compat.compiled_as_a_whole(transformer):
        raise UnsupportedPipelineError(_WHOLE_MODEL)
    if other := compat.other_cache(transformer):
        raise UnsupportedPipelineError(
            f"{other} is at work on the transformer, and two caches would skip the same blocks: "
            "disable it first"
        )
    refuse_unsupported_call(transformer)


def refuse_unsupported_call(transformer: nn.Module) -> None:
    """Refuse a call of a transformer whose state has changed since it was accelerated.

    Raises:
        UnsupportedPipelineError: as `refuse_unsupported` does.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedPipelineError(_WHOLE_MODEL)
    if compat.native_cache_enabled(transformer):
        raise UnsupportedPipelineError(_NATIVE_CACHE)
    config = compat.parallel_config(transformer)
    if config is not None and getattr(config, "tensor_parallel_config", None) is not None:
        raise UnsupportedPipelineError(_TENSOR_PARALLEL)


# Why a call is run as if the transformer were not accelerated.
TRAINING = "the transformer was in training mode"
GRADIENTS = "gradients were enabled"


def why_plain(transformer: nn.Module) -> str:
    """Return why a call is left alone; empty when it is not."""
    if torch.is_grad_enabled():
        return GRADIENTS
    return TRAINING if transformer.training else ""
