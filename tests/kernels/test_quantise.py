"""Queries and keys in 8 bits: how they are rounded, and what attention makes of them."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tiny.selections import case, element_mask, offsets, to
from vidaccel.kernels import reference
from vidaccel.kernels.block_sparse_attention import block_sparse_attention
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.quantise import quantise_keys

INT8 = {"int8_qk": True}


def shifted(k):
    """Keys with a large offset in a few channels that all of them share, as trained models have."""
    k = k.clone()
    k[..., 3] += 20.0
    k[..., 17] -= 12.0
    return k


def test_rows_are_rounded_to_the_nearest_and_halves_up():
    row = torch.tensor([[127.0, 2.5, -2.5, -126.6, 0.49], [0.0] * 5, [1e-38] * 5, [2.0] * 5])
    whole, scale = reference.to_int8(row)
    assert whole[0].tolist() == [127, 3, -2, -127, 0] and scale[0] == 1.0
    assert not whole[1:3].any() and not scale[1].any()
    assert whole[3].tolist() == [127] * 5
    torch.testing.assert_close(whole[3] * scale[3], row[3])
    x = torch.randn(500, 64).double() * torch.rand(500, 1).double() * 100
    whole, scale = reference.to_int8(x)
    assert ((whole * scale - x).abs() <= scale / 2 * (1 + 1e-9)).all()
    for wrong in (math.nan, math.inf, -math.inf):
        x[7, 5] = wrong
        whole, scale = reference.to_int8(x)
        assert scale[7].isnan() and not scale[8].isnan() and whole.isfinite().all()


def test_the_shift_is_near_the_mean_and_sees_no_padding():
    k = torch.randn(2, 3, 1000, 16).double() + 5 * torch.randn(16).double()
    ends = torch.tensor([0, 300, 300, 900, 1000]).int().expand(2, 3, 5)
    shift = reference.key_shift(k, ends)
    assert shift.shape == (2, 3, 16) and shift.dtype == torch.float64
    assert (shift - k.mean(2)).abs().max() < 0.6  # of a standard deviation of 1
    seen = reference.key_shift(k, ends, 3)
    k[:, :, 900:] = math.nan
    assert torch.equal(reference.key_shift(k, ends, 3), seen)
    k[:, :, 0, 2] = math.inf
    found = reference.key_shift(k, ends, 3)
    torch.testing.assert_close(found, seen, rtol=0, atol=1.0)
    nothing = torch.zeros(2, 3, 2).int()
    assert not reference.key_shift(k, nothing).any()
    one = reference.key_shift(k[:, :, 5:6], torch.tensor([0, 1]).int().expand(2, 3, 2))
    torch.testing.assert_close(one, k[:, :, 5].bfloat16().double())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_rounds_like_the_reference(head_dim, dtype, device):
    torch.manual_seed(0)
    k = torch.randn(2, 2, 75, head_dim).to(dtype)
    k[0, 1, 9, 4] = math.inf
    k[1, 0, 70, 1] = math.nan
    k[1, 1, 3] = 0.0
    ends = torch.tensor([0, 20, 20, 64, 75]).int().expand(2, 2, 5).contiguous()
    keys = quantise_keys(k.to(device), ends.to(device), 3)
    # In 16 bits the sum is exact. In 32 it may, very rarely, be rounded to a neighbour.
    close = 2**-7 if dtype == torch.float32 else 0
    torch.testing.assert_close(
        keys.shift.cpu(), reference.key_shift(k, ends, 3), rtol=close, atol=0
    )
    whole, scale = reference.to_int8(k.float() - keys.shift.cpu()[:, :, None])
    assert torch.equal(keys.scale.cpu().isnan(), scale[..., 0].isnan())
    assert keys.scale.isnan().sum() == 2
    sound = ~scale[..., 0].isnan()
    assert torch.equal(keys.codes.cpu()[sound].float(), whole[sound])
    assert torch.equal(keys.scale.cpu()[sound], scale[..., 0][sound])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_equals_the_reference(head_dim, dtype, device):
    arguments, mask = case(head_dim, dtype)
    q, k, v, q_ends, k_ends, selection = arguments
    k = shifted(k)
    arguments = (q, k, v, q_ends, k_ends, selection)
    wide = (q.float(), k.float(), v.float(), q_ends, k_ends, selection)
    exact, exact_lse = reference.block_sparse_attention(*wide, scale=head_dim**-0.5, **INT8)
    found = block_sparse_attention(
        *to(arguments, device), scale=head_dim**-0.5, impl="triton", **INT8
    )
    again = block_sparse_attention(
        *to(arguments, device), scale=head_dim**-0.5, impl="triton", **INT8
    )
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    out, lse = (x.cpu() for x in found)
    assert out.dtype == dtype and lse.dtype == torch.float32
    dense = scaled_dot_product_attention(q, k, v, attn_mask=element_mask(q_ends, k_ends, mask))
    full = scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=element_mask(q_ends, k_ends, mask)
    )
    own = (dense.double() - full).nan_to_num(0.0).abs().max().item()
    assert (out.float() - exact).abs().max() <= 2 * own + 1e-5
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_it_is_near_exact_attention_and_so_is_lse(impl, device):
    (q, k, v, q_ends, k_ends, selection), _ = case(64, q_sizes=(0, 5, 1, 20))
    k = shifted(k)
    arguments = (q, k, v, q_ends, k_ends, selection)
    exact, exact_lse = reference.block_sparse_attention(*arguments, scale=0.125)
    order = torch.stack([torch.randperm(26), torch.randperm(26)])[:, None].int()
    mixed = to((reference.unpermute(q, order), *arguments[1:]), device)
    out, lse = block_sparse_attention(
        *mixed, scale=0.125, q_order=order.to(device), impl=impl, **INT8
    )
    out = reference.permute(out.cpu(), order)
    error = (out - exact).norm() / exact.norm()
    assert 1e-5 < error < 1e-2
    lse = reference.permute(lse.cpu()[..., None], order)[..., 0]
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=0.03)


def test_scores_of_shifted_keys_are_as_exact_as_of_others():
    """Without the shift, a channel that all keys share takes the levels of the others."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 300, 64), torch.randn(1, 1, 500, 64)
    ends = torch.tensor([[[0, 500]]]).int()

    def error(k, shift):
        exact = (q @ k.transpose(-1, -2)).softmax(-1)
        sides = (reference.to_int8(x) for x in (q, k - shift[:, :, None]))
        rounded = [whole * scale for whole, scale in sides]
        return ((rounded[0] @ rounded[1].transpose(-1, -2)).softmax(-1) - exact).abs().mean()

    common = shifted(k)
    plain = error(k, reference.key_shift(k, ends))
    assert error(common, reference.key_shift(common, ends)) < 1.1 * plain
    assert error(common, torch.zeros(1, 1, 64)) > 3 * plain


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compensation_merges_with_the_true_means(impl, device):
    """One vector per cluster, half of the clusters left out: the result is dense all the same."""
    (q, k, v, q_ends, k_ends, selection), _ = case(batch=1)
    label = torch.repeat_interleave(torch.arange(7), k_ends[0, 0].diff())
    means_k, means_v = shifted(torch.randn(1, 1, 7, 64)), torch.randn(1, 1, 7, 64)
    k, v = means_k[:, :, label], means_v[:, :, label]
    exact = scaled_dot_product_attention(q, k, v)
    exact_lse = (q @ k.transpose(-1, -2) * 0.125).logsumexp(-1)
    means = {"k_means": means_k.to(device), "v_means": means_v.to(device)}
    arguments = to((q, k, v, q_ends, k_ends, selection), device)
    out, lse = block_sparse_attention(*arguments, scale=0.125, **means, **INT8, impl=impl)
    assert (out.cpu() - exact).norm() / exact.norm() < 1e-2
    torch.testing.assert_close(lse.cpu(), exact_lse, rtol=0, atol=0.03)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_not_finite_shows_where_it_is_seen(impl, wrong, device):
    arguments, mask = case(batch=1)
    q, k, v, q_ends, k_ends, _ = arguments
    q[0, 0, 9, 3] = wrong
    k[0, 0, k_ends[0, 0, 5], 7] = wrong
    mask[0, 0, :, 5] = torch.tensor([True, False, True, False])
    mask[0, 0, 1, 4] = True  # so that the query sees something
    selection = reference.selection_from_mask(mask, k_ends.diff())
    arguments = (q, k, v, q_ends, k_ends, selection)
    rows = torch.repeat_interleave(torch.arange(4), q_ends[0, 0].diff())
    expected = (rows == 0) | (rows == 2) | (torch.arange(26) == 9)
    if not mask[0, 0, rows[9]].any():
        expected[9] = False
    out, lse = block_sparse_attention(*to(arguments, device), scale=0.125, impl=impl, **INT8)
    assert torch.equal(out.isnan().any(-1)[0, 0].cpu(), expected)
    assert torch.equal(lse.isnan()[0, 0].cpu(), expected)


def test_rows_of_zeros_and_one_key(device):
    q, k, v = torch.zeros(1, 1, 5, 64), torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    ends = offsets([1], batch=1)
    q_ends = offsets([5], batch=1)
    selection = reference.selection_from_mask(torch.ones(1, 1, 1, 1).bool(), ends.diff())
    for queries in (q, q + 1):
        arguments = to((queries, k, v, q_ends, ends, selection), device)
        out, lse = block_sparse_attention(*arguments, scale=0.125, impl="triton", **INT8)
        torch.testing.assert_close(out.cpu(), v.expand_as(out))
        expected = (queries @ k.transpose(-1, -2))[..., 0] * 0.125
        torch.testing.assert_close(lse.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("clusters", [0, 8])
def test_clusters_that_are_not_there_are_refused(impl, clusters):
    arguments, _ = case()
    with pytest.raises(KernelError, match=f"from 1 to 7, found {clusters}"):
        block_sparse_attention(*arguments, scale=1.0, impl=impl, shift_clusters=clusters, **INT8)
