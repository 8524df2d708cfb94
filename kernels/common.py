"""What every kernel shares: the selection, and one clear message for each kind of bad input."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from vidaccel.errors import VidaccelError

Impl = Literal["auto", "triton", "reference"]

HEAD_DIMS = (64, 80, 96, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KernelError(VidaccelError):
    """A kernel was called with tensors or settings that it cannot honour."""


@dataclass(frozen=True)
class Selection:
    """Which key clusters every query cluster attends to: lists on the device, without a host copy.

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
        """The same as a dense [B, H, Qc, Kc] boolean tensor."""
        batch, heads, rows = self.tokens.shape
        size = self.indices.shape[2]
        place = torch.arange(size, device=self.indices.device).expand(batch, heads, size)
        row = torch.searchsorted(
            self.indptr[..., 1:].long().contiguous(), place.contiguous(), right=True
        )
        used = place < self.indptr[..., -1:]
        row = torch.where(used, row, rows)
        column = torch.where(used, self.indices.long(), 0)
        flat = torch.zeros(
            batch, heads, (rows + 1) * self.num_keys, dtype=torch.bool, device=row.device
        )
        flat.scatter_(2, row * self.num_keys + column, used)
        return flat.view(batch, heads, rows + 1, self.num_keys)[:, :, :rows]


def density(selection: Selection, q_counts: Tensor, k_total: int) -> Tensor:
    """The computed share of all query-key pairs, per batch item and head: [B, H] fp32."""
    pairs = (selection.tokens.double() * q_counts.double()).sum(-1)
    return (pairs / (q_counts.double().sum(-1) * k_total)).float()


def resolve(impl: Impl, *tensors: Tensor) -> str:
    """ "triton" or "reference" for these inputs.

    Raises:
        KernelError: the name is unknown, or Triton is wanted where it cannot run.
    """
    if impl not in ("auto", "triton", "reference"):
        raise KernelError(f'impl must be "auto", "triton" or "reference", found {impl!r}')
    if impl == "auto":
        return "triton" if tensors[0].is_cuda else "reference"
    if impl == "triton" and not tensors[0].is_cuda and not interpreting():
        raise KernelError(f"Triton kernels need a GPU, found tensors on {tensors[0].device}")
    return impl


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    try:
        from triton.runtime.jit import JITFunction

        from vidaccel.kernels.sort import _scan
    except ImportError:
        return False
    return not isinstance(_scan, JITFunction)


def check_layout(name: str, x: Tensor, *, reference: bool, head_dim: bool = True) -> None:
    """Refuse what is not [B, H, S, D] in a dtype and width that the kernels take."""
    if x.dim() != 4:
        raise KernelError(f"{name} must be [batch, heads, tokens, dim], found {list(x.shape)}")
    if 0 in x.shape:
        raise KernelError(f"{name} must hold something, found shape {list(x.shape)}")
    if not x.is_floating_point() or (not reference and x.dtype not in DTYPES):
        raise KernelError(f"{name} must be float16, bfloat16 or float32, found {x.dtype}")
    if not reference and head_dim and x.shape[-1] not in HEAD_DIMS:
        widths = ", ".join(map(str, HEAD_DIMS))
        raise KernelError(f"the head dimension of {name} must be one of {widths}: {x.shape[-1]}")


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


def replace_device(selection: Selection, device: torch.device) -> Selection:
    """The selection on another device."""
    return Selection(**{f.name: getattr(selection, f.name).to(device) for f in fields(selection)})
