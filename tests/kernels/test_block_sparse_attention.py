"""Sparse attention: the reference against dense softmax and flex_attention, kernels against it."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tiny.selections import case, element_mask, offsets, to
from vidaccel.kernels import reference
from vidaccel.kernels.block_sparse_attention import block_sparse_attention
from vidaccel.kernels.common import KernelError


def test_the_reference_is_masked_attention():
    (q, k, v, q_ends, k_ends, selection), mask = case()
    assert torch.equal(selection.mask(), mask)
    arguments = (q.double(), k.double(), v.double(), q_ends, k_ends, selection)
    out, lse = reference.block_sparse_attention(*arguments, scale=0.2)
    seen = element_mask(q_ends, k_ends, mask)
    scores = (q.double() @ k.double().transpose(-1, -2) * 0.2).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1).nan_to_num(0.0) @ v.double())

    def hide(score, b, h, i, j):
        return torch.where(seen[b, 0, i, j], score, -torch.inf)

    some = seen.any(-1)
    flex = flex_attention(q, k, v, score_mod=hide, scale=0.2)
    torch.testing.assert_close(out.float()[some], flex[some], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_as_exact_as_dense_attention(head_dim, dtype, device):
    arguments, mask = case(head_dim, dtype)
    q, k, v, q_ends, k_ends, selection = arguments
    exact, exact_lse = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), q_ends, k_ends, selection, scale=head_dim**-0.5
    )
    out, lse = block_sparse_attention(*to(arguments, device), scale=head_dim**-0.5, impl="triton")
    assert out.dtype == dtype and lse.dtype == torch.float32
    seen = element_mask(q_ends, k_ends, mask)
    dense = scaled_dot_product_attention(q, k, v, attn_mask=seen).nan_to_num(0.0)
    limit = 2 * (dense.double() - exact).abs().max().item() + 1e-6
    assert (out.cpu().double() - exact).abs().max().item() <= limit
    torch.testing.assert_close(lse.cpu(), exact_lse.float(), rtol=1e-4, atol=1e-4)


def test_everything_selected_is_dense_attention(device):
    q, k, v = (torch.randn(1, 1, 50, 64).bfloat16() for _ in range(3))
    ends = offsets([20, 0, 17, 13], batch=1)
    selection = reference.selection_from_mask(torch.ones(1, 1, 4, 4).bool(), ends.diff())
    arguments = to((q, k, v, ends, ends, selection), device)
    out, _ = block_sparse_attention(*arguments, scale=0.125, impl="triton")
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    own = (scaled_dot_product_attention(q, k, v).double() - exact).abs().max()
    assert (out.cpu().double() - exact).abs().max() <= 2 * own


def test_the_order_is_read_and_written_through(device):
    arguments, _ = case()
    q = arguments[0]
    order = torch.stack([torch.randperm(26), torch.randperm(26)])[:, None].int()
    expected = reference.block_sparse_attention(*arguments, scale=0.1)
    mixed = reference.unpermute(q, order).transpose(1, 2).contiguous().transpose(1, 2)
    changed = to((mixed, *arguments[1:]), device)
    out, lse = block_sparse_attention(*changed, scale=0.1, q_order=order.to(device), impl="triton")
    torch.testing.assert_close(
        reference.permute(out.cpu(), order), expected[0], rtol=1e-4, atol=1e-5
    )
    expected_lse = reference.unpermute(expected[1][..., None], order)[..., 0]
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-4, atol=1e-5)
    again = block_sparse_attention(*changed, scale=0.1, q_order=order.to(device), impl="triton")
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_long_runs_use_full_tiles(device):
    """Adjacent clusters make one run; it is longer than a tile of keys."""
    arguments, _ = case(64, torch.bfloat16, (3,), (40, 0, 45, 60, 7), batch=1)
    q, k, v, q_ends, k_ends, _ = arguments
    mask = torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5)
    selection = reference.selection_from_mask(mask, k_ends.diff())
    arguments = (q, k, v, q_ends, k_ends, selection)
    expected, _ = reference.block_sparse_attention(*arguments, scale=0.125)
    out, _ = block_sparse_attention(*to(arguments, device), scale=0.125, impl="triton")
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_compensation_is_exact_for_clusters_of_equal_keys(device):
    """One vector per cluster: its mean stands for it without error, so the result is dense."""
    q, k, v, q_ends, k_ends, selection = case(batch=1)[0]
    label = torch.repeat_interleave(torch.arange(7), k_ends[0, 0].diff())
    means_k, means_v = torch.randn(1, 1, 7, 64), torch.randn(1, 1, 7, 64)
    k, v = means_k[:, :, label], means_v[:, :, label]
    dense = scaled_dot_product_attention(q, k, v)
    arguments = (q, k, v, q_ends, k_ends, selection)
    means = {"k_means": means_k, "v_means": means_v}
    out, lse = reference.block_sparse_attention(*arguments, scale=0.125, **means)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    means = {name: x.to(device) for name, x in means.items()}
    found, found_lse = block_sparse_attention(
        *to(arguments, device), scale=0.125, **means, impl="triton"
    )
    torch.testing.assert_close(found.cpu(), dense, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_lse.cpu(), lse, rtol=1e-4, atol=1e-4)


def test_nan_shows_where_dense_attention_shows_it(device):
    arguments, mask = case(batch=1)
    q, k, v, q_ends, k_ends, _ = arguments
    q[0, 0, 9] = math.nan
    v[0, 0, k_ends[0, 0, 5] : k_ends[0, 0, 6]] = math.nan  # of one cluster
    mask[0, 0, :, 5] = torch.tensor([True, False, True, False])
    selection = reference.selection_from_mask(mask, k_ends.diff())
    arguments = (q, k, v, q_ends, k_ends, selection)
    rows = torch.repeat_interleave(torch.arange(4), q_ends[0, 0].diff())
    expected = (rows == 0) | (rows == 2) | (torch.arange(26) == 9)
    for impl in ("reference", "triton"):
        out, _ = block_sparse_attention(*to(arguments, device), scale=0.125, impl=impl)
        assert torch.equal(out.isnan().any(-1)[0, 0].cpu(), expected)


def test_bad_input_raises():
    (q, k, v, q_ends, k_ends, selection), _ = case()
    good = {"q": q, "k": k, "v": v, "q_offsets": q_ends, "k_offsets": k_ends}
    for change, message in (
        ({"k": k.half()}, "k has dtype torch.float16, but q torch.float32"),
        ({"v": v[:, :, :-1]}, "differ in dimension 2"),
        ({"q": q[0]}, "batch, heads, tokens, dim"),
        ({"q_offsets": q_ends[..., :-1]}, "4 rows, but there are 3 query clusters"),
        ({"k_offsets": k_ends[..., :-1]}, "7 columns, but there are 6 key clusters"),
        ({"k_offsets": k_ends.long()}, "k_offsets must be int32"),
        ({"k_means": k[:, :, :3]}, "only one of them"),
    ):
        for impl in ("reference", "triton"):
            with pytest.raises(KernelError, match=message):
                block_sparse_attention(**(good | change), selection=selection, scale=1.0, impl=impl)
    if not torch.cuda.is_available():
        wide = torch.zeros(1, 1, 4, 72)
        with pytest.raises(KernelError, match="one of 64, 80, 96, 128: 72"):
            block_sparse_attention(
                wide, wide, wide, q_ends, k_ends, selection, scale=1.0, impl="triton"
            )
