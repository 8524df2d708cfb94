"""Runs the embedding and the head of a transformer once more, around another residual.

What the head makes of a residual that was not the call's own tells what reusing that residual would
have cost. No block runs: it takes about a hundredth of a step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vidaccel.engine.attachment import ThreadState
from vidaccel.engine.state import RunningCall

# Main stream at the first block [B, S, C] -> what goes into the head.
Put = Callable[[torch.Tensor], torch.Tensor]


def run_tail(transformer: nn.Module, thread: ThreadState, call: RunningCall, put: Put) -> Any:
    """Run embedding and head with the arguments of a call.

    Args:
        transformer: the transformer.
        thread: that of the call.
        call: one that has ended.
        put: gives what goes into its head.

    Returns:
        The output of the transformer.
    """
    args, kwargs = call.arguments
    thread.call = replace(call, replayed=True, put=put, position=0, entry={}, residuals=[])
    try:
        return transformer.forward(*args, **kwargs)
    finally:
        thread.call = None
