"""Triton's interpreter, mended where it computes something else than a chip does.

For tests and dry runs on a machine without a GPU. It holds bfloat16 as integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def mend_interpreter() -> None:
    """Have the interpreter round to bfloat16, and multiply it, as chips do; calling again is fine.

    Triton has to have been imported with TRITON_INTERPRET=1.
    """
    import triton.experimental.gluon  # noqa: F401 (else at the first launch, which is too late)
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "vidaccel_mended", False):
        return
    handle: Any = interpreter.TensorHandle
    dot, multiply, cast = builder.create_dot, builder.create_fmul, builder.cast_impl

    def widened(x: Any) -> Any:
        """The numbers themselves, in fp32."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        """It cuts off what does not fit into bfloat16; of int8 it would take the bits."""
        if source.dtype.scalar == tl.int8 and target.scalar == tl.bfloat16:
            source = handle(source.data.astype(np.float32), tl.float32)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def wide_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, widened(a), widened(b), d, precision, imprecise)

    def wide_multiply(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b)
        product = handle(widened(a).data * widened(b).data, tl.float32)
        return rounding_cast(self, product, tl.bfloat16)

    builder.create_dot, builder.create_fmul = wide_dot, wide_multiply
    builder.cast_impl, builder.vidaccel_mended = rounding_cast, True
