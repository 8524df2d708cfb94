"""Which kernels run for which inputs, and why the others are refused."""

import pytest
import torch

from tiny.machine import card, without_triton
from vidaccel.kernels import common
from vidaccel.kernels.common import KernelError, resolve, why_no_kernels
from vidaccel.kernels.kmeans import kmeans
from vidaccel.kernels.permute import permute
from vidaccel.kernels.select import select_top_p
from vidaccel.kernels.semantic_attention import cluster_tokens, semantic_attention
from vidaccel.kernels.state import SemanticConfig, SemanticState

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_chips_that_can_run_the_kernels(monkeypatch, capability):
    card(monkeypatch, capability)
    assert why_no_kernels(GPU) == ""


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_older_chips_are_named(monkeypatch, capability):
    card(monkeypatch, capability)
    major, minor = capability
    found = f"the kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    assert why_no_kernels(GPU) == found


def test_other_vendors_are_named(monkeypatch):
    card(monkeypatch, hip="6.4")  # gfx942 calls itself 9.4
    assert "NVIDIA GPUs alone, and this is AMD" in why_no_kernels(GPU)
    for kind in ("xpu", "mps"):
        assert f"this is {kind}" in why_no_kernels(torch.device(kind))


def test_a_triton_that_is_missing_is_named(monkeypatch):
    card(monkeypatch)
    without_triton(monkeypatch)
    assert "the kernels need Triton, which cannot be imported" in why_no_kernels(GPU)


class OnGPU:
    """What `resolve` looks at of a tensor on a GPU."""

    device, requires_grad = GPU, False


def test_what_cannot_run_is_refused_and_not_replaced_by_something_slow(monkeypatch):
    card(monkeypatch, (7, 5))
    for impl in ("auto", "triton"):
        with pytest.raises(KernelError, match=r'this GPU has 7\.5; impl="reference" runs every'):
            resolve(impl, OnGPU())
    assert resolve("reference", OnGPU()) == "reference"
    card(monkeypatch, (9, 0))
    assert resolve("auto", OnGPU()) == resolve("triton", None, OnGPU()) == "triton"


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setattr(common, "interpreting", lambda: False)
    with pytest.raises(KernelError, match="Triton kernels need a GPU, found tensors on cpu"):
        resolve("triton", torch.zeros(1))


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_not_lost_silently(which):
    tensors = [torch.randn(1, 1, 8, 64) for _ in "qkv"]
    tensors[which].requires_grad_()
    config = SemanticConfig(2, 3, init_iters=1)

    def run(impl):
        return semantic_attention(*tensors, SemanticState(), config, impl=impl)

    with pytest.raises(KernelError, match=r"no backward pass.*torch\.no_grad\(\)"):
        run("triton")
    with torch.no_grad():
        assert not run("triton").requires_grad
    assert run("reference").requires_grad


def test_no_kernel_takes_what_requires_a_gradient():
    x, y = torch.randn(1, 1, 8, 64, requires_grad=True), torch.randn(1, 1, 2, 64)
    ints = torch.zeros(1, 1, 8, dtype=torch.int32)
    share = {"scale": 1.0, "top_p": 0.5, "min_ratio": 0.0, "impl": "triton"}
    for call in (
        lambda: kmeans(x, y, 1, impl="triton"),
        lambda: kmeans(x.detach(), y.clone().requires_grad_(), 1, impl="triton"),
        lambda: permute(x, ints, impl="triton"),
        lambda: select_top_p(y, x, ints, **share),
        lambda: cluster_tokens(
            x, x, SemanticState(), SemanticConfig(2, 3, init_iters=1), impl="triton"
        ),
    ):
        with pytest.raises(KernelError, match="no backward pass"):
            call()


def test_the_reference_has_the_gradients_of_dense_attention_where_all_is_selected():
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 12, 16, dtype=torch.float64) for _ in "qkv"]
    state = SemanticState()

    def gradients(attention):
        given = [x.clone().requires_grad_() for x in tensors]
        out = attention(*given)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    def ours(q, k, v):
        return semantic_attention(q, k, v, state, SemanticConfig(2, 3, top_p=1.0))

    dense = gradients(torch.nn.functional.scaled_dot_product_attention)
    for _ in range(2):  # what is kept belongs to no graph
        torch.testing.assert_close(gradients(ours), dense)
    assert not state.query.centroids.requires_grad
