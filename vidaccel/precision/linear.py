"""A linear layer in low precision, which stands in for an `nn.Linear` of a block.

Activations are rotated, mixed along the tokens and rounded at each call; weights were, once. It is
an `nn.Linear` to all who look (PEFT puts adapters on top of it), its `weight` can be read and not
written, and its state dict is that of the layer it stands for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vidaccel.errors import PrecisionError
from vidaccel.kernels.linear import (
    pack_int4,
    quantised_linear,
    rotate_quantise,
    token_haar,
    unpack_int4,
)
from vidaccel.precision.formats import (
    E4M3_MAX,
    FORMATS,
    Format,
    Quantised,
    dequantise,
    rounded,
)
from vidaccel.precision.kept import DROPPED, WeightKeeper
from vidaccel.precision.rotations import RotationPair, rotated
from vidaccel.precision.sequence import Sequence
from vidaccel.precision.settings import CALIBRATED, LowPrecision

_FUSED = (
    "the weights of this layer are held in low precision, and what is written to them would be "
    "lost: restore(pipe) first (fuse_lora and the like come before accelerate(precision=...))"
)


class QuantisedLinear(nn.Linear):
    """Stands in for a linear layer; takes and gives what that does.

    Args:
        stock: the layer; its weight is in place still, and its bias is shared.
        settings: the low precision.
        weight: the weight in the format, after the rotation.
        rotation: the matrices of the rotation; None for none.
        sequence: tells the video tokens of the running call; None where tokens are not mixed.
        keeper: has the weight of `stock` from when this layer is put in its place.

    Attributes:
        stock: the layer that this one stands for.
    """

    stock: nn.Linear
    codes: torch.Tensor
    scales: torch.Tensor
    rotation: torch.Tensor | None

    def __init__(
        self,
        stock: nn.Linear,
        settings: LowPrecision,
        weight: Quantised,
        rotation: RotationPair | None,
        sequence: Sequence | None,
        keeper: WeightKeeper,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which would make a weight
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.form: Format = FORMATS[settings.format]
        self.bias = stock.bias
        # Held out of sight of torch, which would move it with this layer.
        vars(self)["stock"] = stock
        self._settings, self._sequence, self._keeper = settings, sequence, keeper
        self._dtype = stock.weight.dtype
        self._packed = self.form.bits == 4 and not self.form.floating
        codes = pack_int4(weight.codes) if self._packed else weight.codes
        matrix = None if rotation is None else rotation.activations
        for name, tensor in (("codes", codes), ("scales", weight.scales), ("rotation", matrix)):
            self.register_buffer(name, tensor, persistent=False)
        # |T x| is at most this times the largest |x|.
        self._gain = 1.0 if matrix is None else float(matrix.abs().sum(-1).max())
        self.train(stock.training)
        # The very dictionaries, so that a hook put on either is on both, and can be taken off.
        vars(self).update({k: v for k, v in vars(stock).items() if k.endswith("_hooks")})

    @property
    def bytes_held(self) -> int:
        """Bytes of codes and scales, and of a rotation that no other layer has."""
        held = self.codes.nbytes + self.scales.nbytes
        if self.rotation is not None and self._settings.rotation in CALIBRATED:
            held += self.rotation.nbytes
        return held

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight [N, K] that this layer computes with, made of its codes; read-only."""
        codes = unpack_int4(self.codes) if self._packed else self.codes
        weight = dequantise(Quantised(codes, self.scales))
        if self.rotation is not None:
            # (W T⁻¹) T: the transpose of T, once more on each group.
            weight = rotated(weight, self.rotation.mT)
        return weight.to(self._dtype).as_subclass(_ReadOnly)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the layer's result [..., N] for activations [..., K]."""
        video = None
        if self._sequence is not None and input.dim() == 3:
            video = self._sequence.video(input.shape[1])
        if video is None:
            return self._product(input, self._high(input, None), self.bias)
        assert self._sequence is not None and self._sequence.grid is not None
        grid, (start, stop) = self._sequence.grid, video
        mixed = _on_video(input, start, stop, grid, inverse=False)
        out = self._product(mixed, self._high(input, video), None)
        out = _on_video(out, start, stop, grid, inverse=True)
        return out if self.bias is None else out + self.bias

    def _high(self, x: torch.Tensor, video: tuple[int, int] | None) -> torch.Tensor | None:
        """Return [rows] bool, the rows in 8 bits of a format of 4; None: none, or all formats."""
        if self.form.bits == 8 or self.form.floating:
            return None
        tokens = x.shape[-2] if x.dim() > 1 else 1
        if self._settings.sequence is None:
            if not self._settings.high_tokens:
                return None
            return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        high = torch.ones(tokens, dtype=torch.bool, device=x.device)  # text
        if video is not None:
            start, stop = video
            high[start + self._settings.high_of(stop - start) : stop] = False
        return high.expand(x.shape[:-1]).flatten()

    def _product(
        self, x: torch.Tensor, high: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the rounded activations times the weight."""
        form = self.form
        if form.floating:
            if self.rotation is not None:
                x = rotated(x, self.rotation.to(x.dtype))
            weight = dequantise(Quantised(self.codes, self.scales), x.dtype)
            return functional.linear(rounded(x, form), weight, bias)
        whole = None
        if form.scale == "e4m3":
            largest = x.abs().amax().float() if x.numel() else x.new_ones((), dtype=torch.float32)
            whole = largest * (self._gain / (form.largest * E4M3_MAX))
            whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        codes, scales = rotate_quantise(
            x,
            qmax=int(form.largest),
            block=form.block,
            scale_format=form.scale,
            tensor_scale=whole,
            rotation=self.rotation,
            high=high,
        )
        out: torch.Tensor = quantised_linear(
            codes,
            scales,
            self.codes,
            self.scales,
            bias,
            block=form.block,
            packed=self._packed,
            out_dtype=x.dtype,
        )
        return out

    def put_in_place(self) -> None:
        """Put the weight of the stock layer away; raises PrecisionError where that cannot be."""
        self._keeper.put_away(self.stock.get_parameter("weight"))

    def give_back(self) -> nn.Linear:
        """Return the stock layer with its weight, on the device and of the type of this one."""
        weight = self.stock.get_parameter("weight")
        self._keeper.give_back(weight, self.codes.device, self._dtype)
        self.stock.bias = self.bias
        self.stock.train(self.training)
        return self.stock

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """Move with the model: codes and scales change their device, and never their type."""
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.codes.device)).dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Tell the weight of the stock layer, so that what is saved can be loaded by anybody."""
        if self._keeper.gone:
            raise PrecisionError(DROPPED)
        weight = self.stock.weight if keep_vars else self.stock.weight.detach()
        destination[f"{prefix}weight"] = weight.to(self._dtype)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse weights of this layer; those of adapters around it are theirs."""
        if f"{prefix}weight" in state_dict:
            raise PrecisionError(f"cannot load {prefix}weight: {_FUSED}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show sizes and format, in torch's way."""
        return f"{super().extra_repr()}, {self._settings.format}"


class _ReadOnly(torch.Tensor):
    """A tensor that is no one's storage: writing to it raises, so that nothing is silently lost."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(getattr(func, "__name__", ""))
        writes = name in ("__set__", "__setitem__")
        writes |= name.endswith("_") and not name.endswith("__")
        if writes or (name.startswith("__i") and name.endswith("__") and name != "__index__"):
            raise PrecisionError(_FUSED)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # `weight.data += ...` writes to what this gives.
        if isinstance(result, torch.Tensor) and name in ("__get__", "detach"):
            return result.as_subclass(cls)
        return result


def _on_video(
    x: torch.Tensor, start: int, stop: int, grid: tuple[int, int, int], *, inverse: bool
) -> torch.Tensor:
    """Transform the video tokens of a sequence [B, S, K], and leave those of text."""
    whole = stop - start == x.shape[1]
    mixed: torch.Tensor = token_haar(
        x if whole else x[:, start:stop].contiguous(), grid, inverse=inverse
    )
    return mixed if whole else torch.cat([x[:, :start], mixed, x[:, stop:]], 1)
