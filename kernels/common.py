"""Shared by all kernels on the host: the selection, and one message for each kind of bad input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidaccel.errors import VidaccelError

Impl = Literal["auto", "triton", "reference"]

HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = 80  # chips before lack bfloat16 products and shared memory for the tiles
# Programs on the second axis of a grid; queries and keys share it where both are clustered.
MAX_GRID_Y = 65_535
MAX_BATCH_HEADS = MAX_GRID_Y // 2


class KernelError(VidaccelError):
    """A kernel was called with tensors or settings that it cannot honour."""


@dataclass(frozen=True)
class Selection:
    """The key clusters that every query cluster attends to: lists on the device, no host copy.

    Row i of batch item b and head h is `indices[b, h, indptr[b, h, i]:indptr[b, h, i + 1]]`, in
    ascending order. What lies behind `indptr[b, h, -1]` has no meaning.

    Attributes:
        indptr: [B, H, Qc + 1] int32.
        indices: [B, H, Qc * Kc] int32: room for everything, so that no length reaches the host.
        tokens: [B, H, Qc] int32, the keys that each row selects.
    """

    indptr: Tensor
    indices: Tensor
    tokens: Tensor

    @property
    def num_queries(self) -> int:
        """Number of query clusters, Qc."""
        return self.indptr.shape[2] - 1

    @property
    def num_keys(self) -> int:
        """Number of key clusters, Kc."""
        return self.indices.shape[2] // max(self.num_queries, 1)

    def mask(self) -> Tensor:
        """Return the same as a dense [B, H, Qc, Kc] boolean tensor."""
        batch, heads, num_queries = self.tokens.shape
        size = self.indices.shape[2]
        entry = torch.arange(size, device=self.indices.device).expand(batch, heads, size)
        row = torch.searchsorted(
            self.indptr[..., 1:].long().contiguous(), entry.contiguous(), right=True
        )
        used = entry < self.indptr[..., -1:]
        row = torch.where(used, row, num_queries)
        column = torch.where(used, self.indices.long(), 0)
        flat = torch.zeros(
            batch, heads, (num_queries + 1) * self.num_keys, dtype=torch.bool, device=row.device
        )
        flat.scatter_(2, row * self.num_keys + column, used)
        return flat.view(batch, heads, num_queries + 1, self.num_keys)[:, :, :num_queries]


def density(selected_keys: Tensor, q_counts: Tensor, num_keys: int | Tensor) -> Tensor:
    """Return the computed share of all query-key pairs of every head.

    Args:
        selected_keys: [..., Qc] keys that each query cluster attends to, `Selection.tokens`.
        q_counts: [..., Qc] queries of each cluster.
        num_keys: number of keys, one for all heads or [...].

    Returns:
        [...] float64.
    """
    pairs = (selected_keys.double() * q_counts.double()).sum(-1)
    return pairs / (q_counts.double().sum(-1) * num_keys)


def resolve(impl: Impl, *tensors: Tensor | None) -> str:
    """Return "triton" or "reference" for these inputs, all floating-point ones among them.

    Raises:
        KernelError: the name is unknown, or Triton is wanted where it cannot run, or for inputs
            whose gradients it would lose.
    """
    if impl not in ("auto", "triton", "reference"):
        raise KernelError(f'impl must be "auto", "triton" or "reference", found {impl!r}')
    given = [x for x in tensors if x is not None]
    device = given[0].device
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return "reference"
    if device.type != "cuda":
        if not interpreting():
            raise KernelError(f"Triton kernels need a GPU, found tensors on {device}")
    elif reason := why_no_kernels(device):
        raise KernelError(f'{reason}; impl="reference" runs everywhere')
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise KernelError(
            "Triton kernels have no backward pass, and an input requires a gradient: call them "
            'under torch.no_grad(), or pass impl="reference"'
        )
    return "triton"


def why_no_kernels(device: torch.device) -> str:
    """Return why the Triton kernels cannot run on a device; empty when they can."""
    if device.type != "cuda" or torch.version.hip:
        kind = "AMD" if device.type == "cuda" else device.type
        return f"the kernels have been shown to run on NVIDIA GPUs alone, and this is {kind}"
    major, minor = torch.cuda.get_device_capability(device)
    try:
        check_chip(major * 10 + minor)
    except KernelError as error:
        return str(error)
    try:
        import vidaccel.kernels.semantic_attention_triton  # noqa: F401 (all kernels)
    except Exception as error:  # another version of Triton may fail in any way
        return f"the kernels need Triton, which cannot be imported ({error})"
    return ""


def check_chip(capability: int) -> None:
    """Refuse a chip of a compute capability, such as 75, that the kernels are not made for."""
    if capability < LEAST_CAPABILITY:
        least, found = (f"{x // 10}.{x % 10}" for x in (LEAST_CAPABILITY, capability))
        raise KernelError(f"the kernels need compute capability {least}, and this GPU has {found}")


def interpreting() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on the CPU."""
    try:
        from vidaccel.kernels import tiles
    except ImportError:  # Triton is not installed
        return False
    return tiles.interpreting()


def rows_contiguous(x: Tensor) -> Tensor:
    """Return the same values with the elements of a row side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def check_layout(name: str, x: Tensor, *, reference: bool, head_dim: bool = True) -> None:
    """Refuse what is not [B, H, S, D] in a dtype and head dimension that the kernels take."""
    if x.dim() != 4:
        raise KernelError(f"{name} must be [batch, heads, tokens, dim], found {list(x.shape)}")
    if 0 in x.shape:
        raise KernelError(f"{name} must hold something, found shape {list(x.shape)}")
    if not x.is_floating_point() or (not reference and x.dtype not in DTYPES):
        raise KernelError(f"{name} must be float16, bfloat16 or float32, found {x.dtype}")
    if not reference and head_dim and x.shape[-1] not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise KernelError(f"the head dimension of {name} must be one of {known}: {x.shape[-1]}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *dims: int) -> None:
    """Refuse a tensor of another device or of another size in the given dimensions."""
    if x.device != other.device:
        raise KernelError(f"{name} is on {x.device}, but {other_name} on {other.device}")
    for dim in dims:
        if x.shape[dim] != other.shape[dim]:
            raise KernelError(
                f"{name} {list(x.shape)} and {other_name} {list(other.shape)} differ in "
                f"dimension {dim}"
            )


def check_integers(name: str, x: Tensor, dims: int) -> None:
    """Refuse what is not an int32 tensor of so many dimensions."""
    if x.dtype != torch.int32 or x.dim() != dims:
        raise KernelError(
            f"{name} must be int32 with {dims} dimensions, found {x.dtype} {list(x.shape)}"
        )


def check_clusters(count: int, tokens: int, what: str) -> None:
    """Refuse a number of clusters that the tokens cannot fill."""
    if not 1 <= count <= tokens:
        raise KernelError(f"{count} {what} clusters do not fit {tokens} tokens")


def check_top_p(top_p: float, min_ratio: float) -> None:
    """Refuse a share of mass outside (0, 1] or a floor outside [0, 1]."""
    if not 0.0 < top_p <= 1.0:
        raise KernelError(f"top_p must be in (0, 1], found {top_p}")
    if not 0.0 <= min_ratio <= 1.0:
        raise KernelError(f"min_ratio must be in [0, 1], found {min_ratio}")
