"""Top-p selection against brute force, and the kernel against the reference."""

import math

import pytest
import torch

from vidaccel.kernels import reference
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.query_mass import query_mass_logits
from vidaccel.kernels.select import select_top_p

SCALE = 0.3


def case(rows=5, columns=41, batch=2, heads=1, head_dim=64):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, rows, head_dim, generator=draw)
    k = torch.randn(batch, heads, columns, head_dim, generator=draw)
    counts = torch.randint(0, 9, (batch, heads, columns), generator=draw).int()
    return q, k, counts


def brute_force(q, k, counts, top_p, min_ratio):
    """One row at a time, in float64, by the rule as it is written."""
    columns = len(counts)
    mass = [
        n * math.exp(SCALE * (q.double() @ c.double()).item()) if n else 0.0
        for c, n in zip(k, counts.tolist(), strict=True)
    ]
    order = sorted(range(columns), key=lambda j: -mass[j])
    kept, total = [], 0.0
    for rank, j in enumerate(order):
        if rank >= max(1, int(min_ratio * columns)) and total > top_p * sum(mass):
            break
        if mass[j] > 0:
            kept.append(j)
        total += mass[j]
    return sorted(kept)


@pytest.mark.parametrize(("top_p", "min_ratio"), [(0.9, 0.1), (0.4, 0.5), (0.01, 0.0)])
def test_the_reference_keeps_what_the_rule_says(top_p, min_ratio):
    q, k, counts = case()
    found = reference.select_top_p(q, k, counts, scale=SCALE, top_p=top_p, min_ratio=min_ratio)
    for b in range(2):
        for i in range(5):
            begin, end = found.indptr[b, 0, i : i + 2].tolist()
            kept = found.indices[b, 0, begin:end].tolist()
            assert kept == brute_force(q[b, 0, i], k[b, 0], counts[b, 0], top_p, min_ratio)
            assert found.tokens[b, 0, i] == counts[b, 0, kept].sum()


@pytest.mark.parametrize(("top_p", "min_ratio"), [(0.9, 0.1), (0.4, 0.5), (0.01, 0.0), (1.0, 0.0)])
def test_the_kernel_equals_the_reference(top_p, min_ratio, device):
    q, k, counts = (x.to(device) for x in case())
    arguments = {"scale": SCALE, "top_p": top_p, "min_ratio": min_ratio}
    found = select_top_p(q, k, counts, **arguments, impl="triton")
    expected = reference.select_top_p(q, k, counts, **arguments)
    assert torch.equal(found.indptr, expected.indptr)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask(), expected.mask())
    kept = found.mask().sum(-1)
    filled = (counts > 0).sum(-1, keepdim=True)
    assert (kept >= 1).all()
    floor = torch.full_like(filled, max(1, int(min_ratio * 41)))
    assert (kept >= torch.minimum(floor, filled)).all()
    if top_p == 1.0:
        assert found.mask().all()


def test_more_columns_than_a_block(device):
    q, k, counts = (x.to(device) for x in case(rows=1, columns=300, batch=1))
    arguments = {"scale": SCALE, "top_p": 0.7, "min_ratio": 0.0}
    found = select_top_p(q, k, counts, **arguments, impl="triton")
    assert torch.equal(found.mask(), reference.select_top_p(q, k, counts, **arguments).mask())


def test_a_row_with_nan_takes_everything(device):
    q, k, counts = case(rows=2, batch=1)
    q[0, 0, 1, 0] = float("nan")
    for impl in ("reference", "triton"):
        arguments = {"scale": SCALE, "top_p": 0.1, "min_ratio": 0.0, "impl": impl}
        mask = select_top_p(q.to(device), k.to(device), counts.to(device), **arguments).mask()
        assert mask[0, 0, 1].all() and not mask[0, 0, 0].all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_row_with_a_score_that_is_not_finite_takes_everything(where, value, device):
    """Of -inf too: a query centroid may see -inf where one of its queries sees +inf."""
    q, k, counts = case(rows=3, batch=1)
    counts[0, 0, 7], counts[0, 0, 8] = 4, 0
    q[0, 0, 1, 5] = 0.0  # times infinity: NaN
    if where == "query":
        q[0, 0, 1, 0] = value
    else:
        k[0, 0, 7, 5] = value
    k[0, 0, 8] = value  # of an empty cluster: nobody sees it
    expected = torch.tensor([where == "key", True, where == "key"])
    masks = []
    for impl in ("reference", "triton"):
        arguments = {"scale": SCALE, "top_p": 0.1, "min_ratio": 0.0, "impl": impl}
        found = select_top_p(q.to(device), k.to(device), counts.to(device), **arguments)
        assert torch.equal(found.mask()[0, 0].all(-1).cpu(), expected)
        assert torch.equal((found.tokens[0, 0] == counts.sum()).cpu(), expected)
        masks.append(found.mask())
    assert torch.equal(*masks)


def test_mass_of_zero_is_never_taken_and_mass_of_nan_takes_everything(device):
    q, k, counts = (x.to(device) for x in case(rows=3, batch=1))
    mass = torch.rand(1, 1, 3, 41, generator=torch.Generator().manual_seed(0)).to(device)
    mass[0, 0, 0, ::2] = 0.0
    mass[0, 0, 1, 3] = math.nan
    counts[0, 0, 3] = 1
    masks = []
    for impl in ("reference", "triton"):
        arguments = {"scale": SCALE, "top_p": 0.99, "min_ratio": 1.0, "impl": impl}
        mask = select_top_p(q, k, counts, mass=mass, **arguments).mask()[0, 0]
        assert mask[1].all() and not mask[0, ::2].any()
        assert torch.equal(mask[2], counts[0, 0] > 0)
        masks.append(mask)
    assert torch.equal(*masks)


def test_extreme_scores_do_not_select_everything():
    """All but one mass underflow to 0; the floor still takes the next ones by their score."""
    q, k, counts = case(rows=1, batch=1)
    mask = reference.select_top_p(q * 1000, k, counts, scale=1.0, top_p=0.9, min_ratio=0.1).mask()
    assert mask.sum() == 4


def test_selection_grows_with_p():
    q, k, counts = case()
    sizes = [
        reference.select_top_p(q, k, counts, scale=SCALE, top_p=p, min_ratio=0.0).mask().sum()
        for p in (0.1, 0.5, 0.9, 1.0)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, float("nan")])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_share_outside_its_range_raises(top_p, impl):
    q, k, counts = case()
    with pytest.raises(KernelError, match=r"top_p must be in \(0, 1\]"):
        select_top_p(q, k, counts, scale=1.0, top_p=top_p, min_ratio=0.1, impl=impl)
    with pytest.raises(KernelError, match="min_ratio"):
        select_top_p(q, k, counts, scale=1.0, top_p=0.5, min_ratio=1.5, impl=impl)


def test_mass_over_queries_equals_one_query_per_cluster():
    q, k, counts = case()
    labels = torch.arange(5, dtype=torch.int32).expand(2, 1, 5).contiguous()
    mass = reference.query_mass(q, labels, 5, k, counts, SCALE)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 1, 5))
    arguments = {"scale": SCALE, "top_p": 0.8, "min_ratio": 0.0}
    plain = reference.select_top_p(q, k, counts, **arguments)
    by_mass = reference.select_top_p(q, k, counts, **arguments, mass=mass)
    assert torch.equal(plain.mask(), by_mass.mask())


@pytest.mark.parametrize("most", [1, 3, 7, 512])
def test_the_mass_of_a_large_cluster_is_that_of_a_sample(most, monkeypatch, device):
    """Against a plain loop, and the kernel against that; one cluster is empty."""
    monkeypatch.setattr(reference, "MASS_QUERIES", most)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 21, 64), torch.randn(1, 1, 5, 64)
    labels = torch.tensor([0] * 14 + [2] * 5 + [3, 3], dtype=torch.int32)
    labels = labels[torch.randperm(21)][None, None]
    counts = torch.tensor([[[4, 0, 1, 30, 2]]], dtype=torch.int32)
    expected = torch.zeros(1, 1, 3, 5)
    for cluster in range(3):
        own = (labels[0, 0] == cluster).nonzero()[:, 0]
        taken = min(len(own), most)
        for i in range(taken):
            scores = q[0, 0, own[i * len(own) // taken]] @ k[0, 0].T * SCALE
            expected[0, 0, cluster] += (scores + counts[0, 0].log()).softmax(0) / taken
    found = reference.query_mass(q, labels, 3, k, counts, SCALE)
    torch.testing.assert_close(found, expected)
    order, offsets = reference.sort_by_label(labels, 5)
    lists = (x.to(device) for x in (q, order, offsets, k, counts.float().log2()))
    logits = query_mass_logits(*lists, 3, SCALE)
    torch.testing.assert_close(logits.exp().cpu(), expected)
