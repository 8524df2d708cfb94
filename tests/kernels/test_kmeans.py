"""k-means: the reference against scikit-learn, the kernels against the reference."""

import pytest
import torch
from sklearn.cluster import KMeans

from vidaccel.kernels import reference
from vidaccel.kernels.common import KernelError
from vidaccel.kernels.kmeans import Lloyd, kmeans

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def points(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_reference_is_lloyds_algorithm():
    x = points(1, 1, 500, 16).double()
    start = reference.initial_centroids(x, 9)
    for rounds in (1, 4, 300):
        centroids, labels, counts = reference.kmeans(x, start, rounds)
        fitted = KMeans(9, init=start[0, 0].numpy(), n_init=1, max_iter=rounds, tol=0.0)
        fitted.fit(x[0, 0].numpy())
        if rounds == 300:  # converged: labels and centroids agree with each other in both
            inertia = (x[0, 0] - centroids[0, 0][labels[0, 0].long()]).square().sum()
            assert inertia.item() == pytest.approx(fitted.inertia_, rel=1e-9)
            assert (labels[0, 0].numpy() == fitted.labels_).all()
        theirs = torch.tensor(fitted.cluster_centers_)
        torch.testing.assert_close(centroids[0, 0], theirs, rtol=1e-9, atol=1e-9)
        assert counts.sum() == 500


def test_inertia_never_rises():
    x = points(2, 2, 300, 8).double()
    centroids = reference.initial_centroids(x, 12)
    last = torch.inf
    for _ in range(6):
        centroids, labels, _ = reference.kmeans(x, centroids, 1)
        chosen = centroids.gather(2, labels.long()[..., None].expand(2, 2, 300, 8))
        inertia = (x - chosen).square().sum().item()
        assert inertia <= last + 1e-9
        last = inertia


def test_an_empty_cluster_stays_and_first_centroids_differ():
    x = points(1, 1, 60, 64)
    start = reference.initial_centroids(x, 60)
    assert len({tuple(row) for row in start[0, 0].tolist()}) == 60
    start = torch.cat([start[:, :, :5], start[:, :, :1] + 100], 2)  # the last is far from all
    centroids, labels, counts = reference.kmeans(x, start, 2)
    assert counts[0, 0, 5] == 0 and (labels != 5).all()
    torch.testing.assert_close(centroids[0, 0, 5], start[0, 0, 5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "clusters", "head_dim"), [(70, 35, 80), (33, 33, 96)])
def test_the_kernels_equal_the_reference(dtype, tokens, clusters, head_dim, device):
    x = points(2, 1, tokens, head_dim, dtype=dtype).to(device)
    start = reference.initial_centroids(x, clusters)
    start[:, :, 3] = 100.0  # far from everything
    centroids, labels, counts = kmeans(x, start, 1, impl="triton")
    expected, expected_labels, expected_counts = reference.kmeans(x, start, 1)
    if device.type == "cpu":
        assert torch.equal(labels, expected_labels) and torch.equal(counts, expected_counts)
        torch.testing.assert_close(centroids, expected, rtol=1e-5, atol=1e-5)
    rounded = start.to(dtype).double()
    distance = torch.cdist(x.double(), rounded)
    chosen = distance.gather(3, labels.long()[..., None])[..., 0]
    assert (chosen <= distance.amin(-1) + 1e-4).all()
    assert torch.equal(counts, reference.cluster_counts(labels, clusters))
    assert counts[:, :, 3].sum() == 0
    again = kmeans(x, start, 1, impl="triton")
    for one, two in zip((centroids, labels, counts), again, strict=True):
        assert torch.equal(one, two)


def test_tiles_of_tokens_and_of_centroids_are_all_seen(device):
    x = points(1, 1, 150, 128).to(device)
    start = reference.initial_centroids(x, 70)
    centroids, labels, _ = kmeans(x, start, 0, impl="triton")
    assert torch.equal(centroids, start.float())
    assert torch.equal(labels, reference.kmeans(x, start, 0)[1])


def test_planted_clusters_are_found(device):
    truth = torch.arange(40) % 5
    x = (points(5, 64, seed=1)[truth] * 10 + points(40, 64) * 0.1)[None, None].to(device)
    _, labels, counts = kmeans(x, x[:, :, :5].float(), 2, impl="triton")
    assert torch.equal(labels[0, 0].cpu().long(), truth) and (counts == 8).all()


def test_strided_tokens_and_one_token(device):
    x = points(1, 40, 2, 64).transpose(1, 2).to(device)  # [1, 2, 40, 64], as hosts have it
    start = reference.initial_centroids(x, 4)
    found = kmeans(x, start, 1, impl="triton")
    assert torch.equal(found[1], reference.kmeans(x, start, 1)[1])
    one = points(1, 1, 1, 64).to(device)
    centroids, labels, counts = kmeans(one, one, 1, impl="triton")
    assert torch.equal(centroids, one) and labels.item() == 0 and counts.item() == 1


def test_nan_tokens_get_a_valid_label(device):
    x = points(1, 1, 20, 64)
    x[0, 0, 7, 3] = float("nan")
    x = x.to(device)
    start = reference.initial_centroids(points(1, 1, 20, 64).to(device), 4)
    for impl in ("triton", "reference"):
        labels = kmeans(x, start, 0, impl=impl)[1]
        assert labels[0, 0, 7] == 0 and labels.min() >= 0 and labels.max() < 4


def test_bad_input_raises():
    x = points(1, 1, 8, 64)
    with pytest.raises(KernelError, match="9 k-means clusters do not fit 8 tokens"):
        kmeans(x, points(1, 1, 9, 64), 1)
    with pytest.raises(KernelError, match="rounds must be 0 or more"):
        kmeans(x, x, -1)
    with pytest.raises(KernelError, match=r"\[batch, heads, tokens, dim\]"):
        kmeans(x[0], x, 1)
    with pytest.raises(KernelError, match="differ in dimension 3"):
        kmeans(x, points(1, 1, 4, 32), 1)
    with pytest.raises(KernelError, match=r"found torch\.int64"):
        kmeans(x.long(), x, 1, impl="triton")
    with pytest.raises(KernelError, match="must be one of 64, 80, 96, 128: 32"):
        kmeans(points(1, 1, 8, 32), points(1, 1, 4, 32), 1, impl="triton")
    with pytest.raises(KernelError, match='impl must be "auto"'):
        kmeans(x, x, 1, impl="cuda")
    with pytest.raises(KernelError, match="hold something"):
        kmeans(x[:, :, :0], x, 1)


def test_buffers_are_flat_per_side():
    x = points(1, 2, 30, 64)
    lloyd = Lloyd.start([x, x], [x[:, :, :3], x[:, :, :5]])
    assert lloyd.side_centroids(0).shape == (1, 2, 3, 64)
    assert torch.equal(lloyd.side_centroids(1), x[:, :, :5])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_tokens_that_are_not_finite_get_the_same_labels(value, device):
    """Also beside distances that are infinite, or no number; the lowest index among equals."""
    x = points(1, 1, 40, 64)
    x[0, 0, 3, 5] = value
    x[0, 0, 4] = value
    x[0, 0, 5, :2] = torch.tensor([torch.inf, -torch.inf])
    start = x[:, :, [3, 4, 10, 11, 12]].clone()
    start[0, 0, 2, 5] = 0.0
    for first in (start, start.roll(2, dims=2)):
        found = kmeans(x.to(device), first.to(device), 3, impl="triton")
        expected = reference.kmeans(x, first, 3)
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(ours.cpu(), theirs)
        torch.testing.assert_close(found[0].cpu(), expected[0], equal_nan=True)
