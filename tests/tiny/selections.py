"""Ragged clusters with a random selection, for the kernels of sparse attention."""

import torch
from torch.nn.functional import pad

from vidaccel.kernels import reference
from vidaccel.kernels.common import Selection

RAGGED = [0, 1, 15, 16, 17, 63, 2]


def offsets(sizes, batch=2):
    """[batch, 1, K + 1]; the second batch item has the sizes in reverse."""
    sizes = torch.tensor(sizes)
    both = torch.stack([sizes, sizes.flip(0)])[:batch, None]
    return pad(both.cumsum(-1), (1, 0)).int()


def case(head_dim=64, dtype=torch.float32, q_sizes=(0, 5, 1, 20), k_sizes=RAGGED, seed=0, batch=2):
    torch.manual_seed(seed)
    q = torch.randn(batch, 1, sum(q_sizes), head_dim).to(dtype)
    k = torch.randn(batch, 1, sum(k_sizes), head_dim).to(dtype)
    v = torch.randn(batch, 1, sum(k_sizes), head_dim).to(dtype)
    mask = torch.rand(batch, 1, len(q_sizes), len(k_sizes)) < 0.5
    ends_q, ends_k = offsets(q_sizes, batch), offsets(k_sizes, batch)
    selection = reference.selection_from_mask(mask, ends_k.diff())
    return (q, k, v, ends_q, ends_k, selection), mask


def to(arguments, device):
    moved = [x.to(device) for x in arguments[:5]]
    lists = arguments[5]
    return (
        *moved,
        Selection(lists.indptr.to(device), lists.indices.to(device), lists.tokens.to(device)),
    )


def element_mask(q_ends, k_ends, mask):
    """[B, H, Sq, Sk] from cluster sizes, without any code of the package."""
    out = []
    for b in range(mask.shape[0]):
        rows = mask[b, 0].repeat_interleave(q_ends[b, 0].diff().long(), 0)
        out.append(rows.repeat_interleave(k_ends[b, 0].diff().long(), 1))
    return torch.stack(out)[:, None]
