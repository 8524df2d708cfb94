"""The 3-D Haar transform along the tokens of a video and its inverse, in one launch each.

See `reference.token_haar` for the order of coefficients. Three levels of sums and differences never
mix tokens of different cubes of 8 x 8 x 8, so a program reads one cube of a few channels, keeps it
in registers through all levels, and writes every coefficient to its place: each number is read and
written once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.common import DTYPES, KernelError
from vidaccel.kernels.launch import launch
from vidaccel.kernels.reference import haar_sums


def token_haar_triton(
    x: Tensor, grid: tuple[int, int, int], *, inverse: bool, levels: int
) -> Tensor:
    """Run `reference.token_haar`, whose arguments these are, checked: a launch for 3 levels.

    Raises:
        KernelError: a dtype that the kernel does not take.
    """
    if x.dtype not in DTYPES:
        raise KernelError(f"x must be float16, bfloat16 or float32, found {x.dtype}")
    if x.dim() == 2:
        return token_haar_triton(x[None], grid, inverse=inverse, levels=levels)[0]
    if x.stride(2) != 1:
        x = x.contiguous()
    if levels <= MAX_LEVELS:
        return _transformed(x, grid, inverse, levels)
    # The box of sums after 3 levels lies first, as a small video of its own.
    box = grid
    for _ in range(MAX_LEVELS):
        box = haar_sums(box)
    first, rest = math.prod(box), levels - MAX_LEVELS
    if inverse:
        inner = token_haar_triton(x[:, :first], box, inverse=True, levels=rest)
        return _transformed(torch.cat([inner, x[:, first:]], 1), grid, True, MAX_LEVELS)
    out = _transformed(x, grid, False, MAX_LEVELS)
    out[:, :first] = token_haar_triton(out[:, :first], box, inverse=False, levels=rest)
    return out


def _transformed(x: Tensor, grid: tuple[int, int, int], inverse: bool, levels: int) -> Tensor:
    """Transform x [B, S, K] through up to 3 levels."""
    batch, _, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    cubes = math.prod(triton.cdiv(size, 2**MAX_LEVELS) for size in grid)
    launch(_haar, x.device, cubes * triton.cdiv(channels, HAAR["BLOCK_C"]), batch)(
        x, out, *x.stride()[:2], *grid, channels, INVERSE=inverse, LEVELS=levels, **HAAR
    )
    return out


MAX_LEVELS = 3
HAAR = {"BLOCK_C": 32, "num_warps": 8}
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _haar(
    x,
    out,
    x_batch_stride,
    x_row_stride,
    frames,
    height,
    width,
    channels,
    INVERSE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Transform one cube of 8 x 8 x 8 tokens and BLOCK_C channels."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    cube = tl.program_id(0) // blocks_c
    cube_w = cube % tl.cdiv(width, 8)
    cube_h = cube // tl.cdiv(width, 8) % tl.cdiv(height, 8)
    cube_f = cube // (tl.cdiv(width, 8) * tl.cdiv(height, 8))
    offs_c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    batch = tl.program_id(1).to(tl.int64)
    x += batch * x_batch_stride + offs_c[None, :]
    out += batch * frames * height * width * channels + offs_c[None, :]
    # A node is what becomes of 8 tokens, or of 8 sums of the level before: 64, 8 and 1 of them. A
    # node of the first level is numbered by its parent in the second, then by its place in that.
    n = tl.arange(0, 64)
    first = (
        cube_f * 4 + (n >> 5) * 2 + ((n >> 2) & 1),
        cube_h * 4 + ((n >> 4) & 1) * 2 + ((n >> 1) & 1),
        cube_w * 4 + ((n >> 3) & 1) * 2 + (n & 1),
    )
    n = tl.arange(0, 8)
    second = (cube_f * 2 + (n >> 2), cube_h * 2 + ((n >> 1) & 1), cube_w * 2 + (n & 1))
    n = tl.arange(0, 1)
    third = (cube_f + n, cube_h + n, cube_w + n)
    # The grids that the levels start from.
    grid_1 = (frames, height, width)
    grid_2 = ((frames + 1) // 2, (height + 1) // 2, (width + 1) // 2)
    grid_3 = ((frames + 3) // 4, (height + 3) // 4, (width + 3) // 4)
    if INVERSE:
        if LEVELS == 3:
            sums = _load(x, x_row_stride, mask_c, _boxes(grid_3)[0], third)
            sums = _joined(_synthesis(x, x_row_stride, mask_c, sums, grid_3, third), 1, BLOCK_C)
        elif LEVELS == 2:
            sums = _load(x, x_row_stride, mask_c, _boxes(grid_2)[0], second)
        else:
            sums = _load(x, x_row_stride, mask_c, _boxes(grid_1)[0], first)
        if LEVELS >= 2:
            sums = _joined(_synthesis(x, x_row_stride, mask_c, sums, grid_2, second), 8, BLOCK_C)
        tokens = _synthesis(x, x_row_stride, mask_c, sums, grid_1, first)
        for index in tl.static_range(8):
            token, known = _token(grid_1, first, index)
            tl.store(
                out + token.to(tl.int64)[:, None] * channels,
                tokens[index].to(out.dtype.element_ty),
                mask=known[:, None] & mask_c[None, :],
            )
    else:
        tokens = _tokens(x, x_row_stride, mask_c, grid_1, first)
        sums = _analysis(out, channels, mask_c, tokens, grid_1, first)
        if LEVELS == 1:
            _store(out, channels, mask_c, sums, _boxes(grid_1)[0], first)
        else:
            children = _parted(sums, 8, BLOCK_C)
            sums = _analysis(out, channels, mask_c, children, grid_2, second)
            if LEVELS == 2:
                _store(out, channels, mask_c, sums, _boxes(grid_2)[0], second)
            else:
                children = _parted(sums, 1, BLOCK_C)
                sums = _analysis(out, channels, mask_c, children, grid_3, third)
                _store(out, channels, mask_c, sums, _boxes(grid_3)[0], third)


@triton.jit
def _analysis(out, row_stride, mask_c, children, grid, node):
    """Turn 8 children of each node into sums, which are returned, and differences, stored."""
    pair_f, pair_h, pair_w = _paired(grid, node)
    a0, a1, a2, a3, a4, a5, a6, a7 = children
    a0, a4 = _split(a0, a4, pair_f)
    a1, a5 = _split(a1, a5, pair_f)
    a2, a6 = _split(a2, a6, pair_f)
    a3, a7 = _split(a3, a7, pair_f)
    a0, a2 = _split(a0, a2, pair_h)
    a1, a3 = _split(a1, a3, pair_h)
    a4, a6 = _split(a4, a6, pair_h)
    a5, a7 = _split(a5, a7, pair_h)
    a0, a1 = _split(a0, a1, pair_w)
    a2, a3 = _split(a2, a3, pair_w)
    a4, a5 = _split(a4, a5, pair_w)
    a6, a7 = _split(a6, a7, pair_w)
    boxes = _boxes(grid)
    _store(out, row_stride, mask_c, a1, boxes[1], node)
    _store(out, row_stride, mask_c, a2, boxes[2], node)
    _store(out, row_stride, mask_c, a3, boxes[3], node)
    _store(out, row_stride, mask_c, a4, boxes[4], node)
    _store(out, row_stride, mask_c, a5, boxes[5], node)
    _store(out, row_stride, mask_c, a6, boxes[6], node)
    _store(out, row_stride, mask_c, a7, boxes[7], node)
    return a0


@triton.jit
def _synthesis(x, row_stride, mask_c, a0, grid, node):
    """Turn sums and the differences that are loaded here into 8 children of each node."""
    pair_f, pair_h, pair_w = _paired(grid, node)
    boxes = _boxes(grid)
    a1 = _load(x, row_stride, mask_c, boxes[1], node)
    a2 = _load(x, row_stride, mask_c, boxes[2], node)
    a3 = _load(x, row_stride, mask_c, boxes[3], node)
    a4 = _load(x, row_stride, mask_c, boxes[4], node)
    a5 = _load(x, row_stride, mask_c, boxes[5], node)
    a6 = _load(x, row_stride, mask_c, boxes[6], node)
    a7 = _load(x, row_stride, mask_c, boxes[7], node)
    # A pair of sum and difference is split in the same way as one of neighbours.
    a0, a1 = _split(a0, a1, pair_w)
    a2, a3 = _split(a2, a3, pair_w)
    a4, a5 = _split(a4, a5, pair_w)
    a6, a7 = _split(a6, a7, pair_w)
    a0, a2 = _split(a0, a2, pair_h)
    a1, a3 = _split(a1, a3, pair_h)
    a4, a6 = _split(a4, a6, pair_h)
    a5, a7 = _split(a5, a7, pair_h)
    a0, a4 = _split(a0, a4, pair_f)
    a1, a5 = _split(a1, a5, pair_f)
    a2, a6 = _split(a2, a6, pair_f)
    a3, a7 = _split(a3, a7, pair_f)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _split(a, b, paired):
    """Return sum and difference of neighbours; a alone is carried on where it has none."""
    return tl.where(paired[:, None], (a + b) * _ROOT_HALF, a), (a - b) * _ROOT_HALF


@triton.jit
def _paired(grid, node):
    """Tell along each dimension which nodes have two children, of odd lengths the last has one."""
    return (
        node[0] * 2 + 1 < grid[0],
        node[1] * 2 + 1 < grid[1],
        node[2] * 2 + 1 < grid[2],
    )


@triton.jit
def _tokens(x, row_stride, mask_c, grid, node):
    """Load the 8 tokens of each node, [nodes, BLOCK_C] fp32 each."""
    return (
        _load_token(x, row_stride, mask_c, grid, node, 0),
        _load_token(x, row_stride, mask_c, grid, node, 1),
        _load_token(x, row_stride, mask_c, grid, node, 2),
        _load_token(x, row_stride, mask_c, grid, node, 3),
        _load_token(x, row_stride, mask_c, grid, node, 4),
        _load_token(x, row_stride, mask_c, grid, node, 5),
        _load_token(x, row_stride, mask_c, grid, node, 6),
        _load_token(x, row_stride, mask_c, grid, node, 7),
    )


@triton.jit
def _load_token(x, row_stride, mask_c, grid, node, INDEX: tl.constexpr):
    token, known = _token(grid, node, INDEX)
    mask = known[:, None] & mask_c[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * row_stride, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _token(grid, node, INDEX: tl.constexpr):
    """Return the place of one of the 8 tokens of each node, and which of them there are."""
    f = node[0] * 2 + INDEX // 4
    h = node[1] * 2 + INDEX // 2 % 2
    w = node[2] * 2 + INDEX % 2
    known = (f < grid[0]) & (h < grid[1]) & (w < grid[2])
    return (f * grid[1] + h) * grid[2] + w, known


@triton.jit
def _load(x, row_stride, mask_c, box, node):
    """Load the coefficients of the nodes in a box, [nodes, BLOCK_C] fp32."""
    place, known = _coefficient(box, node)
    mask = known[:, None] & mask_c[None, :]
    return tl.load(x + place.to(tl.int64)[:, None] * row_stride, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _store(out, row_stride, mask_c, tile, box, node):
    """Store the same."""
    place, known = _coefficient(box, node)
    tl.store(
        out + place.to(tl.int64)[:, None] * row_stride,
        tile.to(out.dtype.element_ty),
        mask=known[:, None] & mask_c[None, :],
    )


@triton.jit
def _coefficient(box, node):
    """Return the place of each node's coefficient in a box, and which of them there are."""
    begin, frames, height, width = box
    known = (node[0] < frames) & (node[1] < height) & (node[2] < width)
    return begin + (node[0] * height + node[1]) * width + node[2], known


@triton.jit
def _boxes(grid):
    """Return where the 8 boxes of a level begin, and their sizes: sums, then differences."""
    # An odd length has one sum more than differences.
    f0, f1 = (grid[0] + 1) // 2, grid[0] // 2
    h0, h1 = (grid[1] + 1) // 2, grid[1] // 2
    w0, w1 = (grid[2] + 1) // 2, grid[2] // 2
    b1 = f0 * h0 * w0
    b2 = b1 + f0 * h0 * w1
    b3 = b2 + f0 * h1 * w0
    b4 = b3 + f0 * h1 * w1
    b5 = b4 + f1 * h0 * w0
    b6 = b5 + f1 * h0 * w1
    b7 = b6 + f1 * h1 * w0
    return (
        (0, f0, h0, w0),
        (b1, f0, h0, w1),
        (b2, f0, h1, w0),
        (b3, f0, h1, w1),
        (b4, f1, h0, w0),
        (b5, f1, h0, w1),
        (b6, f1, h1, w0),
        (b7, f1, h1, w1),
    )


@triton.jit
def _parted(sums, COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Hand [8 COUNT, BLOCK_C] sums of a level out as the 8 children of COUNT nodes of the next."""
    x = tl.permute(tl.reshape(sums, [COUNT, 2, 2, 2, BLOCK_C]), (0, 4, 1, 2, 3))
    w0, w1 = tl.split(x)
    h0w0, h1w0 = tl.split(w0)
    h0w1, h1w1 = tl.split(w1)
    a0, a4 = tl.split(h0w0)
    a1, a5 = tl.split(h0w1)
    a2, a6 = tl.split(h1w0)
    a3, a7 = tl.split(h1w1)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _joined(children, COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Undo `_parted`."""
    h0w0, h0w1 = tl.join(children[0], children[4]), tl.join(children[1], children[5])
    h1w0, h1w1 = tl.join(children[2], children[6]), tl.join(children[3], children[7])
    x = tl.join(tl.join(h0w0, h1w0), tl.join(h0w1, h1w1))
    return tl.reshape(tl.permute(x, (0, 2, 3, 4, 1)), [8 * COUNT, BLOCK_C])
