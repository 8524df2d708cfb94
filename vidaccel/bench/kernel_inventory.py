"""Every kernel in every config that is shipped, described so that it compiles without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vidaccel.kernels import (
    block_lists,
    block_sparse_attention,
    haar,
    hopper_attention,
    kmeans,
    permute,
    product,
    quantise,
    query_mass,
    reference,
    rotate,
    select,
    sort,
)
from vidaccel.kernels.common import HEAD_DIMS, check_chip
from vidaccel.kernels.tiles import block_d

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Shipped:
    """One kernel in one config.

    Attributes:
        kernel: name of the kernel.
        head_dim: D; None where it does not matter.
        dtype: the dtype of q, k and v; None where it does not matter.
        function: the Triton function.
        signature: argument -> type.
        constants: argument -> value known when compiling; None for a pointer that is left out.
        aligned: arguments that are known to be divisible by 16, as strides and addresses are.
        num_warps, num_stages: as launched.
        products: matrix products per tile of the inner loop, counted as those of 16-bit numbers:
            those of int8 take half the time; 0 where the time goes into something else.
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
    products: float = 0

    @property
    def matrix(self) -> bool:
        """Tell whether its time goes into matrix products."""
        return self.products > 0

    @property
    def name(self) -> str:
        """Kernel, head size and dtype, such as "attend d128 bf16"."""
        parts = [self.kernel]
        parts += [f"d{self.head_dim}"] if self.head_dim else []
        return " ".join(parts + ([self.dtype] if self.dtype else []))

    def compile(self, capability: int) -> Any:
        """Compile for a chip of this compute capability, such as 90; needs no GPU.

        Raises:
            KernelError: the kernels do not run on it.
        """
        check_chip(capability)
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        names = self.function.arg_names
        known = self.constants
        source = (GluonASTSource if self.function.is_gluon() else ASTSource)(
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
    """List all that runs on a chip of this compute capability, such as 90.

    Raises:
        KernelError: the kernels do not run on it.
    """
    check_chip(chip)
    return _all(chip)


def _all(chip: int) -> Iterator[Shipped]:
    for dtype in _TYPES:
        for head_dim in HEAD_DIMS:
            yield from _attention(head_dim, dtype, chip)
            yield from _clustering(head_dim, dtype, chip)
        yield from _linear(dtype, chip)
    yield from _selection(chip)
    yield _shipped("scan", sort._scan, sort.SCAN, default="i32")
    yield _shipped("rank", sort._rank, sort.RANK, default="i32")
    yield _shipped("histogram", sort._histogram, sort.HISTOGRAM, default="i32")


def _attention(head_dim: int, dtype: torch.dtype, chip: int) -> Iterator[Shipped]:
    """List the kernels whose time goes into the products of attention."""
    lists = ("sorted_idx", "q_offsets", "k_offsets", "full_blocks", "partial_blocks")
    types = dict.fromkeys((*lists, "num_blocks", "q_tiles"), "i32")
    types |= dict.fromkeys(("lse", "k_scale", "k_shift", "log2_sizes", "mean_bias"), "fp32")
    module = block_sparse_attention
    exact, int8 = (
        {"INT8": int8_qk, "BLOCK_PARTIAL": block_lists.BLOCK_PARTIAL}
        | module.attention_config(head_dim, dtype, chip, int8_qk)
        for int8_qk in (False, True)
    )
    exact |= {"k_scale": None, "k_shift": None}
    # With int8 only as SVG2 has it: without means it is a part of the same code.
    absent = ("k_means", "v_means", "mean_bias", "num_means", "num_compensated")
    mass = {"MOST": reference.MASS_QUERIES, **query_mass.mass_config(head_dim, dtype, chip)}
    hopper = hopper_attention.hopper_config(head_dim, dtype) if chip == 90 else None
    if hopper is not None:
        config = {"BLOCK_PARTIAL": block_lists.BLOCK_PARTIAL, "NUM_WARPS": hopper["num_warps"]}
        function = hopper_attention._attend_on_hopper
        for name, left_out in (("attend_hopper", absent), ("attend_hopper_means", ())):
            yield _shipped(
                name,
                function,
                config | hopper | dict.fromkeys(left_out),
                head_dim,
                dtype,
                pointers=types,
                products=2,
            )
    for name, function, config, pointers, products in (
        ("attend", module._attend, exact | dict.fromkeys(absent), types, 2),
        ("attend_means", module._attend, exact, types, 2),
        ("attend_int8", module._attend, int8, types | {"k": "i8"}, 1.5),
        ("mass", query_mass._mass, mass, types | {"out": "fp32"}, 1),
    ):
        yield _shipped(
            name, function, config, head_dim, dtype, pointers=pointers, products=products
        )


def _clustering(head_dim: int, dtype: torch.dtype, chip: int) -> Iterator[Shipped]:
    """List the kernels of k-means, and those that move and round rows."""
    floats = ("first0", "first1", "centroids", "means", "half_norms", "log2_sizes")
    types = dict.fromkeys((*floats, "k_scale", "k_shift", "scale", "shift"), "fp32")
    ints = ("labels", "histogram", "sorted_idx", "offsets", "k_offsets")
    types |= dict.fromkeys(ints, "i32") | {"text_mask": "i8"}
    rounded = types | {"k_sorted": "i8", "codes": "i8"}
    assign = {"CHUNK": sort.CHUNK, **kmeans.assign_config(dtype, chip)}
    exact, int8 = (
        {"INT8": int8_qk, **kmeans.update_and_sort_config(head_dim, int8_qk)}
        for int8_qk in (False, True)
    )
    exact |= {"k_scale": None, "k_shift": None}
    for name, function, config, pointers in (
        ("assign", kmeans._assign, assign, types),
        ("prepare", kmeans._prepare, kmeans.PREPARE, types),
        ("update", kmeans._update, kmeans.update_config(head_dim), types),
        ("update_sort", kmeans._update_and_sort, exact, types),
        ("update_sort_int8", kmeans._update_and_sort, int8, rounded),
        ("quantise", quantise._quantise, quantise.QUANTISE, rounded),
        ("move", permute._move, {"SCATTER": True, **permute.MOVE}, types),
    ):
        products = 1 if name == "assign" else 0
        yield _shipped(
            name, function, config, head_dim, dtype, pointers=pointers, products=products
        )


def _selection(chip: int) -> Iterator[Shipped]:
    """List the kernels that select key clusters and list them for attention."""
    types = dict.fromkeys(("threshold", "num_selected", "tokens", "k_offsets"), "i32")
    for head_dim in HEAD_DIMS:
        config = {"logits": None, **select.threshold_config(chip)}
        yield _shipped(
            "threshold", select._threshold, config, head_dim, pointers=types, default="fp32"
        )
    tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_PARTIAL": block_lists.BLOCK_PARTIAL}
    config = {**tiles, **block_lists.LISTS}
    types = {"scores": "fp32", "mean_bias": "fp32"}
    yield _shipped(
        "lists", select._lists, {"mean_bias": None, **config}, pointers=types, default="i32"
    )
    yield _shipped(
        "block_lists", block_lists._from_selection, config, pointers=types, default="i32"
    )


def _linear(dtype: torch.dtype, chip: int) -> Iterator[Shipped]:
    """List the kernels of linear layers in low precision: in bf16 all, else one of each way."""
    all_of_them = dtype == torch.bfloat16
    numbers = ("scales", "weight_scales", "tensor_scale")
    types = dict.fromkeys(numbers, "fp32") | {"codes": "i8", "weight": "i8", "high": "i1"}
    for name, block, packed, common in (
        ("linear_int8", None, False, True),
        ("linear_int4", None, True, False),
        ("linear_mxint8", 32, False, True),
        ("linear_mxint4", 32, True, False),
        ("linear_nvint4", 16, True, True),
        ("linear_int4_64", 64, True, False),
    ):
        config: dict[str, Any] = product.product_config(block, packed, dtype, chip)
        if all_of_them or common:
            pointers = types | ({"weight": "u8"} if packed else {})
            products = 0.5 if config["INTEGERS"] else 1
            yield _shipped(
                name, product._product, config, dtype=dtype, pointers=pointers, products=products
            )
    for name, block, packed in (("dequantise", 32, False), ("dequantise_int4", 16, True)):
        if all_of_them:
            config = {"BLOCK": block, "PACKED": packed, **product.DEQUANTISE}
            pointers = types | {"codes": "u8" if packed else "i8", "out": "bf16"}
            yield _shipped(name, product._dequantise, config, dtype=dtype, pointers=pointers)
    for name, block, scale_format, group, per_group, common in (
        ("round_int8", None, "float32", None, False, False),
        ("rotate_int8_64", None, "float32", 64, False, False),
        ("rotate_int8_256", None, "float32", 256, False, True),
        ("rotate_mxint8_32", 32, "ue8m0", 32, True, True),
        ("round_nvint4", 16, "e4m3", None, False, False),
        ("rotate_nvint4_16", 16, "e4m3", 16, False, True),
        ("rotate_nvint4_256", 16, "e4m3", 256, False, False),
    ):
        config = rotate.rotate_config(group, block, dtype, chip, per_group)
        config["SCALE_FORMAT"] = scale_format
        config |= {} if group else {"rotation": None}
        config |= {} if scale_format == "e4m3" else {"tensor_scale": None}
        config |= {} if scale_format == "e4m3" else {"high": None}
        if all_of_them or common:
            yield _shipped(name, rotate._rotate_quantise, config, dtype=dtype, pointers=types)
    for name, inverse in (("haar", False), ("haar_inverse", True)):
        config = {"INVERSE": inverse, "LEVELS": haar.MAX_LEVELS, **haar.HAAR}
        if all_of_them:
            yield _shipped(name, haar._haar, config, dtype=dtype)


def _shipped(
    kernel: str,
    function: Any,
    config: dict[str, Any],
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    pointers: dict[str, str] | None = None,
    default: str | None = None,
    products: float = 0,
) -> Shipped:
    """Describe one config: types follow from names.

    Strides end in _stride, numbers of channels are those of _CHANNELS, factors those of _FLOATS,
    other numbers are those that are not specialised on, and all else is a pointer.
    """
    if head_dim is not None:
        config = config | {"HEAD_DIM": head_dim}
        config |= {"BLOCK_D": block_d(head_dim)} if "BLOCK_D" in function.arg_names else {}
    launch = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    constants = {name: value for name, value in config.items() if name not in launch}
    main = default or _TYPES[dtype or torch.bfloat16]
    signature, aligned = {}, set()
    for name in function.arg_names:
        if name in constants:
            continue
        if name in function.do_not_specialize:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        elif "stride" in name or name in _CHANNELS:
            signature[name] = "i32"
            aligned.add(name)
        else:
            signature[name] = "*" + (pointers or {}).get(name, main)
            aligned.add(name)
    return Shipped(
        kernel,
        head_dim,
        _TYPES[dtype] if dtype else None,
        function,
        signature,
        constants,
        frozenset(aligned),
        products=products,
        **launch,
    )


_FLOATS = ("scale", "qk_scale_log2", "top_p", "qmax")
_CHANNELS = ("channels", "outputs")
