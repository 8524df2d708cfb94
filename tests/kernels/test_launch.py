"""Every launch is on the device of its tensors and within the limits of a grid."""

from contextlib import contextmanager

import pytest
import torch

from vidaccel.kernels import (
    block_lists,
    block_sparse_attention,
    kmeans,
    quantise,
    query_mass,
    select,
    sort,
)
from vidaccel.kernels import launch as launching
from vidaccel.kernels import permute as permuting
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.launch import launch, on_device
from vidaccel.kernels.permute import permute, unpermute
from vidaccel.kernels.query_mass import query_mass_logits
from vidaccel.kernels.select import select_top_p
from vidaccel.kernels.semantic_attention import cluster_tokens, semantic_attention
from vidaccel.kernels.sort import sort_by_label
from vidaccel.kernels.state import SemanticConfig, SemanticState


class FakeCuda:
    """Stands in for `torch.cuda.device`; knows which device is current."""

    current = torch.device("cuda:0")

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.before, FakeCuda.current = FakeCuda.current, self.device

    def __exit__(self, *error):
        FakeCuda.current = self.before


class Kernel:
    """Notes the device that is current at its launches."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            self.seen.append((grid, FakeCuda.current, args, kwargs))

        return run


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", FakeCuda)
    kernel, second = Kernel(), torch.device("cuda:1")
    launch(kernel, second, 3, 4)(1, b=2)
    assert kernel.seen == [((3, 4), second, (1,), {"b": 2})]
    assert FakeCuda.current == torch.device("cuda:0")
    with on_device(torch.device("cpu")):
        assert FakeCuda.current == torch.device("cuda:0")


class Watched:
    """A kernel that may only be launched while the device of its tensors is current."""

    def __init__(self, kernel, current, seen):
        self.kernel, self.current, self.seen = kernel, current, seen

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            used = {x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
            assert used == set(self.current), self.kernel
            self.seen.add(self.kernel.fn.__name__)
            self.kernel[grid](*args, **kwargs)

        return run


def test_no_kernel_is_launched_in_another_way(monkeypatch, device):
    """All of them at once; those of int8 and of means among them."""
    current, seen = [], set()

    @contextmanager
    def entered(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(launching, "on_device", entered)
    names = {
        block_lists: ["_from_selection"],
        block_sparse_attention: ["_attend"],
        kmeans: ["_prepare", "_assign", "_update", "_update_and_sort"],
        permuting: ["_move"],
        quantise: ["_quantise"],
        query_mass: ["_mass"],
        select: ["_threshold", "_lists"],
        sort: ["_histogram", "_scan", "_rank"],
    }
    for module, kernels in names.items():
        for name in kernels:
            watched = Watched(getattr(module, name), current, seen)
            monkeypatch.setattr(module, name, watched)
    q, k, v = (torch.randn(1, 1, 40, 64).to(device) for _ in "qkv")
    for options in (
        {"compensation": True, "mass_averaging": True},
        {"int8_qk": True, "recluster_every": 2},
    ):
        state, config = SemanticState(), SemanticConfig(2, 3, init_iters=2, **options)
        for _ in range(2):
            semantic_attention(q, k, v, state, config, impl="triton")
    cluster_tokens(q, k, SemanticState(), config, impl="triton")
    labels = torch.zeros(1, 1, 40, dtype=torch.int32, device=device)
    order, offsets = sort_by_label(labels, 2, impl="triton")
    unpermute(permute(q, order, impl="triton"), order, impl="triton")
    block_sparse_attention.block_sparse_attention(
        q, k, v, offsets, offsets,
        select_top_p(
            q[:, :, :2], k[:, :, :2], offsets.diff(),
            scale=1.0, top_p=0.5, min_ratio=0.0, impl="triton",
        ),
        scale=1.0, int8_qk=True, impl="triton",
    )  # fmt: skip
    assert seen == {name for kernels in names.values() for name in kernels}
    assert not current


def test_a_grid_that_no_gpu_has_is_refused():
    kernel, device = Kernel(), torch.device("cpu")
    launch(kernel, device, 2**31 - 1, 65_535)()
    assert len(kernel.seen) == 1
    for grid in ((1, 65_536), (2**31,), (2**31, 1)):
        with pytest.raises(KernelError, match="split the batch"):
            launch(kernel, device, *grid)
    assert len(kernel.seen) == 1


@pytest.mark.parametrize("name", ["semantic", "sort", "permute", "select", "mass"])
def test_too_many_batch_items_and_heads_are_refused(name):
    many = 65_536
    x = torch.zeros(1, 1, 1, 1).expand(many // 2 if name == "semantic" else many, 1, 1, 64)
    ints = torch.zeros(many, 1, 2, dtype=torch.int32)
    calls = {
        "semantic": lambda: semantic_attention(
            x, x, x, SemanticState(), SemanticConfig(1, 1, init_iters=1), impl="triton"
        ),
        "sort": lambda: sort_by_label(ints, 1, impl="triton"),
        "permute": lambda: permute(x, ints[..., :1], impl="triton"),
        "select": lambda: select_top_p(
            x, x, ints[..., :1], scale=1.0, top_p=0.5, min_ratio=0.0, impl="triton"
        ),
        "mass": lambda: query_mass_logits(x, ints[..., :1], ints, x, x[..., 0], 1, 1.0),
    }
    # Queries and keys are clustered in one launch.
    with pytest.raises(KernelError, match=r"65,536 programs is over .* split the batch"):
        calls[name]()
