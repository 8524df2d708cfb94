"""Whole pipelines of every family through the kernels, against the reference."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tiny import CORE, Case
from tiny.looking import two_steps
from vidaccel import SVG2, accelerate, report
from vidaccel.api import engines_of
from vidaccel.hosts.registry import find_transformers
from vidaccel.kernels import common
from vidaccel.kernels.semantic_attention import semantic_attention
from vidaccel.svg2.gate import why_kernels_fail

SPARSE = SVG2(
    top_p=0.5, query_clusters=2, key_clusters=4, min_tokens=0, min_ratio=0.0,
    dense_steps=0, dense_layers=0.7, init_iters=1, kmeans_iters=1,
)  # fmt: skip
# The interpreter takes a second for a few dozen tokens: one step for those that another stands for.
ONE_STEP = replace(SPARSE, dense_steps=0.5)


@pytest.mark.slow
def test_the_kernels_give_the_clip_of_the_reference(family: Case, request, monkeypatch):
    """On the CPU, so that the kernels are interpreted; with means and mass, as by default."""
    if torch.cuda.is_available():
        pytest.skip("tiny heads have no kernels, but where they are interpreted")
    if not any(host.attention for _, host in find_transformers(family.pipe).values()):
        pytest.skip("its attention is never sparse")
    monkeypatch.setattr(common, "HEAD_DIMS", range(1, 129))
    name = request.node.callspec.params["family"]
    if name == "ltx_long":
        pytest.skip("its windows are those of ltx, and take the interpreter minutes")
    settings = SPARSE if name in CORE else ONE_STEP
    clips, parts = {}, {}
    for impl in ("reference", "triton"):
        accelerate(family.pipe, policy=None, cache=None, attention=settings)
        for engine in engines_of(family.pipe).values():
            engine.attention.method = partial(semantic_attention, impl=impl)
        clips[impl] = family.run(**two_steps(family))
        found = report(family.pipe).transformers
        parts[impl] = [(part.attention.sparse_calls, part.attention.density) for part in found]
    torch.testing.assert_close(clips["triton"], clips["reference"], rtol=1e-4, atol=1e-5)
    assert parts["triton"] == parts["reference"]
    assert sum(calls for calls, _ in parts["triton"]) > 0


@pytest.mark.slow
def test_the_trial_call_of_sparse_attention_passes():
    """What decides on a GPU whether attention is sparse there; interpreted on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = partial(semantic_attention, impl="triton")
    options = {"text": True, "attention": attention}
    assert not why_kernels_fail(device, 64, torch.float16, SVG2(), **options)
