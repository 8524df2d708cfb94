"""Runs the Triton kernels here: on a GPU where there is one, else through Triton's interpreter.

Triton decides when a kernel is defined whether it will be interpreted, so the kernels are
imported here, with the variable set that asks for it, and the variable is taken away again:
nothing else in the process, and no process started by a test, sees it.
"""

import os
import sys

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # A library may have imported Triton without the variable. Its compiled part cannot be twice.
    for name in list(sys.modules):
        if name == "triton" or (name.startswith("triton.") and not name.startswith("triton._C")):
            del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401 (else at the first launch, which is too late)
    import triton.language as tl
    from triton.runtime import interpreter

    _dot = interpreter.InterpreterBuilder.create_dot

    def _bfloat16_dot(self, a, b, d, precision, imprecise):
        """The interpreter holds bfloat16 as integers, and would multiply those."""

        def widened(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            exact = (x.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(exact, tl.float32)

        return _dot(self, widened(a), widened(b), d, precision, imprecise)

    _cast = interpreter.InterpreterBuilder.cast_impl

    def _rounding_cast(self, source, target):
        """The interpreter cuts off what does not fit into bfloat16; chips round to nearest.

        Of int8 it would take the bits.
        """
        if source.dtype.scalar == tl.int8 and target.scalar == tl.bfloat16:
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            data = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return _cast(self, source, target)

    _multiply = interpreter.InterpreterBuilder.create_fmul

    def _bfloat16_multiply(self, a, b):
        """The same for products of numbers."""
        if a.dtype.scalar != tl.bfloat16:
            return _multiply(self, a, b)
        wide = [(x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
        product = interpreter.TensorHandle(wide[0] * wide[1], tl.float32)
        return _rounding_cast(self, product, tl.bfloat16)

    interpreter.InterpreterBuilder.create_fmul = _bfloat16_multiply
    interpreter.InterpreterBuilder.create_dot = _bfloat16_dot
    interpreter.InterpreterBuilder.cast_impl = _rounding_cast

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
