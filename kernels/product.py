"""The product of rounded activations and rounded weights, with scales and bias in the same launch.

out[m, n] = bias[n] + sum over blocks of scales[m, b] * weight_scales[n, b] * (whole-number product
of the channels of b), see `reference.quantised_linear`. Without blocks the tensor cores multiply
int8 and sum in int32, and the scales are applied once, at the end. With blocks there are two ways,
and `product_config` says which chip takes which: a product of int8 for each block, whose sums are
then scaled; or codes times scales in 16 bits, multiplied as such. Weights of 4 bits are unpacked in
registers.

wgmma reads weights from shared memory, so that on sm_90 what a program makes of codes goes there
before each product: an H100 did 270 TFLOP/s so, and cuBLAS 740 with numbers that lie ready. With
many rows codes times scales are therefore written out there, some rows at a time, and the library
multiplies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import DTYPES, KernelError
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.rotate import SIZES

MAX_CHANNELS = (2**31 - 1) // 128**2  # whose sum of products fits int32


def quantised_linear_triton(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    *,
    block: int | None,
    packed: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Run `reference.quantised_linear`, whose arguments these are, checked: one launch.

    Raises:
        KernelError: a dtype, block or number of channels that the kernel does not take.
    """
    channels, outputs = codes.shape[-1], len(weight)
    if out_dtype not in DTYPES or scales.dtype != torch.float32:
        raise KernelError(
            "the kernels take scales in float32 and give float16, bfloat16 or float32, found "
            f"{scales.dtype} and {out_dtype}"
        )
    if scales.shape[-1] == weight_scales.shape[-1] == 1:
        block = None
    if block is not None and block not in SIZES:
        known = ", ".join(map(str, SIZES))
        raise KernelError(f"the kernels take a block of {known} channels, found {block}")
    if channels > MAX_CHANNELS:
        raise KernelError(f"{channels:,} channels are over the {MAX_CHANNELS:,} that int32 holds")
    out = torch.empty(*codes.shape[:-1], outputs, dtype=out_dtype, device=codes.device)
    if out.numel() == 0:
        return out
    rows = codes.reshape(-1, channels).contiguous()
    num_blocks = channels // (block or channels)
    if block is not None and by_library(len(rows), out_dtype, chip(codes.device)):
        _multiply_by_library(
            rows,
            scales.expand(*scales.shape[:-1], num_blocks).reshape(-1, num_blocks).contiguous(),
            weight.contiguous(),
            weight_scales.expand(-1, num_blocks).contiguous(),
            bias,
            out.view(-1, outputs),
            block,
            packed,
        )
        return out
    config = product_config(block, packed, out_dtype, chip(codes.device))
    tiles = triton.cdiv(len(rows), config["BLOCK_M"]) * triton.cdiv(outputs, config["BLOCK_N"])
    launch(_product, codes.device, tiles)(
        rows,
        scales.expand(*scales.shape[:-1], num_blocks).contiguous(),
        weight.contiguous(),
        weight_scales.expand(-1, num_blocks).contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        len(rows),
        outputs,
        channels,
        **config,
    )
    return out


LEAST_LIBRARY_ROWS = 256  # for fewer, to write weights out costs more than their product
_ROWS_AT_ONCE = 16_384  # whose numbers in 16 bits wait for their product


def by_library(rows: int, out_dtype: torch.dtype, chip: int) -> bool:
    """Tell whether the library multiplies where blocks have scales."""
    return chip == 90 and out_dtype == torch.bfloat16 and rows >= LEAST_LIBRARY_ROWS


def _multiply_by_library(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    block: int,
    packed: bool,
) -> None:
    """Write codes times scales out in bfloat16, and multiply: codes [R, K], out [R, N]."""
    wide = _dequantised_matrix(weight, weight_scales, block, packed).T
    for first in range(0, len(codes), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        x = _dequantised_matrix(codes[part], scales[part], block, packed=False)
        if bias is None:
            torch.mm(x, wide, out=out[part])
        else:
            torch.addmm(bias.to(out.dtype), x, wide, out=out[part])


def _dequantised_matrix(codes: Tensor, scales: Tensor, block: int, packed: bool) -> Tensor:
    """Return codes times scales, [R, K] in bfloat16: one launch."""
    rows, channels = len(codes), codes.shape[1] * (2 if packed else 1)
    wide = torch.empty(rows, channels, dtype=torch.bfloat16, device=codes.device)
    grid = (triton.cdiv(rows, DEQUANTISE["BLOCK_M"]), triton.cdiv(channels, DEQUANTISE["BLOCK_K"]))
    launch(_dequantise, codes.device, *grid)(
        codes, scales, wide, rows, channels, BLOCK=block, PACKED=packed, **DEQUANTISE
    )
    return wide


def product_config(
    block: int | None, packed: bool, out_dtype: torch.dtype, chip: int
) -> dict[str, int | bool]:
    """Return the way, the tile of rows, outputs and channels, warps and pipeline stages."""
    warpgroups = chip in (90, 100)
    exact = out_dtype == torch.float32
    int8 = block is None or (32 <= block <= 128 and (exact or not warpgroups))
    if block is None:
        if chip == 90:
            tile = (256, 128, 128, 8, 3) if packed else (128, 256, 128, 8, 3)
        else:
            tile = (128, 128, 128 if packed or warpgroups else 64, 8, 3)
    elif int8:
        # Sums in fp32 beside those of a block leave sm_100 registers for half of the tile.
        tile = (128, 64 if chip == 100 else 128, block, 8, 3 if block < 128 else 2)
    elif exact:
        tile = (32, 32, max(block, 32), 4, 1)
    elif block == 256:
        tile = (64, 64, block, 8, 2)
    elif chip == 90:
        tile = (256, 128, 64, 8, 3) if packed else (128, 256, 64, 8, 3)
        if block == 128:
            tile = (128, 128, 128, 8, 2)
    else:
        tile = (128, 128, max(block, 64), 8, 3 if block < 128 else 2)
    block_m, block_n, block_k, warps, stages = tile
    return {
        "BLOCK": block or 0,
        "INTEGERS": int8,
        "EXACT": exact,
        "PACKED": packed,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP_M": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


_FLOAT = tl.constexpr(1.5 * 2**23)
_FLOAT_BITS = tl.constexpr(0x4B400000)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    codes,
    scales,
    weight,
    weight_scales,
    bias,
    out,
    num_rows,
    outputs,
    channels,
    BLOCK: tl.constexpr,
    INTEGERS: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply one tile of rows with one tile of outputs.

    BLOCK channels share a scale, 0 for all of them; with INTEGERS whole numbers are multiplied, for
    blocks one of them (BLOCK_K) at a time, else numbers in 16 bits, or in 32 if EXACT.
    """
    # Tiles of GROUP_M rows run together, so that what they read stays in the L2 cache.
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = tl.program_id(0) // (GROUP_M * num_n)
    size_m = tl.minimum(num_m - band * GROUP_M, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * num_n)
    offs_m = (band * GROUP_M + place % size_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = place // size_m * BLOCK_N + tl.arange(0, BLOCK_N)
    # Past the end the last row is read again, so that no load has to look at it.
    row = tl.minimum(offs_m, num_rows - 1).to(tl.int64)
    output = tl.minimum(offs_n, outputs - 1).to(tl.int64)
    codes += row[:, None] * channels
    width = channels // 2 if PACKED else channels
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if BLOCK == 0 else tl.float32)
    for start in range(0, channels, BLOCK_K):
        mask_k = start + offs_k < channels
        # [BLOCK_M, BLOCK_K]
        a = tl.load(codes + (start + offs_k)[None, :], mask=mask_k[None, :], other=0)
        # [BLOCK_K, BLOCK_N]
        if PACKED:
            offs_w = start // 2 + tl.arange(0, BLOCK_K // 2)
            pairs = tl.load(
                weight + output[:, None] * width + offs_w[None, :],
                mask=(offs_w < width)[None, :],
                other=0,
            )
            w = tl.trans(_unpacked(pairs))
        else:
            w = tl.load(
                weight + output[:, None] * width + (start + offs_k)[None, :],
                mask=mask_k[None, :],
                other=0,
            )
            # Loaded as it lies and transposed: read in columns, it would be carried from turn to
            # turn in single bytes on sm_80.
            w = tl.trans(w)
        if BLOCK == 0:
            acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        elif INTEGERS:
            column = start // BLOCK
            # The first sum is the bits of a float whose last whole digit is its last bit, so that
            # to subtract it makes a float of the rest: quicker than a conversion.
            first = tl.full([BLOCK_M, BLOCK_N], _FLOAT_BITS, tl.int32)
            whole = tl.dot(a, w, first, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _FLOAT
            a_scale = tl.load(scales + row * (channels // BLOCK) + column)
            w_scale = tl.load(weight_scales + output * (channels // BLOCK) + column)
            acc += (whole * w_scale[None, :]) * a_scale[:, None]
        else:
            a = _dequantised(a, scales, row, start, channels, EXACT, BLOCK)
            w = _dequantised(tl.trans(w), weight_scales, output, start, channels, EXACT, BLOCK)
            acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")

    # Weights of 4 bits were unpacked 16 times as large.
    result = acc.to(tl.float32) * (0.0625 if PACKED else 1.0)
    if BLOCK == 0:
        result *= tl.load(scales + row)[:, None]
        result *= tl.load(weight_scales + output)[None, :]
    if bias is not None:
        result += tl.load(bias + output).to(tl.float32)[None, :]
    tl.store(
        out + row[:, None] * outputs + offs_n[None, :],
        result.to(out.dtype.element_ty),
        mask=(offs_m < num_rows)[:, None] & (offs_n < outputs)[None, :],
    )


DEQUANTISE = {"BLOCK_M": 16, "BLOCK_K": 256, "num_warps": 4}


@triton.jit(do_not_specialize=["num_rows"])
def _dequantise(
    codes,
    scales,
    out,
    num_rows,
    channels,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one tile of codes with their scales."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    start = tl.program_id(1) * BLOCK_K
    mask_m = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    width = channels // 2 if PACKED else channels
    first = start // 2 if PACKED else start
    offs = first + tl.arange(0, BLOCK_K // 2 if PACKED else BLOCK_K)
    # [BLOCK_M, BLOCK_K], or half of that
    tile = tl.load(
        codes + row[:, None] * width + offs[None, :], mask=(offs < width)[None, :], other=0
    )
    if PACKED:
        tile = _unpacked(tile)
    wide = _dequantised(tile, scales, row, start, channels, False, BLOCK).to(tl.float32)
    if PACKED:
        wide *= 0.0625
    offs_k = start + tl.arange(0, BLOCK_K)
    tl.store(
        out + row[:, None] * channels + offs_k[None, :],
        wide.to(tl.bfloat16),
        mask=mask_m[:, None] & (offs_k < channels)[None, :],
    )


@triton.jit
def _unpacked(pairs):
    """Turn [N, K // 2] bytes of two codes into [N, K] int8, 16 times the codes.

    What would divide by 16 again are two shifts of each number; the caller divides once.
    """
    even = (pairs << 4).to(tl.int8, bitcast=True)
    odd = (pairs & 0xF0).to(tl.int8, bitcast=True)
    return tl.interleave(even, odd)


@triton.jit
def _dequantised(codes, scales, row, start, channels, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Return codes [R, BLOCK_K] times the scales of their blocks, ready to be multiplied.

    The scale is rounded first: powers of two are exact, and so is their product with a code.
    """
    kind: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    num_rows: tl.constexpr = codes.shape[0]
    count: tl.constexpr = codes.shape[1] // BLOCK
    column = start // BLOCK + tl.arange(0, count)
    num_columns = channels // BLOCK
    # [R, count]
    scale = tl.load(
        scales + row[:, None] * num_columns + column[None, :],
        mask=(column < num_columns)[None, :],
        other=0.0,
    ).to(kind)
    wide = tl.reshape(codes.to(kind), [num_rows, count, BLOCK]) * scale[:, :, None]
    return tl.reshape(wide, [num_rows, count * BLOCK])
