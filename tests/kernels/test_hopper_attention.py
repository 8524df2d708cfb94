"""The Gluon kernel of attention for sm_90: on a model of its operations, and compiled for it."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from tests.kernels.gluon_model import kernel_source, run_on_model
from vidaccel.kernels import block_sparse_attention as sparse
from vidaccel.kernels import reference
from vidaccel.kernels.block_lists import BlockLists, fill_block_lists
from vidaccel.kernels.hopper_attention import hopper_config

SMALL = hopper_config(64, torch.bfloat16)
LARGE = hopper_config(128, torch.bfloat16)
CONFIGS = {
    "shipped-d64": (64, SMALL),
    "shipped-d128": (128, LARGE),
    "2-stages": (64, SMALL | {"STAGES": 2}),
    "2-stages-late": (64, LARGE | {"STAGES": 2}),
    "4-stages": (64, SMALL | {"STAGES": 4}),
    "128x128": (64, LARGE | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}),
}


def ends_of(sizes):
    """[1, 2, K + 1]: two heads, the second with the sizes in reverse."""
    sizes = torch.tensor(sizes)
    return pad(torch.stack([sizes, sizes.flip(0)]).cumsum(-1), (1, 0)).int()[None]


def arguments(head_dim, config, *, with_means, q_sizes=(70, 131, 5, 0, 1, 66), k_sizes=None):
    """Return what the kernel takes, and the result of the reference.

    Query clusters select nothing, one cluster, all of them, and some.
    """
    torch.manual_seed(0)
    k_sizes = (300, 0, 17, 90, 1, 16, 40, 150) if k_sizes is None else k_sizes
    q_ends, k_ends = ends_of(q_sizes), ends_of(k_sizes)
    num_queries, num_keys = sum(q_sizes), sum(k_sizes)
    q = torch.randn(1, num_queries, 2, head_dim).transpose(1, 2)
    k, v = (torch.randn(1, 2, num_keys, head_dim) for _ in range(2))
    mask = torch.rand(1, 2, len(q_sizes), len(k_sizes)) < 0.5
    mask[:, :, 0] = torch.arange(len(k_sizes)) == 3
    mask[:, :, 1] = True
    mask[:, :, 2] = False
    selection = reference.selection_from_mask(mask, k_ends.diff())
    order = means = None
    extra = {}
    if with_means:
        order = torch.rand(1, 2, num_queries).argsort(-1).int()
        k_means, v_means = (torch.randn(1, 2, len(k_sizes), head_dim) for _ in range(2))
        means = sparse.ClusterMeans(k_means, v_means, len(q_sizes) - 1)
        extra = {"q_order": order, "k_means": k_means, "v_means": v_means}
        extra["compensated_rows"] = means.num_compensated
    lists = BlockLists.empty(
        1,
        2,
        num_queries,
        num_keys,
        len(q_sizes),
        len(k_sizes),
        block_m=config["BLOCK_M"],
        block_n=config["BLOCK_N"],
        num_means=len(k_sizes) if with_means else None,
        device=q.device,
    )
    for x in lists.tensors():
        if x is not None:  # what is read beyond the ends of lists does harm
            x.fill_(float("nan") if x.is_floating_point() else 0x3FFFFFFF)
    fill_block_lists(lists, selection, q_ends, k_ends, len(q_sizes) - 1)
    scale = head_dim**-0.5
    expected = reference.block_sparse_attention(
        q, k, v, q_ends, k_ends, selection, scale=scale, **extra
    )
    options = {"scale": scale, "sorted_idx": order, "means": means, "config": config}
    return (q, k, v, q_ends, k_ends, lists), options, expected


@pytest.fixture(autouse=True)
def on_the_cpu():
    """The model's numbers lie there, on any machine; the lists are filled by an interpreter."""
    if torch.cuda.is_available():
        pytest.skip("here kernels run on a GPU")


@pytest.mark.parametrize("with_means", [False, True], ids=["exact", "means-and-order"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_the_reference(name, with_means):
    tensors, options, (out, lse) = arguments(*CONFIGS[name], with_means=with_means)
    found, found_lse = run_on_model(*tensors, **options)
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)
    alone = lse.isinf()
    assert torch.equal(found_lse.isinf(), alone) and alone.any()
    assert (found[alone] == 0.0).all()
