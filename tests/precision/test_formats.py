"""Formats against a quantiser that looks every number up, in float64."""

import math

import numpy as np
import pytest
import torch

from vidaccel.precision.formats import (
    FORMATS,
    Format,
    Quantised,
    dequantise,
    quantise,
    rounded,
    scales_of,
    tensor_scale_of,
)

E4M3 = sorted(
    {m / 8 * 2.0**-6 for m in range(8)}
    | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if not (e == 8 and m == 7)}
)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def codes_of(form: Format) -> np.ndarray:
    """Every number that a code may be, in order, with the parity of its last bit."""
    if not form.floating:
        return np.arange(-form.largest, form.largest + 1)
    own = E2M1 if form.bits == 4 else E4M3
    return np.array([-value for value in own[:0:-1]] + own)


def nearest(value: float, grid: np.ndarray) -> float:
    """The nearest of the grid; of two that are as near, the one of even position from zero."""
    distances = np.abs(grid - value)
    best = np.flatnonzero(distances == distances.min())
    zero = int(np.flatnonzero(grid == 0)[0])
    return float(next((grid[i] for i in best if (i - zero) % 2 == 0), grid[best[0]]))


def by_lookup(x: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows, a number at a time."""
    size = form.block or x.shape[1]
    blocks = x.reshape(len(x), -1, size)
    ratios = np.abs(blocks).max(-1) / form.largest
    scales = np.empty_like(ratios)
    whole = ratios.max() / 448
    for place, ratio in np.ndenumerate(ratios):
        if form.scale == "ue8m0":
            scales[place] = 2.0 ** math.ceil(math.log2(ratio)) if ratio else 1.0
        elif form.scale == "e4m3":
            scales[place] = max(nearest(ratio / whole, np.array([0.0, *E4M3[1:]])), 2**-9) * whole
        else:
            scales[place] = ratio or 1.0
    grid = codes_of(form)
    codes = np.array(
        [
            nearest(float(np.clip(value / scales[r, b], grid[0], grid[-1])), grid)
            for (r, b, _), value in np.ndenumerate(blocks)
        ]
    )
    return codes.reshape(x.shape), scales


def numbers(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many sizes, with a row of zeros and an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    x *= torch.exp2(4 * torch.randn(rows, 1, generator=generator))
    x[0] = 0.0
    x[1, 3] = 200.0
    return x


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_are_those_of_a_lookup(name: str):
    form, x = FORMATS[name], numbers(6, 64)
    codes, scales = quantise(x, form)
    expected_codes, expected_scales = by_lookup(x.double().numpy(), form)
    assert scales.shape == (6, 64 // (form.block or 64))
    np.testing.assert_allclose(scales.double().numpy(), expected_scales, rtol=1e-6)
    np.testing.assert_array_equal(codes.float().numpy(), expected_codes)
    assert codes.dtype == (torch.float8_e4m3fn if form.floating else torch.int8)


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_number_of_a_block_is_kept_as_well_as_its_scale(name: str):
    form, x = FORMATS[name], numbers(6, 64, seed=1)
    lost = (rounded(x, form) - x).abs().view(6, -1, form.block or 64).amax(-1)
    # No entry is further off than a whole step of the integers, or half of the largest of E2M1,
    # and what rounding a scale to E4M3 clips.
    step = scales_of(x, form) * (1.0 if not form.floating else form.largest / 6)
    clipped = 0.07 * x.abs().view(6, -1, form.block or 64).amax(-1)
    assert (lost <= step + clipped).all()


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_twice_is_rounding_once(name: str):
    form = FORMATS[name]
    once = quantise(numbers(4, 32, seed=2), form)
    again = quantise(dequantise(once), form, scales=once.scales)
    assert torch.equal(again.codes.float(), once.codes.float())


def test_a_power_of_two_is_its_own_scale():
    form = FORMATS["mxint8"]
    x = torch.zeros(1, 32)
    x[0, 0] = 127 * 2.0**-3
    assert scales_of(x, form).item() == 2.0**-3
    x[0, 0] = float(np.nextafter(np.float32(127 * 2.0**-3), np.float32(np.inf)))
    assert scales_of(x, form).item() == 2.0**-2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_again(name: str, value: float):
    x = torch.ones(2, 64)
    x[1, 5] = value
    assert not rounded(x, FORMATS[name])[1, 5].isfinite()


def test_the_scale_of_a_tensor_makes_the_largest_scale_448():
    form, x = FORMATS["nvint4"], numbers(6, 64)
    whole = tensor_scale_of(x, form)
    assert whole is not None
    assert torch.isclose(scales_of(x, form).max() / whole, torch.tensor(448.0))
    assert tensor_scale_of(x, FORMATS["int8"]) is None


def test_codes_and_scales_are_multiplied():
    held = Quantised(torch.tensor([[1, -2, 3, 4]], dtype=torch.int8), torch.tensor([[2.0, 10.0]]))
    assert dequantise(held).tolist() == [[2.0, -4.0, 30.0, 40.0]]


def test_bits_count_the_scales():
    found = {name: FORMATS[name].bits_with_scale for name in ("int8", "mxint8", "nvint4")}
    assert found == {"int8": 8, "mxint8": 8.25, "nvint4": 4.5}
