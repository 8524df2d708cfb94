"""Rotations: orthogonal or exactly undone, and good for what they are made for."""

import pytest
import torch

from vidaccel.errors import PrecisionError
from vidaccel.precision.formats import FORMATS, rounded
from vidaccel.precision.rotations import (
    RotationPair,
    dart,
    group_for,
    hadamard,
    on_all_channels,
    pair_of,
    rotated,
    whip,
    wush,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_a_regular_hadamard_matrix_is_orthogonal_and_of_one_row_sum(size: int):
    matrix = hadamard(size, torch.float64)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    # Sylvester's has one row of ones, and a constant piles up there.
    assert torch.allclose(matrix.sum(1), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 8, 32, 100])
def test_other_sizes_have_no_regular_hadamard_matrix(size: int):
    if size == 1:
        assert hadamard(1).tolist() == [[1.0]]
        return
    with pytest.raises(PrecisionError, match="has 4, 16, 64, 256"):
        hadamard(size)


def test_a_group_is_the_largest_that_divides_the_channels():
    found = [group_for(channels, 256) for channels in (5120, 448, 48, 36, 6)]
    assert found == [256, 64, 16, 4, None]
    assert group_for(5120, 16) == 16


def test_groups_are_rotated_alone_by_one_matrix_or_one_each():
    x, one, each = randn(2, 3, 32), randn(16, 16, seed=1), randn(2, 16, 16, seed=2)
    assert torch.allclose(rotated(x, one), x @ torch.block_diag(one, one).mT, atol=1e-5)
    assert torch.allclose(rotated(x, each), x @ torch.block_diag(*each).mT, atol=1e-5)
    for matrix in (one, each):
        assert torch.allclose(rotated(x, matrix), x @ on_all_channels(matrix, 32).mT, atol=1e-5)


def test_weights_undo_what_activations_are_multiplied_by_in_half_precision_too():
    x, weight = randn(5, 32), randn(7, 32, seed=1)
    forward, inverse = pair_of(randn(2, 16, 16, seed=2).double())
    exact = rotated(x, forward) @ rotated(weight, inverse).mT
    assert torch.allclose(exact, x @ weight.mT, rtol=1e-3, atol=1e-3)
    assert torch.equal(forward, forward.bfloat16().float())


def outliers() -> torch.Tensor:
    """Rows of 64 channels, some of them large."""
    x = randn(2048, 64)
    x[:, [3, 17]] *= 25
    return x


def test_a_learned_rotation_is_orthogonal_and_has_less_whip_loss_than_it_started_with():
    x = outliers()
    matrix = dart(x)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(64), atol=1e-5)
    scaled = x / x.square().mean().sqrt()
    start = dart(x, epochs=0)
    assert whip(scaled @ matrix.mT) < whip(scaled @ start.mT)
    assert torch.equal(dart(x), matrix)


def error(x: torch.Tensor, weight: torch.Tensor, pair: RotationPair | None, name: str) -> float:
    form, exact = FORMATS[name], x @ weight.mT
    if pair is not None:
        x, weight = rotated(x, pair.activations), rotated(weight, pair.weights)
    return float((rounded(x, form) @ rounded(weight, form).mT - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["int8", "mxint4", "nvint4"])
def test_rotations_help_against_outliers_and_wush_most(name: str):
    mixed = randn(64, 64, seed=3)
    x, weight = outliers() @ mixed / 8, randn(96, 64, seed=4)
    weight[:, 5] *= 20
    moment = (x.T @ x / len(x)).reshape(4, 16, 4, 16)
    blocks = torch.stack([moment[i, :, i] for i in range(4)])
    regular = hadamard(16)
    plain = error(x, weight, None, name)
    rotated_ = error(x, weight, RotationPair(regular, regular), name)
    balanced = error(x, weight, wush(blocks, weight, 16), name)
    assert balanced < rotated_
    assert balanced < plain


def test_wush_gives_both_sides_the_same_second_moment():
    x, weight = randn(4096, 16) * torch.linspace(0.1, 3, 16), randn(64, 16, seed=1)
    forward, inverse = wush((x.T @ x / len(x))[None], weight, 16, damping=0.0)
    a, w = rotated(x, forward), rotated(weight, inverse)
    assert torch.allclose(a.T @ a / len(a), w.T @ w / len(w), atol=0.02)


def test_wush_stands_channels_that_are_never_used_and_few_outputs():
    x = randn(256, 16)
    x[:, 4] = 0
    x[:, 5] = x[:, 6]
    moment, weight = (x.T @ x / 256)[None], randn(3, 16, seed=1)
    forward, inverse = wush(moment, weight, 16)
    assert forward.isfinite().all() and inverse.isfinite().all()
    exact = rotated(x, forward) @ rotated(weight, inverse).mT
    assert torch.allclose(exact, x @ weight.mT, atol=0.05)


def test_statistics_that_are_not_finite_are_refused():
    with pytest.raises(PrecisionError, match="not finite"):
        wush(torch.full((1, 16, 16), torch.nan), randn(4, 16), 16)
