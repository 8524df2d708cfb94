"""Rotations of groups of channels that spread outliers before numbers are rounded.

y = x Wᵀ = (x Tᵀ)(W T⁻¹)ᵀ: activations are multiplied by a matrix T on each group of channels, and
weights by its inverse, once. T is orthogonal (regular Hadamard, DartQuant) or made for activations
and weights at once (WUSH).
"""

import math
from typing import NamedTuple

import torch

from vidaccel.errors import PrecisionError

# Sylvester's matrix has a row of ones, in which a constant piles up: 14.5 becomes 106 there
# (ConvRot, arXiv 2512.03673). All rows of this one have the sum 2.
_REGULAR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
GROUPS = (256, 64, 16, 4)
# The least energy of a direction of activations, a share of the mean.
_LEAST_ENERGY = 1e-4


class RotationPair(NamedTuple):
    """The matrices of a rotation, [G, G] for all groups or [K / G, G, G] for one each.

    Attributes:
        activations: T, which each group of an activation row is multiplied by.
        weights: T⁻ᵀ, by which each group of a row of weights is.
    """

    activations: torch.Tensor
    weights: torch.Tensor


def hadamard(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the regular Hadamard matrix of a power of 4, divided so that it is orthogonal.

    Raises:
        PrecisionError: the size is no power of 4.
    """
    matrix, regular = torch.ones(1, 1, dtype=torch.float64), torch.tensor(_REGULAR)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, regular.double())
    if matrix.shape[0] != size:
        raise PrecisionError(f"a regular Hadamard matrix has 4, 16, 64, 256 ... rows, found {size}")
    return (matrix / math.sqrt(size)).to(dtype)


def group_for(channels: int, wanted: int) -> int | None:
    """Return the largest group that is not above `wanted` and divides the channels; None: none."""
    return next((size for size in GROUPS if size <= wanted and channels % size == 0), None)


def rotated(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply each group of channels by its matrix.

    Args:
        x: [..., K].
        matrix: [G, G], or [K / G, G, G] with one matrix per group.
    """
    size = matrix.shape[-1]
    groups = x.reshape(-1, x.shape[-1] // size, size)
    if matrix.dim() == 3:  # [K / G, N, G]: a product for each group
        return (groups.transpose(0, 1) @ matrix.mT).transpose(0, 1).reshape(x.shape)
    return (groups @ matrix.mT).reshape(x.shape)


def on_all_channels(matrix: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the matrix [K, K] that `rotated` multiplies all channels by."""
    size = matrix.shape[-1]
    blocks = matrix.expand(channels // size, size, size) if matrix.dim() == 2 else matrix
    whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def pair_of(transform: torch.Tensor) -> RotationPair:
    """Return a transform as activations of any type are multiplied by it, and its exact inverse.

    Args:
        transform: [G, G] or [K / G, G, G], invertible.
    """
    # Half precision would round it once more, and the weights would undo another transform.
    transform = transform.bfloat16().double()
    return RotationPair(transform.float(), torch.linalg.inv(transform).mT.float())


def whip(x: torch.Tensor) -> torch.Tensor:
    """Return the Whip loss of rows [N, G]: small where entries are of one size (DartQuant, 4.1)."""
    return x.abs().neg().exp().sum(-1).mean()


def dart(
    samples: torch.Tensor,
    *,
    epochs: int = 10,
    batch: int = 64,
    rate: float = 1.5e-3,
    momentum: float = 0.9,
    share: float = 0.1,
    seed: int = 0,
) -> torch.Tensor:
    """Learn the rotation that makes activations most uniform (DartQuant, arXiv 2511.04063).

    The rotation is the Q of the QR decomposition of a free matrix, so that it stays orthogonal
    without projections; the matrix starts as a Hadamard one with random signs.

    Args:
        samples: [N, G] rows of one group of channels.
        epochs, batch, rate, momentum: the stochastic gradient descent.
        share: share of the rows that an epoch draws.
        seed: seed of signs and draws.

    Returns:
        [G, G], orthogonal, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, size = samples.shape
    signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
    samples = samples.float()
    # The loss knows the size of its entries; those of a layer may be of any.
    samples = samples / samples.square().mean().sqrt().clamp_min(1e-12)
    with torch.enable_grad():
        free = (hadamard(size) * signs).requires_grad_()
        descent = torch.optim.SGD([free], lr=rate, momentum=momentum)
        for _ in range(epochs):
            drawn = torch.randperm(rows, generator=generator)[: max(int(share * rows), batch)]
            for some in torch.split(drawn, batch):
                descent.zero_grad()
                loss = whip(samples[some] @ _orthogonal(free).mT)
                loss.backward()  # type: ignore[no-untyped-call]
                descent.step()
        return _orthogonal(free).detach().clone()


def _orthogonal(free: torch.Tensor) -> torch.Tensor:
    """Return Q of free = Q R with a positive diagonal of R, so that it moves with `free`."""
    q, r = torch.linalg.qr(free)
    signed: torch.Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed


def wush(
    moment: torch.Tensor, weight: torch.Tensor, size: int, *, damping: float = 0.01
) -> RotationPair:
    """Return the transform that balances activations and weights of each group (WUSH).

    Of a group with second moment X Xᵀ and weights W, Xᵀ Wᵀ = V S Uᵀ; the transform H S^½ Vᵀ X⁻¹
    whitens activations, gives both sides the same spectrum and spreads it by a Hadamard matrix
    (arXiv 2512.00956, section 3). In float64.

    Args:
        moment: [K / G, G, G] means of x xᵀ over the activations of each group.
        weight: [R, K] weights of all layers that are given these activations.
        size: channels of a group, G.
        damping: what is added to each singular value, a share of their mean.

    Returns:
        Matrices [K / G, G, G], float32.

    Raises:
        PrecisionError: the statistics hold a number that is not finite.
    """
    moment, weight = moment.double(), weight.double()
    if not (moment.isfinite().all() and weight.isfinite().all()):
        raise PrecisionError(
            "the calibration holds numbers that are not finite: make it again with another prompt"
        )
    rows = weight.shape[0]
    spread = hadamard(size, torch.float64)
    forward = []
    for block, own in zip(moment, torch.split(weight, size, 1), strict=True):
        # Any root X of the moment gives the same transform, and this one exists where channels
        # depend on each other, or are never used.
        energy, axes = torch.linalg.eigh(block)
        energy = energy.clamp_min(_LEAST_ENERGY * float(energy.mean()) + 1e-24)
        root = axes * energy.sqrt()
        left, singular, _ = torch.linalg.svd(root.mT @ _gram_root(own))
        singular = singular / math.sqrt(rows)
        singular = singular + damping * singular.mean().clamp_min(1e-24)
        half = singular.sqrt()
        whiten = (axes / energy.sqrt()).mT  # X⁻¹
        transform = spread @ (half[:, None] * (left.mT @ whiten))
        forward.append(transform)
    return pair_of(torch.stack(forward))


def _gram_root(weight: torch.Tensor) -> torch.Tensor:
    """Return a square A [G, G] with A Aᵀ = Wᵀ W: Xᵀ A has the V and S of Xᵀ Wᵀ."""
    rows, size = weight.shape
    if rows < size:  # with rows of zeros, of which nothing follows
        weight = torch.cat([weight, weight.new_zeros(size - rows, size)])
    root: torch.Tensor = torch.linalg.qr(weight).R.mT
    return root
