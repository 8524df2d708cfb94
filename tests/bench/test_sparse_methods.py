"""Fixed blocks and random clusters stand in for semantic attention."""

import math

import torch

from vidaccel.bench.sparse_methods import fixed_blocks, random_clusters
from vidaccel.kernels.semantic_attention import semantic_attention
from vidaccel.kernels.state import SemanticConfig, SemanticState


def test_what_svg2_is_compared_with():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 90, 16, generator=draw) for _ in range(3))
    text = {"video": (0, 90)}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    everything = SemanticConfig(5, 9, top_p=1.0)
    for method in (fixed_blocks, random_clusters):
        out = method(q, k, v, SemanticState(), everything, **text)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
    config = SemanticConfig(5, 9, top_p=0.5, min_ratio=0.0)
    blocks, blind, ours = SemanticState(), SemanticState(), SemanticState()
    fixed_blocks(q, k, v, blocks, config, **text)
    assert blocks.query.sorted_idx[0, 0].tolist() == list(range(90)), "blocks do not permute"
    assert blocks.key.counts[0, 0].tolist() == [10] * 9
    random_clusters(q, k, v, blind, config, **text)
    semantic_attention(q, k, v, ours, config, **text)
    assert torch.equal(blind.query.labels, ours.query.labels)
    assert torch.equal(blind.selection.mask().sum(-1), ours.selection.mask().sum(-1))
    assert not torch.equal(blind.selection.mask(), ours.selection.mask())
    assert all(math.isfinite(x) for x in blind.density().flatten())
