"""Puts the linear layers of a transformer's blocks into low precision, and gives them back."""

import warnings
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn

from vidaccel.engine.report import PrecisionReport
from vidaccel.engine.run_settings import PRECISION
from vidaccel.errors import PrecisionError, VidaccelError
from vidaccel.hosts.spec import HostSpec
from vidaccel.precision.calibration import Calibration, TransformerCalibration
from vidaccel.precision.formats import FORMATS, Quantised, quantise
from vidaccel.precision.gptq import quantise_weight
from vidaccel.precision.kept import DROPPED, WeightKeeper
from vidaccel.precision.layers import Layer, linear_layers, why_left_alone
from vidaccel.precision.linear import QuantisedLinear
from vidaccel.precision.offload import offload_paused
from vidaccel.precision.rotations import (
    GROUPS,
    RotationPair,
    group_for,
    hadamard,
    rotated,
)
from vidaccel.precision.sequence import GridFinder, Sequence
from vidaccel.precision.settings import CALIBRATED, LowPrecision

# The largest group of a Hadamard rotation of formats with a scale per token, and of blocks.
_GROUP_OF_ROWS, _GROUP_OF_BLOCKS = 256, 16


def attachment_of(transformer: nn.Module) -> "PrecisionAttachment | None":
    """Return the low precision that a transformer is in, if any."""
    return vars(transformer).get(PRECISION)


class PrecisionAttachment:
    """The layers of one transformer in low precision.

    Args:
        transformer: the transformer.
        host: its row of the table.
        settings: the low precision.
        component: the name of the transformer in its pipeline, under which a calibration knows it.

    Raises:
        PrecisionError: it cannot be, or not on this device; nothing has been changed then.
    """

    def __init__(
        self, transformer: nn.Module, host: HostSpec, settings: LowPrecision, component: str
    ) -> None:
        self.settings = settings
        # Weak, since the transformer holds this: a cycle would keep its weights when it is dropped.
        self._weakly, self._host = weakref.ref(transformer), host
        self._form = FORMATS[settings.format]
        self._calibration: TransformerCalibration | None = None
        if settings.calibration is not None:
            self._calibration = Calibration.load(settings.calibration).of(component, transformer)
        self._finder = None if settings.sequence is None else GridFinder(transformer, host)
        self._keeper = WeightKeeper(settings.keep_weights)
        self._replaced: list[tuple[Layer, QuantisedLinear]] = []
        self._left: Counter[str] = Counter()
        self._hadamard: dict[tuple[int, torch.device], torch.Tensor] = {}  # all layers share one
        self._bytes = [0, 0]
        self._handle: Any = None
        _check_device(transformer, settings)
        linear_layers(transformer, host)

    @property
    def _transformer(self) -> nn.Module:
        transformer = self._weakly()
        assert transformer is not None
        return transformer

    def attach(self) -> None:
        """Quantise every layer; puts back what was done when one fails.

        Raises:
            PrecisionError: a weight is not finite, or cannot be kept on the disk.
        """
        with offload_paused(self._transformer):
            skip = self._skipped()
            try:
                for layer in linear_layers(self._transformer, self._host):
                    self._replace(layer, skip)
                if not self._replaced:
                    raise PrecisionError(
                        f"no layer of {type(self._transformer).__name__} would be in "
                        f"{self.settings.format}: {self._left_alone()}"
                    )
            except BaseException:
                self._put_back()
                raise
        if self._finder is not None:
            self._handle = self._transformer.register_forward_pre_hook(
                self._finder, with_kwargs=True
            )
        vars(self._transformer)[PRECISION] = self

    def settle(self) -> None:
        """Drop the weights if they are to be, now that all transformers are in low precision."""
        self._keeper.settle()
        if self._keeper.gone:
            warnings.warn(
                'keep_weights="drop": restore(pipe) will not be able to bring the weights back',
                stacklevel=4,
            )

    def check_return(self) -> None:
        """Find out whether `detach` can be; raises PrecisionError when weights were dropped."""
        if self._keeper.gone:
            raise PrecisionError(DROPPED)

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`.

        Raises:
            PrecisionError: the weights were dropped; nothing is changed.
        """
        self.check_return()
        with offload_paused(self._transformer):
            self._put_back()
        if self._handle is not None:
            self._handle.remove()
        del vars(self._transformer)[PRECISION]

    def report(self) -> PrecisionReport:
        """Tell which layers are in low precision, and what that saves."""
        before, after = self._bytes
        return PrecisionReport(
            settings=str(self.settings),
            layers=len(self._replaced),
            left_alone=dict(self._left),
            bytes_before=before,
            bytes_after=after,
            bytes_kept=self._keeper.bytes_held,
            kept_in=self.settings.keep_weights,
            notes=tuple(_notes(self._transformer, self.settings)),
        )

    def _skipped(self) -> tuple[str, ...]:
        """Return the parts of names of the layers that are left alone."""
        if self.settings.skip is not None:
            return self.settings.skip
        if self._calibration is None:
            return ()
        return self._calibration.sensitive(self.settings.format, self.settings.max_error)

    def _replace(self, layer: Layer, skip: tuple[str, ...]) -> None:
        """Put a layer into low precision, or note why not."""
        stock = layer.module
        self._bytes[0] += stock.weight.nbytes
        packed = self._form.bits == 4 and not self._form.floating
        if reason := why_left_alone(layer, skip, self._form.block, packed):
            self._left[reason] += 1
            self._bytes[1] += stock.weight.nbytes
            return
        weight = stock.weight.detach()
        if not weight.isfinite().all():
            raise PrecisionError(
                f"{layer.name} has a weight that is not finite, which no format can hold: load the "
                "pipeline again, or leave the layer alone with skip"
            )
        rotation = self._rotation(layer)
        quantised = QuantisedLinear(
            stock,
            self.settings,
            self._rounded(layer, weight.float(), rotation),
            rotation,
            self._sequence(),
            self._keeper,
        )
        quantised.put_in_place()
        setattr(layer.parent, layer.key, quantised)
        self._replaced.append((layer, quantised))
        self._bytes[1] += quantised.bytes_held

    def _sequence(self) -> Sequence | None:
        return None if self._finder is None else self._finder.sequence

    def _rotation(self, layer: Layer) -> RotationPair | None:
        """Return the matrices that the activations and the weight of a layer are multiplied by."""
        settings, channels = self.settings, layer.module.in_features
        if settings.rotation is None:
            return None
        if settings.rotation in CALIBRATED:
            assert self._calibration is not None
            return self._calibration.rotation(layer.module, layer.name, settings.rotation)
        most = settings.group or (_GROUP_OF_BLOCKS if self._form.block else _GROUP_OF_ROWS)
        size = settings.group or group_for(channels, most)
        if size is None or channels % size:
            raise PrecisionError(
                f"{layer.name} has {channels} channels, which are no whole groups of "
                f"{size or min(GROUPS)}: pass rotation=None, another group, or skip"
            )
        device = layer.module.weight.device
        if (size, device) not in self._hadamard:
            self._hadamard[size, device] = hadamard(size).to(device)
        matrix = self._hadamard[size, device]
        return RotationPair(matrix, matrix)

    def _rounded(
        self, layer: Layer, weight: torch.Tensor, rotation: RotationPair | None
    ) -> Quantised:
        """Return the weight of a layer in the format."""
        if rotation is not None:
            weight = rotated(weight, rotation.weights)
        if not self.settings.gptq:
            return quantise(weight, self._form)
        assert self._calibration is not None
        matrix = None if rotation is None else rotation.activations
        moment = self._calibration.moment(layer.module, layer.name, matrix)
        return quantise_weight(weight, self._form, moment)

    def _put_back(self) -> None:
        """Put the very layers back that were there."""
        while self._replaced:
            layer, quantised = self._replaced.pop()
            stock = quantised.give_back()
            # A layer that someone has put in the place since is theirs.
            if getattr(layer.parent, layer.key) is quantised:
                setattr(layer.parent, layer.key, stock)
            else:
                _put_under_adapter(layer, quantised, stock)

    def _left_alone(self) -> str:
        return ", ".join(f"{count} of them: {reason}" for reason, count in self._left.items())


def _put_under_adapter(layer: Layer, quantised: QuantisedLinear, stock: nn.Linear) -> None:
    """Put a layer back where an adapter has been put on top of it meanwhile."""
    adapter = getattr(layer.parent, layer.key)
    for parent in adapter.modules():
        for key, child in parent.named_children():
            if child is quantised:
                setattr(parent, key, stock)
                return


def _check_device(transformer: nn.Module, settings: LowPrecision) -> None:
    """Run the smallest layer of the format where the transformer is.

    Raises:
        PrecisionError: this device cannot.
    """
    found = next((p for p in transformer.parameters() if p.is_floating_point()), None)
    # Outlines have no numbers, and offloaded parts are not where they will run.
    if found is None or found.device.type == "meta":
        return
    form = FORMATS[settings.format]
    layer = nn.Linear(64, 64, device=found.device, dtype=found.dtype)
    plain = LowPrecision(format=settings.format, rotation=None)
    try:
        with torch.no_grad():
            held = quantise(layer.weight.float(), form)
            small = QuantisedLinear(layer, plain, held, None, None, WeightKeeper("cpu"))
            small(layer.weight)
    except (RuntimeError, TypeError, NotImplementedError, VidaccelError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PrecisionError(
            f"{settings.format} does not run on {found.device} in {found.dtype} ({reason}): take "
            "another format, or precision=None"
        ) from error


def _notes(transformer: nn.Module, settings: LowPrecision) -> list[str]:
    """Say what the numbers of a report do not."""
    device = next(transformer.parameters()).device
    if FORMATS[settings.format].floating:
        return [f"{settings.format} is for comparison: it saves memory and no time"]
    if device.type != "cuda":
        return [f"on {device.type} low precision saves memory and no time"]
    if torch.cuda.get_device_capability(device)[0] == 10:
        return ["the int8 units of sm_100 are slow: this saves memory, and likely no time"]
    return []
