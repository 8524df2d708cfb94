"""Activations rotated in groups of channels and rounded to whole numbers, in one launch.

y = rotation @ x in every group of channels, then codes and scales as `reference.rotate_quantise`
says. A program takes some rows and walks over their channels in tiles. Scales of blocks are found
in the tile itself. A scale of a whole row is known when all of it has been seen, so that the row
is read and rotated twice, the second time from the L2 cache: less than to write rotated rows and
read them again, and nothing is rounded in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import DTYPES, KernelError
from vidaccel.kernels.launch import chip, launch
from vidaccel.kernels.reference import E4M3_LEAST, E4M3_MOST, LEAST

SIZES = (16, 32, 64, 128, 256)  # of groups and blocks


def rotate_quantise_triton(
    x: Tensor,
    *,
    qmax: int,
    block: int | None,
    scale_format: str,
    tensor_scale: Tensor | None,
    rotation: Tensor | None,
    high: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `reference.rotate_quantise`, whose arguments these are, checked: one launch.

    Raises:
        KernelError: a dtype, group or block that the kernel does not take.
    """
    if x.dtype not in DTYPES:
        raise KernelError(f"x must be float16, bfloat16 or float32, found {x.dtype}")
    group = None if rotation is None else rotation.shape[-1]
    for name, size in (("rotation", group), ("block", block)):
        if size is not None and size not in SIZES:
            known = ", ".join(map(str, SIZES))
            raise KernelError(f"the kernels take a {name} of {known} channels, found {size}")
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    num_blocks = channels // (block or channels)
    scales = torch.empty(*x.shape[:-1], num_blocks, dtype=torch.float32, device=x.device)
    if len(rows) == 0:
        return codes, scales
    per_group = rotation is not None and rotation.dim() == 3
    config = rotate_config(group, block, x.dtype, chip(x.device), per_group)
    span = channels if block is None else max(block, config["TILE"] * TILES_PER_PROGRAM)
    if config["WHOLE_SPAN"]:
        span = block or channels
    grid = (triton.cdiv(len(rows), config["BLOCK_M"]), triton.cdiv(channels, span))
    launch(_rotate_quantise, x.device, *grid)(
        rows,
        None if rotation is None else rotation.to(x.dtype).contiguous(),
        None if tensor_scale is None else tensor_scale.float(),
        None if high is None else high.contiguous(),
        codes,
        scales,
        rows.stride(0),
        len(rows),
        channels,
        span,
        float(qmax),
        SCALE_FORMAT=scale_format,
        **config,
    )
    return codes, scales


TILES_PER_PROGRAM = 8  # where blocks have scales


def rotate_config(
    group: int | None, block: int | None, dtype: torch.dtype, chip: int, per_group: bool
) -> dict[str, int | bool]:
    """Return the tile of rows and channels, and how many columns of a rotation are read at once."""
    if group is None:
        tile, part, block_m, warps, stages = 256, 16, 8, 4, 1
    elif dtype == torch.float32:  # products without tensor cores
        tile, part, block_m, warps, stages = group, 16, 16, 4 if group < 128 else 8, 1
    else:
        # Small groups that share a rotation are rotated together.
        tile = group if per_group else max(group, 64)
        part = min(group, 64) if group < 256 else 32
        # More rows run out of registers on other chips, and with scales of blocks of large groups.
        block_m = 64 if chip in (90, 100) and (group < 256 or block is None) else 32
        warps, stages = 4 if group < 128 else 8, 2
    return {
        "GROUP": group or 0,
        "PER_GROUP": per_group,
        "BLOCK": block or 0,
        "WHOLE_SPAN": block is None or block > tile,
        "BLOCK_M": block_m,
        "TILE": tile,
        "BLOCK_I": part,
        "SHARED": chip == 90 and group == 256 and not per_group and dtype != torch.float32,
        "num_warps": warps,
        "num_stages": stages,
    }


_LEAST = tl.constexpr(LEAST)
_E4M3_LEAST, _E4M3_MOST = tl.constexpr(E4M3_LEAST), tl.constexpr(E4M3_MOST)
# Added to a number of size up to 2^22, it leaves the nearest whole number in the lowest bits.
_ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit(do_not_specialize=["num_rows", "span", "qmax"])
def _rotate_quantise(
    x,
    rotation,
    tensor_scale,
    high,
    codes,
    scales,
    x_row_stride,
    num_rows,
    channels,
    span,
    qmax,
    SCALE_FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Rotate and round some rows, in one span of channels.

    BLOCK channels share a scale, or all of the span if WHOLE_SPAN.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    offs_m = offs_m.to(tl.int64)
    # Where a thread reads 8 channels at once, the compiler has to know that they lie aligned.
    begin = tl.multiple_of(tl.program_id(1) * span, 16)
    end = tl.minimum(begin + span, channels)
    x += offs_m[:, None] * x_row_stride
    codes += offs_m[:, None] * channels
    # [BLOCK_M]
    top = tl.full([BLOCK_M], 1.0, tl.float32) * qmax
    if high is not None:
        top = tl.where(tl.load(high + offs_m, mask=mask_m, other=0) != 0, 127.0, top)
    unit = 1.0
    if SCALE_FORMAT == "e4m3":
        unit = tl.load(tensor_scale)
        unit = tl.where(unit > 0.0, unit, float("nan"))
    turn = None
    if SHARED:
        turn = _load_rotation(rotation, 0, GROUP, GROUP)
    if WHOLE_SPAN:
        largest = tl.zeros([BLOCK_M], tl.float32)
        for start in range(begin, end, TILE):
            # [BLOCK_M, TILE]
            y = _rotated(
                x,
                rotation,
                turn,
                mask_m,
                start,
                channels,
                GROUP,
                PER_GROUP,
                BLOCK_M,
                TILE,
                BLOCK_I,
            )
            largest = tl.maximum(largest, tl.max(_size(y), 1))
        scale, levels = _scale_of(largest, top, unit, SCALE_FORMAT)
        column = 0 if BLOCK == 0 else begin // BLOCK
        num_columns = 1 if BLOCK == 0 else channels // BLOCK
        tl.store(scales + offs_m * num_columns + column, scale, mask=mask_m)
        for start in range(begin, end, TILE):
            # [BLOCK_M, TILE]
            y = _rotated(
                x,
                rotation,
                turn,
                mask_m,
                start,
                channels,
                GROUP,
                PER_GROUP,
                BLOCK_M,
                TILE,
                BLOCK_I,
            )
            whole = _rounded(y, levels[:, None], top[:, None])
            offs = start + tl.arange(0, TILE)
            tl.store(
                codes + offs[None, :], whole, mask=mask_m[:, None] & (offs < channels)[None, :]
            )
    else:
        num_columns = channels // BLOCK
        for start in range(begin, end, TILE):
            # [BLOCK_M, TILE]
            y = _rotated(
                x,
                rotation,
                turn,
                mask_m,
                start,
                channels,
                GROUP,
                PER_GROUP,
                BLOCK_M,
                TILE,
                BLOCK_I,
            )
            # [BLOCK_M, TILE // BLOCK, BLOCK]
            y = tl.reshape(y, [BLOCK_M, TILE // BLOCK, BLOCK])
            # [BLOCK_M, TILE // BLOCK]
            scale, levels = _scale_of(tl.max(_size(y), 2), top[:, None], unit, SCALE_FORMAT)
            column = start // BLOCK + tl.arange(0, TILE // BLOCK)
            mask = mask_m[:, None] & (column < num_columns)[None, :]
            tl.store(scales + offs_m[:, None] * num_columns + column[None, :], scale, mask=mask)
            whole = _rounded(y, levels[:, :, None], top[:, None, None])
            offs = start + tl.arange(0, TILE)
            tl.store(
                codes + offs[None, :],
                tl.reshape(whole, [BLOCK_M, TILE]),
                mask=mask_m[:, None] & (offs < channels)[None, :],
            )


@triton.jit
def _rotated(
    x,
    rotation,
    turn,
    mask_m,
    start,
    channels,
    GROUP: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return TILE channels of some rows, rotated: [BLOCK_M, TILE] fp32.

    x [BLOCK_M, 1] points at the rows.
    """
    if turn is not None:
        offs = start + tl.arange(0, TILE)
        # [BLOCK_M, TILE]
        tile = tl.load(x + offs[None, :], mask=mask_m[:, None], other=0.0)
        y = tl.dot(tile, turn, input_precision="ieee")
    elif GROUP > 0 and TILE == GROUP:
        y = tl.zeros([BLOCK_M, TILE], tl.float32)
        if PER_GROUP:
            rotation += start * GROUP
        for part in range(0, GROUP, BLOCK_I):
            offs = start + part + tl.arange(0, BLOCK_I)
            # [BLOCK_M, BLOCK_I]
            tile = tl.load(x + offs[None, :], mask=mask_m[:, None], other=0.0)
            columns = _load_rotation(rotation, part, GROUP, BLOCK_I)
            y = tl.dot(tile, columns, y, input_precision="ieee")
    else:
        offs = start + tl.arange(0, TILE)
        mask = mask_m[:, None] & (offs < channels)[None, :]
        # [BLOCK_M, TILE]
        y = tl.load(x + offs[None, :], mask=mask, other=0.0)
        if GROUP > 0:
            y = tl.reshape(y, [BLOCK_M * (TILE // GROUP), GROUP])
            y = tl.dot(y, _load_rotation(rotation, 0, GROUP, GROUP), input_precision="ieee")
            y = tl.reshape(y, [BLOCK_M, TILE])
        y = y.to(tl.float32)
    return y


@triton.jit
def _load_rotation(rotation, part, GROUP: tl.constexpr, BLOCK_I: tl.constexpr):
    """Load the columns of a rotation [GROUP, GROUP] from `part` on, as [BLOCK_I, GROUP]."""
    offs_o = tl.arange(0, GROUP)
    offs_i = part + tl.arange(0, BLOCK_I)
    # As it lies, then transposed: it goes from memory to shared memory without registers.
    return tl.trans(tl.load(rotation + offs_o[:, None] * GROUP + offs_i[None, :]))


@triton.jit
def _size(y):
    """Return |y|, infinite where y is NaN."""
    size = tl.abs(y)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _scale_of(largest, top, unit, SCALE_FORMAT: tl.constexpr):
    """Return the scale of blocks with these largest sizes, and its reciprocal.

    The reciprocal is 0 where all codes are 0. `unit` is the tensor scale.
    """
    ratio = tl.div_rn(largest, tl.broadcast_to(top, largest.shape))
    if SCALE_FORMAT == "float32":
        scale = tl.where(largest > _LEAST, ratio, 1.0)
    elif SCALE_FORMAT == "ue8m0":
        exponent = (ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        power = (exponent << 23).to(tl.float32, bitcast=True)
        scale = tl.where(largest > _LEAST, power, 1.0)
    else:
        steps = tl.div_rn(ratio, tl.zeros_like(ratio) + unit)
        steps = tl.clamp(steps, _E4M3_LEAST, _E4M3_MOST)
        # Halves to even, in the last of 3 bits after the point, or in multiples of 2^-9.
        bits = steps.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (steps + _ROUND * _E4M3_LEAST) - _ROUND * _E4M3_LEAST
        steps = tl.where(steps < 0.015625, small, bits.to(tl.float32, bitcast=True))
        scale = tl.where(largest > _LEAST, steps, _E4M3_LEAST) * unit
    scale = tl.where(largest < float("inf"), scale, float("nan"))
    levels = tl.where((largest > _LEAST) & (scale > 0.0), tl.div_rn(1.0, scale), 0.0)
    return scale, levels


@triton.jit
def _rounded(y, levels, top):
    """Return y * levels, rounded to int8 with halves to even; 0 where levels is 0."""
    scaled = tl.where(levels > 0.0, y * levels, 0.0)
    scaled = tl.clamp(scaled, tl.broadcast_to(-top, y.shape), tl.broadcast_to(top, y.shape))
    return (scaled + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
