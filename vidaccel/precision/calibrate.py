"""Records the activations of a pipeline's layers, and makes rotations and sensitivities of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vidaccel.engine.engine import engine_of
from vidaccel.errors import PrecisionError
from vidaccel.files import check_writable
from vidaccel.hosts.registry import find_transformers
from vidaccel.precision.attachment import PrecisionAttachment, attachment_of
from vidaccel.precision.calibration import Calibration
from vidaccel.precision.layers import Layer, linear_layers
from vidaccel.precision.rotations import GROUPS, dart, group_for, wush
from vidaccel.precision.settings import LowPrecision

# Groups of channels, rows of them, that a DartQuant rotation is learned from.
SAMPLES = 4096
_PER_CALL = 64  # of each input in one call of the transformer
# Moments of all channels up to so many, of groups of 256 above.
_WHOLE = 512


def calibrate_precision(
    pipe: Any,
    prompts: Sequence[str | None],
    path: str | os.PathLike[str],
    *,
    group: int = 16,
    rotations: Sequence[Literal["dart", "wush"]] = ("wush",),
    moments: bool = False,
    sensitivity: Sequence[LowPrecision] = (),
    seed: int = 0,
    **call: Any,
) -> Calibration:
    """Make the calibration that `LowPrecision(calibration=path)` reads, from one run per prompt.

    Args:
        pipe: a pipeline that `accelerate` takes, without acceleration; it is left as it is.
        prompts: texts to generate from; None where `call` says it all.
        path: the file, .safetensors.
        group: channels that a rotation acts on: 4, 16, 64 or 256.
        rotations: those that are made: "dart", "wush".
        moments: keep what `gptq=True` needs, K x min(K, 256) numbers per input.
        sensitivity: settings of which the error that each layer alone causes is measured, with one
            call of the transformer per layer and setting; one setting per format.
        seed: seed of the noise, one more for each prompt.
        call: further arguments of the pipeline's call.

    Returns:
        The calibration, which is in the file too.

    Raises:
        PrecisionError: no prompt, an accelerated pipeline, activations that are not finite, or a
            group that does not divide the channels.
        OutputError: the file cannot be written.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise PrecisionError("a calibration needs a prompt: it is made of one generation or more")
    if group not in GROUPS:
        raise PrecisionError(f"group is one of {', '.join(map(str, GROUPS))}, found {group!r}")
    if unknown := [name for name in rotations if name not in ("dart", "wush")]:
        raise PrecisionError(f"rotations are of 'dart' and 'wush', found {unknown[0]!r}")
    check_writable(Path(path))
    recorders = {}
    for component, (transformer, host) in find_transformers(pipe).items():
        if engine_of(transformer) is not None or attachment_of(transformer) is not None:
            raise PrecisionError("the pipeline is accelerated: restore(pipe) before a calibration")
        layers = linear_layers(transformer, host)
        recorders[component] = _Recorder(transformer, layers, group, "dart" in rotations)
    with _all(recorders):
        for position, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed + position)
            told = {"output_type": "latent", **call}
            if prompt is not None:
                told["prompt"] = prompt
            pipe(generator=generator, **told)
    tensors: dict[str, torch.Tensor] = {}
    for component, recorder in recorders.items():
        for name, tensor in recorder.tensors(rotations, moments):
            tensors[f"{component}/{name}"] = tensor
    found = find_transformers(pipe)
    known: dict[str, dict[str, dict[str, float]]] = {
        component: {
            settings.format: _sensitivity(recorder, *found[component], settings, component)
            for settings in sensitivity
        }
        for component, recorder in recorders.items()
    }
    made = {
        "prompts": prompts,
        "seed": seed,
        "call": {name: repr(value) for name, value in call.items()},
        "group": group,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    calibration = Calibration(
        {component: type(r.transformer).__name__ for component, r in recorders.items()},
        {component: dict(recorder.leaders) for component, recorder in recorders.items()},
        tensors,
        known,
        made,
    )
    calibration.save(path)
    return calibration


class _Recorder:
    """Looks on while the layers of one transformer run.

    Args:
        transformer: the transformer.
        layers: its layers.
        group: channels of a rotation.
        samples: keep rows for DartQuant.

    Attributes:
        leaders: layer -> the first layer that was given the same tensor.
        calls: arguments of two calls of the transformer, one early and one late, and their results.
    """

    def __init__(
        self, transformer: nn.Module, layers: list[Layer], group: int, samples: bool
    ) -> None:
        for layer in layers:
            if layer.module.in_features % group:
                raise PrecisionError(
                    f"{layer.name} has {layer.module.in_features} channels, which are no whole "
                    f"groups of {group}: take another group"
                )
        self.transformer, self.layers, self._group = transformer, layers, group
        self.leaders: dict[str, str] = {}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = []
        self._samples: dict[str, list[torch.Tensor]] | None = {} if samples else None
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        self._handles: list[Any] = []
        self._count = 0

    def start(self) -> None:
        """Put hooks on all layers."""
        for layer in self.layers:
            hook = self._hook(layer.name)
            self._handles.append(layer.module.register_forward_pre_hook(hook))
        self._handles.append(
            self.transformer.register_forward_hook(self._after_call, with_kwargs=True)
        )

    def stop(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _hook(self, name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: torch.Tensor = args[0]
            if self._last is not None and self._last[1] is x:
                self.leaders[name] = self._last[0]
                return
            self.leaders[name] = name
            self._last = name, x
            self._take(name, x.detach().flatten(0, -2))

        return seen

    def _take(self, name: str, x: torch.Tensor) -> None:
        """Add the rows [N, K] that a layer was given."""
        size = _moment_size(x.shape[1])
        groups = x.float().reshape(len(x), -1, size).transpose(0, 1)  # [K / M, N, M]
        moment = (groups.mT @ groups).double().cpu()
        if not moment.isfinite().all():
            raise PrecisionError(
                f"{name} was given numbers that are not finite: the model itself fails on this "
                "prompt; calibrate with another one or in another dtype"
            )
        self._sums[name] = self._sums[name] + moment if name in self._sums else moment
        self._rows[name] = self._rows.get(name, 0) + len(x)
        if self._samples is not None:
            rows = x.float().reshape(-1, self._group)
            some = rows[:: max(len(rows) // _PER_CALL, 1)][:_PER_CALL].cpu()
            kept = self._samples.setdefault(name, [])
            if len(kept) * _PER_CALL < SAMPLES:
                kept.append(some)

    def _after_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep the second call, and the last one so far."""
        self._last = None
        self._count += 1
        kept = args, dict(kwargs), _tensor_of(output).detach().clone()
        if self._count <= 2:
            self.calls = [kept]
        else:
            self.calls[1:] = [kept]

    def tensors(
        self, rotations: Sequence[str], moments: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return what the file keeps, under "layer/kind"."""
        if not self._sums:
            raise PrecisionError(
                f"no layer of {type(self.transformer).__name__} ran: the calibration is empty; "
                "take a prompt and settings with which every transformer has steps"
            )
        for name, total in self._sums.items():
            moment = total / self._rows[name]
            if moments:
                yield f"{name}/moment", moment.float()
            if "wush" in rotations:
                same = [la.module for la in self.layers if self.leaders.get(la.name) == name]
                weight = torch.cat([module.weight.detach().float().cpu() for module in same])
                pair = wush(_within(moment, self._group), weight, self._group)
                yield f"{name}/wush", pair.activations.bfloat16()
            if self._samples is not None:
                yield f"{name}/dart", dart(torch.cat(self._samples[name])).bfloat16()


@contextmanager
def _all(recorders: Mapping[str, _Recorder]) -> Iterator[None]:
    """Record while something runs."""
    try:
        for recorder in recorders.values():
            recorder.start()
        yield
    finally:
        for recorder in recorders.values():
            recorder.stop()


def _moment_size(channels: int) -> int:
    size = channels if channels <= _WHOLE else group_for(channels, GROUPS[0])
    return size or channels


def _within(moment: torch.Tensor, size: int) -> torch.Tensor:
    """Return the blocks [K / size, size, size] on the diagonal of moments of larger groups."""
    per_group = moment.shape[-1] // size
    blocks = moment.reshape(len(moment), per_group, size, per_group, size)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, size, size)


def _sensitivity(
    recorder: _Recorder, transformer: nn.Module, host: Any, settings: LowPrecision, component: str
) -> dict[str, float]:
    """Return layer -> relative error of the transformer's output, the larger of two calls."""
    names = [layer.name for layer in recorder.layers]
    errors = {}
    for name in names:
        others = tuple(f"{other}." for other in names if other != name)
        alone = replace(settings, skip=others, keep_weights="cpu")
        attachment = PrecisionAttachment(transformer, host, alone, component)
        attachment.attach()
        try:
            errors[name] = max(_error(transformer, *call) for call in recorder.calls)
        finally:
            attachment.detach()
    return errors


def _error(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], exact: torch.Tensor
) -> float:
    with torch.no_grad():
        output = _tensor_of(transformer(*args, **kwargs)).float()
    exact = exact.float()
    return float((output - exact).norm() / exact.norm().clamp_min(1e-12))


def _tensor_of(output: Any) -> torch.Tensor:
    """Return the first tensor of what a transformer returns."""
    found = output if isinstance(output, torch.Tensor) else next(iter(output))
    while not isinstance(found, torch.Tensor):
        found = output[0] if not isinstance(found, list | tuple) else found[0]
    return found
