"""Linear layers in low precision: rounding, products and the transform along tokens."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from vidaccel.bench import codegen
from vidaccel.kernels import product, reference
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.linear import (
    pack_int4,
    quantised_linear,
    rotate_quantise,
    token_haar,
    unpack_int4,
)

# qmax, block, scale_format: int8 and int4 by rows, mxint8, mxint4, nvint4, int4 in blocks of 64.
FORMATS = {
    "int8": (127, None, "float32"),
    "int4": (7, None, "float32"),
    "mxint8": (127, 32, "ue8m0"),
    "mxint4": (7, 32, "ue8m0"),
    "nvint4": (7, 16, "e4m3"),
    "int4-64": (7, 64, "float32"),
}
# All numbers of E4M3 that are over 0, from its definition: 4 bits of exponent, 3 of mantissa.
E4M3 = [m * 2.0**-9 for m in range(1, 8)]
E4M3 += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]


def options_of(name, x):
    """The arguments of `rotate_quantise` for a format."""
    qmax, block, scale_format = FORMATS[name]
    options = {"qmax": qmax, "block": block, "scale_format": scale_format}
    if scale_format == "e4m3":
        finite = torch.where(x.isfinite(), x, 0.0).abs().max().float()
        options["tensor_scale"] = finite / qmax / 448
    return options


def spread(scales, channels):
    return scales.repeat_interleave(channels // scales.shape[-1], -1)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_a_quantiser_written_number_by_number(name):
    torch.manual_seed(0)
    x = torch.randn(3, 64, dtype=torch.float64) * torch.logspace(-3, 3, 64, dtype=torch.float64)
    options = options_of(name, x)
    codes, scales = rotate_quantise(x, **options)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float64
    qmax, block, scale_format = FORMATS[name]
    block = block or 64
    for row, first in itertools.product(range(3), range(0, 64, block)):
        numbers = [float(v) for v in x[row, first : first + block]]
        scale = max(abs(v) for v in numbers) / qmax
        if scale_format == "ue8m0":
            power = -200
            while 2.0**power < scale:
                power += 1
            scale = 2.0**power
        elif scale_format == "e4m3":
            unit = float(options["tensor_scale"])
            scale = min(E4M3, key=lambda v: abs(v - scale / unit)) * unit
        found = scales[row, first // block]
        assert found == pytest.approx(scale, rel=1e-12)
        # Of two whole numbers as near as each other, `round` takes the even one too.
        wanted = [max(-qmax, min(qmax, round(v / scale))) for v in numbers]
        assert codes[row, first : first + block].tolist() == wanted


def test_halves_go_to_even_and_the_largest_is_not_clipped():
    row = torch.tensor([[127.0, 2.5, -2.5, 3.5, -126.5, 0.5] + [0.0] * 10])
    codes, scales = rotate_quantise(row)
    assert codes[0, :6].tolist() == [127, 2, -2, 4, -126, 0] and scales.item() == 1.0
    codes, scales = rotate_quantise(row, block=2, scale_format="ue8m0")
    assert scales[0].tolist()[:3] == [1.0, 2.0**-5, 1.0]
    assert codes.abs().max() == 127 and int(rotate_quantise(row, qmax=7)[0].abs().max()) == 7


@pytest.mark.parametrize("power", [-20, 0, 20])
def test_a_power_of_two_is_exact_and_the_next_number_takes_the_next(power):
    exact = torch.full((1, 16), 127 * 2.0**power)
    assert rotate_quantise(exact, scale_format="ue8m0")[1].item() == 2.0**power
    more = torch.nextafter(exact * 1.000001, exact * 2)
    assert rotate_quantise(more, scale_format="ue8m0")[1].item() == 2.0 ** (power + 1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", ["int8", "mxint4", "nvint4"])
def test_zeros_and_what_is_not_finite(name, impl, device):
    x = torch.randn(6, 96)
    x[0] = 0.0
    x[1, :64] = 1e-38
    x[2, 5], x[3, 40], x[4, 95] = math.nan, math.inf, -math.inf
    options = options_of(name, x)
    if "tensor_scale" in options:
        options["tensor_scale"] = options["tensor_scale"].to(device)
    codes, scales = (y.cpu() for y in rotate_quantise(x.to(device), impl=impl, **options))
    wide = spread(scales, 96)
    assert not codes[0].any() and scales[0].isfinite().all() and (scales[0] > 0).all()
    block = FORMATS[name][1] or 96
    wrong = torch.zeros(6, 96, dtype=torch.bool)
    for row, column in ((2, 5), (3, 40), (4, 95)):
        wrong[row, column // block * block : (column // block + 1) * block] = True
    assert torch.equal(wide.isnan(), wrong) and not codes[wrong].any()
    near = (codes * wide - x)[~wrong].abs()
    assert (near <= 0.51 * wide[~wrong] * (1.1 if name == "nvint4" else 1)).all()
    weight, weight_scales = rotate_quantise(torch.randn(5, 96))
    tensors = (codes, scales, weight, weight_scales)
    out = quantised_linear(
        *(y.to(device) for y in tensors),
        block=FORMATS[name][1],
        out_dtype=torch.float32,
        impl=impl,
    ).cpu()
    assert torch.equal(out.isnan().all(1), wrong.any(1)) and torch.equal(
        out.isnan().any(1), wrong.any(1)
    )


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("unit", [0.0, -1.0, math.nan])
def test_a_tensor_scale_that_is_none_makes_nan(unit, impl, device):
    options = {"qmax": 7, "block": 16, "scale_format": "e4m3", "impl": impl}
    x = torch.randn(2, 32, device=device)
    codes, scales = rotate_quantise(x, tensor_scale=torch.tensor(unit, device=device), **options)
    assert scales.isnan().all() and not codes.any()
    # A scale that is too small for the tensor clips, one that is too large leaves few levels.
    small = rotate_quantise(x, tensor_scale=torch.tensor(1e-6, device=device), **options)
    assert (small[1] == 448 * torch.tensor(1e-6)).all() and small[0].abs().max() == 7
    large = rotate_quantise(x, tensor_scale=torch.tensor(1e6, device=device), **options)
    assert (large[1] == 2.0**-9 * 1e6).all() and not large[0].any()


def rotations(kind, channels):
    """A rotation of all groups of 32, or one for each."""
    if kind == "none":
        return None
    torch.manual_seed(1)
    count = 1 if kind == "shared" else channels // 32
    turned = torch.linalg.qr(torch.randn(count, 32, 32)).Q
    return turned[0] if kind == "shared" else turned


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((name, kind, torch.bfloat16) for name in FORMATS for kind in ("none", "shared", "each")),
        ("int8", "shared", torch.float16),
        ("int8", "shared", torch.float32),
        ("nvint4", "each", torch.float32),
    ],
)
def test_the_kernel_rounds_like_the_reference(name, kind, dtype, device):
    torch.manual_seed(0)
    # 13 rows fill no tile of rows, and 192 channels no tile of those.
    x = (torch.randn(13, 192) * torch.rand(13, 1) * 9).to(dtype)
    options = options_of(name, x) | {"rotation": rotations(kind, 192)}
    if name in ("int4", "nvint4"):
        options["high"] = torch.rand(13) < 0.4
    wanted = reference.rotate_quantise(x, **options)
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    codes, scales = (y.cpu() for y in rotate_quantise(x.to(device)[None], impl="triton", **given))
    assert codes.shape == (1, 13, 192) and scales.shape == (1, *wanted[1].shape)
    # Sums have another order, which may take a number next to a half to the other side, and a
    # scale of E4M3 to the other neighbour.
    same = (scales[0] - wanted[1]).abs() <= 1e-5 * wanted[1]
    assert same.float().mean() >= (0.98 if kind != "none" else 1)
    differ = (codes[0] - wanted[0]).abs()[spread(same, 192)]
    assert differ.max() <= 1 and (differ > 0).float().mean() <= (2e-3 if kind != "none" else 0)
    if "high" in options:
        tops = codes[0].abs().amax(1)
        assert (tops[options["high"]] > 7).all() and (tops[~options["high"]] <= 7).all()


@pytest.mark.parametrize("group", [16, 64, 128, 256])
def test_groups_of_every_size(group, device):
    torch.manual_seed(0)
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    turn = torch.linalg.qr(torch.randn(group, group)).Q
    wanted, scales = reference.rotate_quantise(x, rotation=turn)
    found = rotate_quantise(x.to(device), rotation=turn.to(device), impl="triton")
    assert (found[0].cpu() - wanted).abs().max() <= 1
    torch.testing.assert_close(found[1].cpu(), scales, rtol=1e-5, atol=0)


def test_rotated_activations_and_weights_have_the_same_product():
    torch.manual_seed(0)
    x, w = torch.randn(7, 128).double(), torch.randn(9, 128).double()
    turn = torch.linalg.qr(torch.randn(4, 32, 32).double()).Q
    left, right = rotate_quantise(x, rotation=turn), rotate_quantise(w, rotation=turn)
    out = quantised_linear(left[0], left[1], right[0], right[1], out_dtype=torch.float64)
    assert (out - x @ w.T).norm() / (x @ w.T).norm() < 0.02
    by_hand = torch.cat([x[:, i : i + 32] @ turn[i // 32].T for i in range(0, 128, 32)], 1)
    torch.testing.assert_close(left[0] * left[1], by_hand, rtol=0, atol=left[1].max() * 0.51)


CASES = {
    "int8": (127, None, False, "float32"),
    "int4": (7, None, True, "float32"),
    "mxint8": (127, 32, False, "ue8m0"),
    "mxint4": (7, 32, True, "ue8m0"),
    "nvint4": (7, 16, True, "ue8m0"),
    "int4-64": (7, 64, True, "float32"),
    "int4-128": (7, 128, False, "float32"),
    "int4-256": (7, 256, True, "float32"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "chip"),
    [
        *((name, torch.bfloat16, chip) for name in CASES for chip in (80, 90)),
        ("int8", torch.float16, 90),
        ("mxint8", torch.float16, 90),
        ("mxint8", torch.float32, 90),
        ("nvint4", torch.float32, 80),
    ],
)
def test_products_equal_the_reference(name, dtype, chip, device, monkeypatch):
    """The ways of both kinds of chip, of sizes that fill no tile."""
    qmax, block, packed, scale_format = CASES[name]
    if device.type == "cpu":
        monkeypatch.setattr(product, "chip", lambda device: chip)
    torch.manual_seed(0)
    channels = 160 if block in (None, 16, 32) else 2 * block
    left = rotate_quantise(torch.randn(2, 37, channels), block=block, scale_format=scale_format)
    weight, weight_scales = rotate_quantise(
        torch.randn(29, channels), qmax=qmax, block=block, scale_format=scale_format
    )
    weight = pack_int4(weight) if packed else weight
    bias = torch.randn(29).to(dtype) if name != "mxint4" else None
    options = {"block": block, "packed": packed}
    exact = reference.quantised_linear(
        left[0],
        left[1].double(),
        weight,
        weight_scales.double(),
        bias,
        out_dtype=torch.float64,
        **options,
    )
    tensors = [None if y is None else y.to(device) for y in (*left, weight, weight_scales, bias)]
    out = quantised_linear(*tensors, out_dtype=dtype, impl="triton", **options).cpu()
    assert out.dtype == dtype and out.shape == (2, 37, 29)
    error = (out.double() - exact).norm() / exact.norm()
    step = torch.finfo(dtype).eps
    # In 16 bits scales that are no powers of two are rounded to bfloat16.
    assert error < (step if scale_format == "ue8m0" or product_in_int8(name, chip) else 5e-3)


@pytest.mark.parametrize("name", ["mxint8", "nvint4", "mxint4"])
def test_many_rows_are_multiplied_by_the_library(name, device, monkeypatch):
    """Some rows at a time, of sizes that fill no tile; beside the same rows in the kernel."""
    if device.type == "cpu":
        monkeypatch.setattr(product, "chip", lambda device: 90)
    monkeypatch.setattr(product, "_ROWS_AT_ONCE", 32)
    qmax, block, packed, scale_format = CASES[name]
    torch.manual_seed(0)
    left = rotate_quantise(torch.randn(2, 37, 288), block=block, scale_format=scale_format)
    weight, weight_scales = rotate_quantise(
        torch.randn(29, 288), qmax=qmax, block=block, scale_format=scale_format
    )
    weight = pack_int4(weight) if packed else weight
    bias = torch.randn(29) if name == "nvint4" else None
    tensors = [None if y is None else y.to(device) for y in (*left, weight, weight_scales, bias)]
    options = {"block": block, "packed": packed, "out_dtype": torch.bfloat16, "impl": "triton"}
    inside = quantised_linear(*tensors, **options)
    monkeypatch.setattr(product, "LEAST_LIBRARY_ROWS", 74)
    monkeypatch.delattr(product, "_product")
    out = quantised_linear(*tensors, **options)
    assert out.shape == (2, 37, 29)
    assert (out.double() - inside.double()).norm() / inside.double().norm() < 4e-3


def product_in_int8(name, chip):
    config = product.product_config(CASES[name][1], CASES[name][2], torch.bfloat16, chip)
    return config["INTEGERS"]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_scales_of_rows_beside_scales_of_blocks(impl, device):
    torch.manual_seed(0)
    codes, scales = rotate_quantise(torch.randn(5, 64), block=32)
    weight, weight_scales = rotate_quantise(torch.randn(3, 64))
    exact = (codes * spread(scales, 64)) @ (weight * weight_scales).T
    tensors = [y.to(device) for y in (codes, scales, weight, weight_scales)]
    out = quantised_linear(*tensors, block=32, out_dtype=torch.float32, impl=impl)
    torch.testing.assert_close(out.cpu(), exact, rtol=1e-5, atol=1e-5)
    tensors = [y.to(device) for y in (weight, weight_scales, codes, scales)]
    out = quantised_linear(*tensors, block=32, out_dtype=torch.float32, impl=impl)
    torch.testing.assert_close(out.cpu(), exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_rows_are_no_work(impl, device):
    x = torch.randn(2, 0, 64, device=device)
    codes, scales = rotate_quantise(x, block=16, impl=impl)
    assert codes.shape == (2, 0, 64) and scales.shape == (2, 0, 4)
    weight, weight_scales = rotate_quantise(torch.randn(3, 64, device=device), block=16)
    out = quantised_linear(
        codes, scales, weight, weight_scales, block=16, out_dtype=torch.float16, impl=impl
    )
    assert out.shape == (2, 0, 3) and out.dtype == torch.float16


def test_rows_that_are_not_side_by_side(device):
    torch.manual_seed(0)
    x = torch.randn(3, 9, 64)
    for view in (x[:, 2:], x.transpose(0, 1), x[..., ::2]):
        wanted = reference.rotate_quantise(view)
        found = rotate_quantise(view.to(device), impl="triton")
        assert torch.equal(found[0].cpu(), wanted[0])


def test_codes_of_4_bits_are_packed_and_unpacked():
    every = torch.arange(-8, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(every, every)
    packed = pack_int4(codes)
    assert packed.shape == (256, 1) and packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), codes)
    assert pack_int4(torch.tensor([[1, -2]], dtype=torch.int8)).item() == 0xE1
    with pytest.raises(KernelError, match="from -8 to 7, found -9 to 3"):
        pack_int4(torch.tensor([[3, -9]], dtype=torch.int8))
    with pytest.raises(KernelError, match="even K"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(KernelError, match="uint8"):
        unpack_int4(codes)


GRIDS = [(1, 1, 1), (2, 2, 2), (5, 8, 8), (3, 5, 7), (1, 1, 9), (21, 6, 10)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_the_transform_keeps_norms_and_is_undone(grid, levels):
    torch.manual_seed(0)
    x = torch.randn(2, math.prod(grid), 3).double()
    mixed = token_haar(x, grid, levels=levels)
    torch.testing.assert_close(mixed.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(token_haar(mixed, grid, levels=levels, inverse=True), x)
    assert torch.equal(token_haar(x[1], grid, levels=levels), mixed[1])


def test_the_first_coefficients_are_the_coarsest():
    x = torch.ones(4 * 8 * 8, 2)
    mixed = token_haar(x, (4, 8, 8))
    # 4 x 8 x 8 equal tokens: 1 x 1 x 1 sums, where the carried frame counts less.
    torch.testing.assert_close(mixed[0], torch.full((2,), 16.0))
    assert mixed[1:].abs().max() < 1e-5
    one = token_haar(torch.arange(8.0)[:, None], (2, 2, 2), levels=1)[:, 0]
    # From 000 to 111: the sum, then differences along width, height, and frames.
    root = math.sqrt(8)
    expected = torch.tensor([28, -4, -8, 0, -16, 0, 0, 0]) / root
    torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_kernel_transforms_like_the_reference(levels, inverse, device):
    torch.manual_seed(0)
    # A cube of 8 x 8 x 8 that is not full, and one that begins behind it, along frames.
    grid = (9, 5, 3)
    x = torch.randn(140, 20).bfloat16()[5:, ::2]
    exact = reference.token_haar(x.double(), grid, levels=levels, inverse=inverse)
    found = token_haar(x.to(device), grid, levels=levels, inverse=inverse, impl="triton").cpu()
    assert found.dtype == x.dtype and found.shape == x.shape
    # Beyond three levels the sums are rounded in between.
    assert (found - exact).abs().max() <= (2.0**-8 if levels < 4 else 2.0**-7) * exact.abs().max()


def wrong_calls():
    x, w = torch.randn(4, 64), torch.zeros(3, 64, dtype=torch.int8)
    codes, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1)
    kind = {"out_dtype": torch.float32}
    one = torch.ones(3, 1)
    turn = torch.eye(32)
    return [
        (rotate_quantise, (x.int(),), {}, "x must be floating-point"),
        (rotate_quantise, (x,), {"qmax": 128}, "from 1 to 127, found 128"),
        (rotate_quantise, (x,), {"block": 24}, "blocks of 24 channels do not divide 64"),
        (rotate_quantise, (x,), {"scale_format": "fp8"}, "float32, ue8m0, e4m3, found 'fp8'"),
        (rotate_quantise, (x,), {"scale_format": "e4m3"}, "tensor_scale belongs"),
        (rotate_quantise, (x,), {"tensor_scale": torch.ones(1)}, "tensor_scale belongs"),
        (rotate_quantise, (x,), {"rotation": torch.eye(24)}, "does not fit 64 channels"),
        (rotate_quantise, (x,), {"rotation": turn.expand(3, 32, 32)}, "does not fit 64"),
        (rotate_quantise, (x,), {"rotation": turn[:16]}, "must be .G, G. or"),
        (rotate_quantise, (x,), {"high": torch.ones(3).bool()}, "each of 4 rows"),
        (rotate_quantise, (x.clone().requires_grad_(),), {}, "requires a gradient"),
        (quantised_linear, (codes, scales, w[:, 1:], one), kind, "for 64 channels"),
        (quantised_linear, (codes, scales, w, one), kind | {"packed": True}, "uint8 .N, 32."),
        (quantised_linear, (codes, scales[:3], w, one), kind, "scales must be"),
        (quantised_linear, (codes, scales.half(), w, one), kind, "must be float32"),
        (quantised_linear, (codes, scales, w, one, one), kind, "bias must be"),
        (quantised_linear, (codes, scales, w, one), {"out_dtype": torch.int8}, "out_dtype"),
        (token_haar, (x, (2, 2, 2)), {}, "does not hold 4 tokens"),
        (token_haar, (x, (1, 2, 2)), {"levels": 0}, "levels must be 1 or more"),
        (token_haar, (x[0], (1, 2, 2)), {}, "batch, tokens, channels"),
    ]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bad_input_is_refused(impl):
    for function, arguments, options, message in wrong_calls():
        with pytest.raises(KernelError, match=message):
            function(*arguments, **options, impl=impl)


def test_the_kernels_say_what_they_do_not_take(device):
    x = torch.randn(2, 96, device=device)
    with pytest.raises(KernelError, match="a block of 16, 32, 64, 128, 256 channels, found 24"):
        rotate_quantise(x, block=24, impl="triton")
    with pytest.raises(KernelError, match=r"a rotation of .* found 8"):
        rotate_quantise(x, rotation=torch.eye(8, device=device), impl="triton")
    with pytest.raises(KernelError, match="float16, bfloat16 or float32"):
        rotate_quantise(x.double(), impl="triton")
    with pytest.raises(KernelError, match="float16, bfloat16 or float32"):
        token_haar(x.double(), (1, 1, 2), impl="triton")
    codes, scales = rotate_quantise(x, block=24)
    with pytest.raises(KernelError, match=r"a block of .* found 24"):
        quantised_linear(
            codes, scales, codes, scales, block=24, out_dtype=torch.float32, impl="triton"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "kernels", "unit"),
    [("90", "linear_int8 bf16", "IGMMA"), ("80", "linear_mxint8 bf16", "IMMA")],
)
def test_products_use_the_units_of_whole_numbers(chip, kernels, unit, tmp_path):
    """In a process of its own: here the kernels are interpreted."""
    out = tmp_path / "codegen.json"
    command = [sys.executable, "-m", "vidaccel", "bench", "codegen", "--chips", chip]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--kernels", kernels, "--json", str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert codegen.problems([row]) == [] and row["spills"] == row["stack_bytes"] == 0
    assert row["matrix_instructions"] == [unit]
    # The bytes of operands go to the tensor cores as they lie: nothing takes them apart.
    assert row["loop"]["tensor"] >= 8 and row["loop"].get("spill", 0) == 0
    other = codegen.problems([row | {"matrix_instructions": ["HGMMA"]}])
    assert f"has no {unit} instructions" in other[0]
