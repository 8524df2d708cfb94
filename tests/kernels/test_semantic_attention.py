"""Semantic attention as a whole: exact where it must be, one state per layer, text untouched."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.kernels import reference
from vidaccel.kernels.common import KernelError, density
from vidaccel.kernels.semantic_attention import cluster_tokens, semantic_attention
from vidaccel.kernels.state import SemanticConfig, SemanticState

# What makes no launch on a GPU, and the poison of the tests.
VIEWS = {"empty", "empty_like", "view", "slice", "select", "detach", "_unsafe_view", "fill_"}


def tokens(batch=1, heads=1, size=80, head_dim=64, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, size, head_dim, generator=draw).to(dtype) for _ in range(3)]


def masked_dense(q, k, v, video, text_mask):
    """Text and video see both; padding sees itself."""
    size = q.shape[2]
    padding = torch.zeros(q.shape[0], size, dtype=torch.bool)
    around = torch.cat([torch.arange(video[0]), torch.arange(video[1], size)])
    padding[:, around] = ~text_mask
    seen = padding[:, None, :, None] == padding[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_everything_selected_is_dense_attention(impl, device):
    q, k, v = (x.to(device) for x in tokens(batch=2))
    state = SemanticState()
    config = SemanticConfig(5, 9, top_p=1.0, init_iters=1)
    out = semantic_attention(q, k, v, state, config, impl=impl)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert state.density().tolist() == [[1.0], [1.0]] and state.calls == 1


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("video", [(0, 64), (16, 80)])
def test_padding_is_isolated_and_text_is_seen(impl, video, int8, device):
    q, k, v = tokens(batch=2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :9] = mask[1, :3] = True
    config = SemanticConfig(4, 6, top_p=1.0, init_iters=1, int8_qk=int8)

    def run(k, v, config):
        moved = [x.to(device) for x in (q, k, v)]
        text = {"video": video, "text_mask": mask.to(device), "impl": impl}
        return semantic_attention(*moved, SemanticState(), config, **text).cpu()

    out = run(k, v, config)
    expected = masked_dense(q, k, v, video, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-2 if int8 else 1e-5)
    # Whatever the padding holds, nothing else changes by a bit, at any density.
    sparse = SemanticConfig(4, 6, top_p=0.3, min_ratio=0.0, init_iters=1, int8_qk=int8)
    around = torch.cat([torch.arange(video[0]), torch.arange(video[1], 80)])
    other_k, other_v = k.clone(), v.clone()
    for b in range(2):
        other_k[b, :, around[~mask[b]]] = other_v[b, :, around[~mask[b]]] = torch.nan
    one, two = run(k, v, sparse), run(other_k, other_v, sparse)
    for b in range(2):
        real = torch.ones(80, dtype=torch.bool)
        real[around[~mask[b]]] = False
        assert torch.equal(one[b, :, real], two[b, :, real])
        assert not one.isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mass_averaging": True},
        {"compensation": True},
        {"query_metric": True},
        {"kmeans_iters": 0},
        {"recluster_every": 2},
        {"recluster_every": 2, "reselect_every": 2, "compensation": True},
        {"int8_qk": True},
        {"int8_qk": True, "query_metric": True, "compensation": True, "mass_averaging": True},
        {"int8_qk": True, "recluster_every": 2, "compensation": True},
    ],
    ids=str,
)
def test_triton_equals_the_reference_over_calls(options, device):
    q, k, v = (x.to(device) for x in tokens())
    mask = torch.tensor([[True] * 9 + [False] * 7], device=device)
    config = SemanticConfig(
        **{"query_clusters": 3, "key_clusters": 7, "top_p": 0.5, "init_iters": 1, "kmeans_iters": 1}
        | options
    )
    ours, theirs = SemanticState(), SemanticState()
    text = {"video": (0, 64), "text_mask": mask}
    for call in range(2):
        out = semantic_attention(q + call, k, v, ours, config, **text, impl="triton")
        expected = semantic_attention(q + call, k, v, theirs, config, **text, impl="reference")
        assert torch.equal(ours.query.labels, theirs.query.labels)
        assert torch.equal(ours.key.sorted_idx, theirs.key.sorted_idx)
        assert torch.equal(ours.selection.mask(), theirs.selection.mask())
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert 0 < ours.density().item() < 1
    torch.testing.assert_close(ours.density(), theirs.density())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("options", [{}, {"mass_averaging": True, "compensation": True}], ids=str)
def test_what_is_not_finite_shows_where_dense_attention_shows_it(options, name, value, device):
    """A key of one token; in half of the queries its channel is positive, in half negative."""
    given = dict(zip("qkv", tokens(size=60), strict=True))
    given[name][0, 0, 17, 3] = value
    dense = scaled_dot_product_attention(
        **{"query": given["q"], "key": given["k"], "value": given["v"]}
    )
    config = SemanticConfig(3, 7, top_p=0.3, min_ratio=0.0, init_iters=2, **options)
    found = {}
    for impl in ("reference", "triton"):
        state = SemanticState()
        moved = [x.to(device) for x in given.values()]
        out = semantic_attention(*moved, state, config, impl=impl).cpu()
        found[impl] = state.query.labels, state.key.labels, state.selection.mask(), out
    for ours, theirs in zip(found["triton"][:3], found["reference"][:3], strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = found["triton"][3], found["reference"][3]
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-3, atol=1e-4)
    if name != "v":  # of a value only as much as is selected
        assert torch.equal(finite, dense.isfinite())
        assert not finite.all()


@pytest.mark.parametrize("int8", [False, True])
def test_two_runs_are_bit_equal_and_batch_items_are_alone(int8, device):
    q, k, v = (x.to(device) for x in tokens(batch=2, dtype=torch.bfloat16))
    config = SemanticConfig(3, 7, top_p=0.5, init_iters=1, int8_qk=int8)

    def run(part):
        moved = [x[part] for x in (q, k, v)]
        return semantic_attention(*moved, SemanticState(), config, impl="triton")

    both = run(slice(None))
    assert torch.equal(both, run(slice(None)))
    assert torch.equal(both[1:], run(slice(1, 2)))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_end_of_each_phase_is_told(impl, device):
    q, k, v = (x.to(device) for x in tokens(size=32))
    seen: list[str] = []
    state = SemanticState(on_phase_end=seen.append)
    config = SemanticConfig(2, 4, init_iters=1, kmeans_iters=1)
    cluster_tokens(q, k, state, config, impl=impl)
    assert seen == ["clustering"]
    semantic_attention(q, k, v, state, config, impl=impl)
    assert seen[1:] == ["clustering", "selection", "attention"]


def test_the_layout_of_a_host_is_kept(device):
    q, k, v = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(heads=2))
    config = SemanticConfig(3, 5, top_p=1.0, init_iters=1)
    out = semantic_attention(q, k, v, SemanticState(), config, impl="triton")
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_planted_clusters_are_cheap_and_nearly_exact():
    """Queries of a group look at keys of the same group only."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) * 12
    group = torch.arange(400) % 8
    q, k = ((centres[group] + 0.3 * torch.randn(400, 64))[None, None] for _ in range(2))
    v = torch.randn(1, 1, 400, 64)
    state, config = SemanticState(), SemanticConfig(40, 40, top_p=0.99, min_ratio=0.0)
    out = semantic_attention(q, k, v, state, config)
    dense = scaled_dot_product_attention(q, k, v)
    assert state.density().item() < 0.3
    assert (out - dense).norm() / dense.norm() < 0.02
    found = reference.attention_recall(
        q, k, state.query.labels, state.key.labels, state.selection,
        scale=0.125, rows=torch.arange(0, 400, 7),
    )  # fmt: skip
    assert found.min() > 0.95


def test_options_reduce_the_error():
    """On keys that lie in groups, at the same top_p: what each option is for."""
    torch.manual_seed(0)
    centres = torch.randn(24, 32)
    q, k, v = ((centres[torch.randint(0, 24, (600,))] + 0.5 * torch.randn(600, 32)) for _ in "qkv")
    q, k, v = q[None, None], k[None, None], v[None, None]
    dense = scaled_dot_product_attention(q, k, v)

    def error(**options):
        config = SemanticConfig(12, 24, top_p=0.6, min_ratio=0.0, **options)
        out = semantic_attention(q, k, v, SemanticState(), config)
        return ((out - dense).norm() / dense.norm()).item()

    plain = error()
    assert error(compensation=True) < 0.6 * plain
    assert error(mass_averaging=True) < plain


def test_the_query_metric_is_the_variation_of_scores():
    q, k, _ = tokens(size=500, head_dim=16)
    q, k = q.double(), k.double()
    factor = reference.query_metric(q, ridge=0.0)
    moved = (k[:, :, :1] - k[:, :, 1:20]) @ factor
    expected = (q @ (k[:, :, :1] - k[:, :, 1:20]).transpose(-1, -2)).square().mean(-2)
    torch.testing.assert_close(moved.square().sum(-1), expected)


def test_a_state_follows_the_shape_and_can_be_reset():
    config = SemanticConfig(4, 6, init_iters=1)
    state = SemanticState()
    for size in (60, 80, 80):
        out = semantic_attention(*tokens(size=size), state, config)
        assert out.shape[2] == size
    assert state.calls == 2
    semantic_attention(*tokens(), state, SemanticConfig(4, 7, init_iters=1))
    assert state.calls == 1 and state.key.centroids.shape[2] == 7
    state.reset()
    assert state.query is None and state.selection is None and state.calls == 0
    with pytest.raises(KernelError, match="nothing was selected yet"):
        state.density()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("video", [(0, 64), (16, 80)])
def test_padding_has_no_share_in_density_and_recall(impl, video, device):
    q, k, v = (x.to(device) for x in tokens(batch=2))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :9] = mask[1, :1] = True
    valid = torch.ones(2, 80, dtype=torch.bool)
    around = [i for i in range(80) if not video[0] <= i < video[1]]
    valid[:, around] = mask
    for top_p in (1.0, 0.3):
        state, config = SemanticState(), SemanticConfig(4, 6, top_p, min_ratio=0.0, init_iters=1)
        text = {"video": video, "text_mask": mask.to(device)}
        semantic_attention(q, k, v, state, config, **text, impl=impl)
        labels = state.query.labels, state.key.labels
        rows = torch.arange(video[0], video[1], 5, device=device)
        recall = reference.attention_recall(
            q, k, *labels, state.selection, scale=0.125, rows=rows, valid=valid.to(device)
        )
        # Pair by pair.
        seen = state.selection.mask().gather(2, labels[0].long()[..., None].expand(2, 1, 80, 8))
        seen = seen.gather(3, labels[1].long()[:, :, None, :].expand(2, 1, 80, 80)).cpu()
        pairs = (valid[:, None, :, None] & valid[:, None, None, :]).double()
        expected = (seen * pairs).sum((2, 3)) / pairs.sum((2, 3))
        torch.testing.assert_close(state.density().cpu().double(), expected, rtol=1e-6, atol=0)
        scores = (q @ k.transpose(-1, -2) * 0.125).cpu()
        mass = scores.masked_fill(~valid[:, None, None, :], -torch.inf).softmax(-1) * seen
        torch.testing.assert_close(recall.cpu(), mass.sum(-1)[..., rows.cpu()])
        if top_p == 1.0:
            assert (state.density() == 1).all()
            torch.testing.assert_close(recall, torch.ones_like(recall))


def test_clustering_alone_prepares_the_next_call():
    q, k, v = tokens()
    config = SemanticConfig(4, 6, init_iters=3, kmeans_iters=0)
    warm, cold = SemanticState(), SemanticState()
    cluster_tokens(q, k, warm, config)
    assert warm.calls == 0 and warm.selection is None
    semantic_attention(q, k, v, warm, config)
    semantic_attention(q, k, v, cold, config)
    torch.testing.assert_close(warm.query.centroids, cold.query.centroids)
    share = density(warm.selection.tokens, warm.query.counts, 80)
    torch.testing.assert_close(share.float(), warm.density())
    for empty, side in zip(warm.empty_clusters(), (warm.query, warm.key), strict=True):
        assert empty.item() == side.centroids.shape[2] - len(side.labels.unique())
    same = torch.ones_like(q)
    cluster_tokens(same, same, warm, config)
    assert [empty.item() for empty in warm.empty_clusters()] == [3, 5]


@pytest.mark.parametrize(
    "options, launches",
    [({}, 12), ({"int8_qk": True}, 12), ({"mass_averaging": True, "compensation": True}, 13)],
    ids=["plain", "int8", "as SVG2 has it"],
)
def test_a_layer_takes_few_launches(options, launches, monkeypatch, device):
    """Counted with two rounds of k-means in 16 bits; torch itself must launch nothing."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from vidaccel.kernels import (
        block_sparse_attention,
        kmeans,
        quantise,
        query_mass,
        select,
        sort,
    )

    seen, inside = [], []
    names = ("_prepare", "_assign", "_update", "_update_and_sort", "_scan", "_rank", "_threshold")
    names += ("_lists", "_attend", "_quantise", "_mass")

    class Watch(TorchDispatchMode):
        """Notes what torch would launch; the interpreter's own work does not count."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.__name__.partition(".")[0]
            if not inside and name not in VIEWS:
                seen.append(name)
            return function(*args, **(kwargs or {}))

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append("kernel")
                inside.append(True)
                self.kernel[grid](*args, **kwargs)
                inside.pop()

            return launch

    q, k, v = (x.to(device, torch.float16) for x in tokens(size=40))
    state, config = SemanticState(), SemanticConfig(2, 3, init_iters=1, kmeans_iters=2, **options)
    semantic_attention(q, k, v, state, config, impl="triton")
    for module in (block_sparse_attention, kmeans, quantise, query_mass, select, sort):
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    with Watch():
        semantic_attention(q, k, v, state, config, impl="triton")
    assert seen == ["kernel"] * launches


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bad_input_raises(impl):
    q, k, v = tokens(size=8)
    config = SemanticConfig(4, 6)

    def run(*tensors, config=config, **text):
        semantic_attention(*tensors, SemanticState(), config, impl=impl, **text)

    with pytest.raises(KernelError, match="9 key clusters do not fit 8 tokens"):
        run(q, k, v, config=SemanticConfig(4, 9))
    with pytest.raises(KernelError, match="6 key clusters do not fit 5 tokens"):
        run(q, k, v, video=(0, 5))
    with pytest.raises(KernelError, match=r"v has dtype torch\.bfloat16, but q torch\.float32"):
        run(q, k, v.bfloat16())
    with pytest.raises(KernelError, match="differ in dimension 2"):
        run(q, k[:, :, :7], v)
    with pytest.raises(KernelError, match="do not lie within 8 tokens"):
        run(q, k, v, video=(0, 9))
    with pytest.raises(KernelError, match=r"text_mask must be bool \[1, 2\]"):
        run(q, k, v, video=(0, 6), text_mask=torch.ones(1, 3).bool())
    for wrong in ({"top_p": 0}, {"min_ratio": 2}, {"kmeans_iters": -1}, {"recluster_every": 0}):
        with pytest.raises(KernelError, match=f"{next(iter(wrong))} must be"):
            SemanticConfig(4, 6, **wrong)
