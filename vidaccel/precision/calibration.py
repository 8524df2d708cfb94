"""The file of a calibration: rotations and statistics of the activations of a pipeline's layers."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vidaccel.errors import PrecisionError
from vidaccel.files import write_bytes
from vidaccel.precision.rotations import RotationPair, on_all_channels, pair_of

SCHEMA = 1
_KEY = "vidaccel"  # of the metadata
_KINDS = ("dart", "wush", "moment")


@dataclass(frozen=True)
class Calibration:
    """The statistics of the layers of one transformer, or of all of a pipeline.

    Layers that are given the same activations share what is kept, under the name of the first.

    Attributes:
        transformers: component -> class of the transformer.
        leaders: component -> layer -> the layer under whose name its activations are.
        tensors: "component/layer/kind" -> "dart" [G, G] and "wush" [K / G, G, G], the matrices of
            rotations, or "moment" [K / M, M, M], means of x xᵀ of groups of M channels.
        sensitivity: component -> format -> layer -> relative error of the transformer's output
            when this layer alone is in that format.
        made: prompts, steps and versions it was made with.
    """

    transformers: Mapping[str, str]
    leaders: Mapping[str, Mapping[str, str]]
    tensors: Mapping[str, torch.Tensor]
    sensitivity: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file.

        Raises:
            PrecisionError: it is not there, or no calibration.
        """
        try:
            with safe_open(os.fspath(path), "pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if told["schema"] != SCHEMA:
                raise PrecisionError(
                    f"calibration {path} has schema {told['schema']!r}, this vidaccel reads "
                    f"{SCHEMA}: make it again"
                )
            if not all(isinstance(told[name], dict) for name in ("transformers", "leaders")):
                raise ValueError("no table of layers")
            return cls(
                told["transformers"],
                told["leaders"],
                tensors,
                told.get("sensitivity", {}),
                told.get("made", {}),
            )
        except FileNotFoundError as error:
            raise PrecisionError(
                f"there is no calibration {path}: make one with "
                "vidaccel.calibrate_precision(pipe, prompts, file)"
            ) from error
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise PrecisionError(f"{path} is no calibration of low precision: {reason}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all.

        Raises:
            PrecisionError: it cannot be written.
        """
        told = {
            "schema": SCHEMA,
            "transformers": self.transformers,
            "leaders": self.leaders,
            "sensitivity": self.sensitivity,
            "made": self.made,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        data = save(tensors, {_KEY: json.dumps(told, sort_keys=True)})
        try:
            write_bytes(Path(path), data)
        except OSError as error:
            raise PrecisionError(f"cannot write {path}: {error.strerror}") from error

    def of(self, component: str, transformer: nn.Module) -> "TransformerCalibration":
        """Return the part of one transformer.

        Raises:
            PrecisionError: it was made of another one.
        """
        kind = type(transformer).__name__
        if self.transformers.get(component) != kind:
            known = ", ".join(f"{name} ({cls})" for name, cls in self.transformers.items())
            raise PrecisionError(
                f"the calibration is of {known or 'nothing'}, and this pipeline has {component} "
                f"({kind}): make one with vidaccel.calibrate_precision(pipe, prompts, file)"
            )
        return TransformerCalibration(self, component)


@dataclass(frozen=True)
class TransformerCalibration:
    """The part of a calibration that is of one transformer."""

    whole: Calibration
    component: str

    def sensitive(self, name: str, most: float) -> tuple[str, ...]:
        """Return the layers of which a format alone causes a larger error, as parts of names."""
        known = self.whole.sensitivity.get(self.component, {}).get(name, {})
        return tuple(f"{layer}." for layer, error in known.items() if not error <= most)

    def rotation(self, layer: nn.Linear, name: str, kind: str) -> RotationPair:
        """Return the matrices of a "dart" or "wush" rotation of a layer.

        Raises:
            PrecisionError: there are none that fit.
        """
        matrix = self._tensor(layer, name, kind)
        device = layer.weight.device
        forward, inverse = pair_of(matrix)
        return RotationPair(forward.to(device), inverse.to(device))

    def moment(self, layer: nn.Linear, name: str, rotation: torch.Tensor | None) -> torch.Tensor:
        """Return the means of x xᵀ [K / M, M, M] of the rotated activations of a layer.

        Raises:
            PrecisionError: they are not in the file, or of groups that the rotation does not fit.
        """
        moment = self._tensor(layer, name, "moment").double()
        if rotation is None:
            return moment
        size = moment.shape[-1]
        if size % rotation.shape[-1]:
            raise PrecisionError(
                f"the calibration has moments of {size} channels of {name}, which are no whole "
                f"groups of {rotation.shape[-1]}: make it again, or take another group"
            )
        rotation = rotation.double().cpu()
        if rotation.dim() == 2:
            whole = on_all_channels(rotation, size)
        else:
            per_group = size // rotation.shape[-1]
            some = torch.split(rotation, per_group)
            whole = torch.stack([on_all_channels(matrices, size) for matrices in some])
        return whole @ moment @ whole.mT

    def _tensor(self, layer: nn.Linear, name: str, kind: str) -> torch.Tensor:
        leader = self.whole.leaders.get(self.component, {}).get(name, name)
        tensor = self.whole.tensors.get(f"{self.component}/{leader}/{kind}")
        if tensor is None:
            missing = "moments=True" if kind == "moment" else "the layers that there are now"
            raise PrecisionError(
                f"the calibration holds no {kind} of {name}: make it again with {missing}"
            )
        channels, size = layer.in_features, tensor.shape[-1]
        shared = tensor.dim() == 2 and channels % size == 0
        if not shared and tensor.shape[0] * size != channels:
            raise PrecisionError(
                f"the calibration has {list(tensor.shape)} for {name}, which has {channels} "
                "channels: it is of another model"
            )
        if tensor.shape[-2] != size or not tensor.isfinite().all():
            raise PrecisionError(
                f"the calibration of {name} is damaged: make it again with another prompt"
            )
        return tensor
