"""Whether attention can be sparse: decided before a run, and told."""

import pytest
import torch

from tiny import Case
from tiny.looking import two_steps
from tiny.machine import card, offloaded_to, without_triton
from tiny.wan import wan, wan_transformer
from vidaccel import SVG2, accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.errors import AttentionError
from vidaccel.hosts.registry import HOSTS, find_transformers
from vidaccel.kernels import common
from vidaccel.resolve import attention_of
from vidaccel.svg2 import runner, support
from vidaccel.svg2.runner import SparseAttention

SPARSE = SVG2(query_clusters=2, key_clusters=3, min_tokens=0, dense_steps=0, dense_layers=0)
WAN = HOSTS["WanTransformer3DModel"]


@pytest.fixture
def kernels_for_12(monkeypatch):
    """Let there be kernels for heads as small as those of tiny-wan."""
    monkeypatch.setattr(support, "HEAD_DIMS", (12,))


def note(pipe):
    return report(pipe).transformers[0].attention.settings


def test_auto_leaves_attention_alone_without_a_gpu():
    case = wan()
    accelerate(case.pipe, policy=None)
    case.run()
    assert report(case.pipe).transformers[0].attention is None


def test_auto_takes_svg2_on_a_gpu_that_runs_the_kernels(monkeypatch, kernels_for_12):
    card(monkeypatch)
    case = wan()
    accelerate(case.pipe, policy=None)
    assert note(case.pipe).startswith("SVG2(")
    case.run(height=512, width=512, num_inference_steps=1)
    # On the CPU all the same, so dense.
    assert report(case.pipe).transformers[0].attention.dense_calls


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_an_older_gpu(monkeypatch, kernels_for_12, capability):
    card(monkeypatch, capability)
    reason = "the kernels need compute capability 8.0, and this GPU has {}.{}".format(*capability)
    refused_for(reason)


def test_a_gpu_of_another_vendor(monkeypatch, kernels_for_12):
    card(monkeypatch, (9, 4), hip="6.4")
    refused_for("the kernels have been shown to run on NVIDIA GPUs alone, and this is AMD")


def test_a_machine_without_triton(monkeypatch, kernels_for_12):
    card(monkeypatch)
    without_triton(monkeypatch)
    refused_for("the kernels need Triton, which cannot be imported")


def test_weights_in_float64(monkeypatch, kernels_for_12):
    card(monkeypatch)
    case = wan()
    case.pipe.to(torch.float64)
    refused_for("the kernels take float16, bfloat16 and float32, and this is float64", case)


def test_heads_without_a_kernel(monkeypatch):
    card(monkeypatch)
    refused_for("there are kernels for heads of size 64, 80, 96, 128, and its heads have 12")


@pytest.mark.parametrize("size", [48, 64, 72, 80, 96, 128, 256])
def test_the_size_of_the_heads_is_known_before_the_run(monkeypatch, size):
    card(monkeypatch)
    model = wan_transformer(attention_head_dim=size)
    offloaded_to("cuda", model)
    assert support.head_size(model, WAN) == size
    if size in common.HEAD_DIMS:
        assert isinstance(attention_of("auto", model, WAN), SparseAttention)
        assert isinstance(attention_of(SPARSE, model, WAN), SparseAttention)
        return
    assert f"its heads have {size}" in attention_of("auto", model, WAN).report().settings
    with pytest.raises(AttentionError, match=f"its heads have {size}"):
        attention_of(SPARSE, model, WAN)


def refused_for(reason: str, case: Case | None = None) -> None:
    """auto is dense and says why; an SVG2 is refused before anything is changed."""
    case = case or wan()
    # As long as it is on the CPU, no GPU of the machine is in the way of an SVG2.
    accelerate(case.pipe, policy=None, attention=SPARSE)
    assert note(case.pipe).startswith("SVG2(")
    case.run()
    assert report(case.pipe).transformers[0].attention.sparse_calls
    restore(case.pipe)
    offloaded_to("cuda:1", case.pipe.transformer)
    accelerate(case.pipe, policy=None)
    assert note(case.pipe).startswith(f"dense, since {reason}")
    assert f"attention: dense, since {reason}" in str(report(case.pipe))
    engines = engines_of(case.pipe)
    with pytest.raises(AttentionError, match="cannot be made sparse on cuda:1: ") as error:
        accelerate(case.pipe, policy=None, attention=SPARSE)
    assert reason in str(error.value) and str(error.value).endswith("; pass attention=None")
    assert engines_of(case.pipe) == engines


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_that_are_not_cuda(monkeypatch, kernels_for_12, kind):
    """auto does not try; an SVG2 runs there in torch."""
    case = wan()
    offloaded_to(kind, case.pipe.transformer)
    accelerate(case.pipe, policy=None)
    assert f"NVIDIA GPUs alone, and this is {kind}" in note(case.pipe)
    accelerate(case.pipe, policy=None, attention=SPARSE)
    assert note(case.pipe).startswith("SVG2(")


def test_a_transformer_is_judged_by_the_device_that_it_runs_on(monkeypatch):
    card(monkeypatch, (7, 5))  # somewhere in the machine, and never asked about
    model = wan_transformer()
    assert support.gpu_of(model) is None and support.gpu_of(model.to("meta")) is None
    model = wan_transformer()
    offloaded_to("cuda:1", model)
    assert support.gpu_of(model) == torch.device("cuda:1")
    model = wan_transformer()
    model.enable_group_offload(
        torch.device("cuda:1"), torch.device("cpu"), "block_level", num_blocks_per_group=1
    )
    assert support.gpu_of(model) == torch.device("cuda:1")
    # One that may be moved yet is judged where it runs then.
    sparse = attention_of("auto", wan_transformer(), WAN)
    tokens = runner.Tokens(20_000, 0, 20_000)
    assert "this GPU has 7.5" in sparse.why_dense_here(OnGPU(), tokens, False)


def test_the_size_of_the_heads_is_found_in_every_family(family: Case):
    rows = find_transformers(family.pipe)
    known = {name: support.head_size(*pair) for name, pair in rows.items() if pair[1].attention}
    if not known:
        return
    seen = set()

    def look(q, k, v, state, config, **text):
        seen.add(q.shape[3])
        return runner.semantic_attention(q, k, v, state, config, **text)

    accelerate(family.pipe, policy=None, cache=None, attention=SPARSE)
    for engine in engines_of(family.pipe).values():
        engine.attention.method = look
    family.run(**two_steps(family))
    assert seen == set(known.values())


# What is only known when it runs.


class OnGPU:
    """What sparse attention looks at of queries on a GPU."""

    is_cuda, requires_grad, device = True, False, torch.device("cuda:1")

    def __init__(self, batch=1, heads=2, size=64, dtype=torch.float16):
        self.shape, self.dtype = (batch, 48, heads, size), dtype


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ({"size": 72}, "its heads have 72"),
        ({"dtype": torch.float64}, "this is float64"),
        ({}, "this GPU has 7.5"),
    ],
    ids=str,
)
def test_what_turns_out_when_it_runs(monkeypatch, query, reason):
    """Adapters, offloading and device maps may bring what was not there at accelerate()."""
    tokens = runner.Tokens(48, 0, 48)
    model = wan_transformer()
    auto = SparseAttention(model, WAN, SVG2(min_tokens=0), gpu_only=True)
    explicit = SparseAttention(model, WAN, SPARSE)
    card(monkeypatch, (7, 5) if not query else (9, 0))
    assert reason in auto.why_dense_here(OnGPU(**query), tokens, False)
    with pytest.raises(AttentionError, match=rf"{reason}.*; pass attention=None"):
        explicit.why_dense_here(OnGPU(**query), tokens, False)
    card(monkeypatch)
    for sparse in (auto, explicit):
        many = sparse.why_dense_here(OnGPU(batch=20_000), tokens, False)
        assert many == "more batch items and heads than a grid has programs"
