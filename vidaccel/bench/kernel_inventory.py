"""Every kernel in every config that is shipped, as the compiler wants to see it without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vidaccel.kernels import block_sparse_attention as attention
from vidaccel.kernels import fused, kmeans, permute, quantise, schedule, select, sort
from vidaccel.kernels.common import HEAD_DIMS

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shipped:
    """One kernel in one config.

    Attributes:
        kernel: name of the kernel.
        head_dim: D; None where it does not matter.
        dtype: of q, k and v; None where it does not matter.
        function: the Triton function.
        signature: argument -> type.
        constants: argument -> value known when compiling.
        aligned: arguments that are known to be divisible by 16, as strides and addresses are.
        num_warps, num_stages: as launched.
        matrix: whether its time goes into matrix products.
    """

    kernel: str
    head_dim: int | None
    dtype: str | None
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False

    @property
    def name(self) -> str:
        """Such as "attend d128 bf16"."""
        parts = [self.kernel]
        parts += [f"d{self.head_dim}"] if self.head_dim else []
        return " ".join(parts + ([self.dtype] if self.dtype else []))

    def compile(self, capability: int) -> Any:
        """Compile for a chip of this compute capability, such as 90; needs no GPU."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.function.arg_names
        known = self.constants
        source = ASTSource(
            fn=self.function,
            signature={n: "constexpr" if n in known else self.signature[n] for n in names},
            constexprs=known,
            attrs={
                (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in self.aligned
            },
        )
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.num_warps, "num_stages": self.num_stages},
        )


def shipped(chip: int) -> Iterator[Shipped]:
    """All that runs on a chip of this compute capability, such as 90."""
    for dtype in _TYPES:
        for width in HEAD_DIMS:
            yield from _attend(width, dtype, chip)
            yield from _clustering(width, dtype)
    for width in HEAD_DIMS:
        yield _made(
            "threshold",
            select._threshold,
            width,
            pointers=dict.fromkeys(("least", "taken", "tokens", "k_offsets"), "i32"),
            default="fp32",
            floats=("scale", "top_p"),
            config={"GIVEN": False, **select.THRESHOLD},
        )
    tiles = {"ROWS": 128, "KEYS": 64, "PIECE": schedule.PIECE}
    lists = {"SCHEDULE": True, "UNSEEN": False, **tiles, **select.LISTS}
    types = {"scores": "fp32", "unseen": "i8"}
    yield _made("lists", select._lists, pointers=types, default="i32", config=lists)
    again = {"UNSEEN": True, **tiles, **select.LISTS}
    yield _made("schedule", schedule._from_selection, pointers=types, default="i32", config=again)
    yield _made("scan", sort._scan, default="i32", config=sort.SCAN)
    yield _made("rank", sort._rank, default="i32", config=sort.RANK)
    yield _made("histogram", sort._histogram, default="i32", config=sort.HISTOGRAM)


def _attend(width: int, dtype: torch.dtype, chip: int) -> Iterator[Shipped]:
    ints = ("order", "q_offsets", "k_offsets", "full", "pieces", "lengths", "table")
    types = dict.fromkeys(ints, "i32") | {"lse": "fp32", "unseen": "i8"}
    types |= dict.fromkeys(("k_scale", "k_shift"), "fp32")
    main, int8 = (attention.attention_config(width, dtype, chip, int8) for int8 in (False, True))
    means = attention.means_config(width, dtype, main["ROWS"])
    both = {"PIECE": schedule.PIECE}
    for name, function, config in (
        ("attend", attention._attend, {"INT8": False, **both, **main}),
        ("attend_int8", attention._attend, {"INT8": True, **both, **int8}),
        ("add_means", attention._add_means, means),
    ):
        yield _made(
            name,
            function,
            width,
            dtype,
            pointers=types | ({"k": "i8"} if name == "attend_int8" else {}),
            floats=("scale",),
            config={"ORDERED": True, **config},
            matrix=True,
        )
    yield _made(
        "mass",
        fused._mass,
        width,
        dtype,
        pointers=dict.fromkeys(("order", "q_offsets", "k_offsets"), "i32") | {"out": "fp32"},
        floats=("scale",),
        config=fused.mass_config(width, dtype),
        matrix=True,
    )


def _clustering(width: int, dtype: torch.dtype) -> Iterator[Shipped]:
    types = dict.fromkeys(("first0", "first1", "means", "half", "v_means"), "fp32")
    types |= dict.fromkeys(("x1_scale", "x1_shift", "scale", "shift"), "fp32")
    types |= dict.fromkeys(("histogram", "order", "offset", "label", "k_offsets"), "i32")
    types |= {"text_mask": "i8"}
    assign = {"MASKED": True, "CHUNK": sort.CHUNK, **kmeans.assign_config(dtype)}
    update = {"PERMUTE": True, "ROUND": True}
    int8 = {"x1_out": "i8", "values": "i8"}
    for name, function, config, more in (
        ("assign", kmeans._assign, assign, {}),
        ("prepare", kmeans._prepare, kmeans.PREPARE, {}),
        ("update", kmeans._update, {"INT8": False, **update, **kmeans.update_config(width)}, {}),
        (
            "update_int8",
            kmeans._update,
            {"INT8": True, **update, **kmeans.update_config(width, True)},
            int8,
        ),
        ("quantise", quantise._quantise, quantise.QUANTISE, int8),
        ("move", permute._move, {"SCATTER": True, **permute.MOVE}, {}),
    ):
        matrix = name == "assign"
        pointers = types | more
        yield _made(name, function, width, dtype, pointers=pointers, config=config, matrix=matrix)


def _made(
    kernel: str,
    function: Any,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    config: dict[str, Any],
    pointers: dict[str, str] | None = None,
    default: str | None = None,
    floats: tuple[str, ...] = (),
    matrix: bool = False,
) -> Shipped:
    """Types from names: strides end in _stride, other numbers are those not specialised on."""
    if width is not None:
        config = config | {"D": width, "DP": kmeans.padded(width)}
    launch = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    constants = {name: value for name, value in config.items() if name not in launch}
    main = default or _TYPES[dtype or torch.bfloat16]
    signature, aligned = {}, set()
    for name in function.arg_names:
        if name in constants:
            continue
        if name in floats:
            signature[name] = "fp32"
        elif "stride" in name:
            signature[name] = "i32"
            aligned.add(name)
        elif name in function.do_not_specialize:
            signature[name] = "i32"
        else:
            signature[name] = "*" + (pointers or {}).get(name, main)
            aligned.add(name)
    return Shipped(
        kernel,
        width,
        _TYPES[dtype] if dtype else None,
        function,
        signature,
        constants,
        frozenset(aligned),
        matrix=matrix,
        **launch,
    )
