"""The stable counting sort, and gathering by its order."""

import pytest
import torch

from vidaccel.kernels import reference
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.permute import permute, unpermute
from vidaccel.kernels.sort import CHUNK, sort_by_label


def labels(batch, heads, tokens, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(0, count, (batch, heads, tokens), generator=draw).int()
    return torch.where((found == 0) | (found == 3), 1, found)  # two labels without tokens


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (17, 5), (2 * CHUNK + 3, 300)])
def test_sorting_is_stable_and_complete(tokens, count, device):
    x = (labels(2, 1, tokens, count) % count).to(device)
    order, offsets = sort_by_label(x, count, impl="triton")
    expected_order, expected_offsets = reference.sort_by_label(x, count)
    assert torch.equal(order, expected_order) and torch.equal(offsets, expected_offsets)
    assert torch.equal(order.sort(-1).values, torch.arange(tokens, device=device).expand_as(order))
    sizes = reference.cluster_counts(x, count)
    assert torch.equal(offsets.diff(), sizes) and (offsets[..., -1] == tokens).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_permuting_is_exact_both_ways(dtype, head_dim, device):
    x = torch.randn(2, 70, 1, head_dim).to(dtype).transpose(1, 2).to(device)
    order = torch.stack([torch.randperm(70), torch.randperm(70)])[:, None].int().to(device)
    moved = permute(x, order, impl="triton")
    assert torch.equal(moved, reference.permute(x, order))
    assert torch.equal(unpermute(moved, order, impl="triton"), x)
    assert torch.equal(reference.unpermute(moved, order), x)


def test_addresses_pass_two_to_the_31(device):
    """Rows lie so far apart that the last one begins behind element 2^31; only 4 are touched."""
    if device.type != "cpu":
        pytest.skip("needs memory that is only reserved")
    stride = 2**30 // 64 * 64
    try:
        memory = torch.from_file("/dev/zero", size=1, dtype=torch.uint8)
        import numpy as np

        flat = torch.from_numpy(np.zeros(3 * stride + 64, dtype=np.float16))  # never touched
    except (MemoryError, RuntimeError):
        pytest.skip("cannot reserve 6 GiB of address space")
    assert memory.numel() == 1
    x = flat.as_strided((1, 1, 4, 64), (64, 64, stride, 1))
    values = torch.randn(4, 64).half()
    for row in range(4):
        flat[row * stride : row * stride + 64] = values[row]
    order = torch.tensor([3, 1, 0, 2], dtype=torch.int32).view(1, 1, 4)
    assert torch.equal(permute(x, order, impl="triton")[0, 0], values[order[0, 0].long()])


def test_bad_input_raises():
    with pytest.raises(KernelError, match="must be int32 with 3 dimensions"):
        sort_by_label(torch.zeros(1, 1, 4, dtype=torch.int64), 3, impl="triton")
    with pytest.raises(KernelError, match="cannot be sorted"):
        sort_by_label(torch.zeros(1, 1, 0, dtype=torch.int32), 3, impl="triton")
    order = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(KernelError, match="differ in dimension 2"):
        permute(torch.zeros(1, 1, 5, 64), order, impl="triton")
    with pytest.raises(KernelError, match="differ in dimension 2"):
        permute(torch.zeros(1, 1, 5, 64), order)
