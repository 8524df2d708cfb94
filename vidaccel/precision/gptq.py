"""Weights rounded one channel after another, each making up for the errors of those before (GPTQ).

arXiv 2210.17323, section 3: the error of a rounded channel is spread over the channels to come so
that the output on the activations of a calibration changes least.
"""

import torch

from vidaccel.precision.formats import Format, Quantised, quantise, scales_of, tensor_scale_of

# What is added to the diagonal of the second moment, a share of its mean.
DAMPING = 0.01


def quantise_weight(weight: torch.Tensor, form: Format, moment: torch.Tensor) -> Quantised:
    """Round a weight so that its product with the activations of a calibration changes least.

    Errors are spread within groups of channels, those of which the moment is known.

    Args:
        weight: [N, K].
        form: the format.
        moment: [K / M, M, M] means of x xᵀ over the activations, in the channels of the weight;
            M is a multiple of the block, or K for a scale per row.
    """
    size = moment.shape[-1]
    whole = tensor_scale_of(weight, form)
    scales = None if form.block else scales_of(weight, form)
    parts = [
        _group(some, form, one.to(some.device), whole, scales)
        for some, one in zip(torch.split(weight.double(), size, 1), moment, strict=True)
    ]
    if scales is None:
        scales = torch.cat([part.scales for part in parts], 1)
    return Quantised(torch.cat([part.codes for part in parts], 1), scales)


def _group(
    left: torch.Tensor,
    form: Format,
    moment: torch.Tensor,
    whole: torch.Tensor | None,
    row_scales: torch.Tensor | None,
) -> Quantised:
    """Round the channels of one group.

    Args:
        left: [N, M] float64, what is still to be rounded; it is changed.
        form: the format.
        moment: [M, M].
        whole: the scale of the tensor, if the format has one.
        row_scales: [N, 1] where the format has a scale per row.
    """
    left = left.clone()
    channels = left.shape[1]
    block = form.block or channels
    damping = DAMPING * moment.diagonal().mean().clamp_min(1e-24)
    moment = moment + damping * torch.eye(channels, dtype=left.dtype, device=left.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    spread = torch.linalg.cholesky(inverse, upper=True)
    codes, scales = [], []
    for start in range(0, channels, block):
        stop = start + block
        own = left[:, start:stop].float()
        scale = scales_of(own, form, whole) if row_scales is None else row_scales  # [N, 1]
        scales.append(scale)
        errors = torch.zeros_like(left[:, start:stop])
        for channel in range(start, stop):
            column = left[:, channel : channel + 1]
            code, _ = quantise(column.float(), form, scales=scale)
            codes.append(code)
            error = (column - code.float() * scale) / spread[channel, channel]
            left[:, channel:stop] -= error * spread[channel, channel:stop]
            errors[:, channel - start] = error[:, 0]
        # What later blocks owe to this one, in one product.
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return Quantised(torch.cat(codes, 1), torch.cat(scales, 1))
