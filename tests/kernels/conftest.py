"""Runs the Triton kernels here: on a GPU where there is one, else through Triton's interpreter.

Triton decides when a kernel is defined whether it will be interpreted, so the kernels are
imported here, with the variable set that asks for it, and the variable is taken away again:
nothing else in the process, and no process started by a test, sees it.
"""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # A library may have imported Triton without the variable. Its compiled part cannot be twice.
    for name in list(sys.modules):
        if name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    from vidaccel.kernels.interpreter import mend_interpreter

    mend_interpreter()

from vidaccel.kernels import (  # noqa: E402, F401
    haar,
    permute,
    product,
    rotate,
    semantic_attention_triton,
)

os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """New memory holds NaN, or a number that is no valid index, until a kernel writes it."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x):
        if x.numel() and x.device.type != "meta":
            x.fill_(float("nan") if x.is_floating_point() else 99)
        return x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
