"""The cases of `vidaccel bench precision`: formats, rotations, sequences, and another library."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vidaccel.api import accelerate, restore
from vidaccel.dbcache import DBCache
from vidaccel.errors import BenchError
from vidaccel.hosts.registry import find_transformers
from vidaccel.precision.formats import FORMATS
from vidaccel.precision.settings import CALIBRATED, PRESETS, LowPrecision
from vidaccel.svg2.settings import SVG2

ROTATIONS = (None, "hadamard", "dart", "wush")
SEQUENCES = (None, "haar")
# Tokens in 8 bits after the transform: the share of STaMP's own 64 among 640 or so.
HIGH_TOKENS = 0.1
FIRST_BLOCK = ("blocks.0.",)
# Channels that calibrated rotations act on: of formats with a scale per token, and per block.
GROUPS = (64, 16)


@dataclass(frozen=True)
class PrecisionCase:
    """A way to run a pipeline.

    Attributes:
        name: its name in results.
        settings: what tells it from others, for JSON.
        acceleration: arguments of `accelerate`; None for another library.
        foreign: puts another library's numbers in, given a copy of the transformer.
    """

    name: str
    settings: dict[str, Any]
    acceleration: dict[str, Any] | None = field(default=None, compare=False)
    foreign: Callable[[Any], None] | None = field(default=None, compare=False)

    @contextmanager
    def enabled(self, pipe: Any) -> Iterator[None]:
        """Run a pipeline in this way meanwhile; it is as before afterwards."""
        if self.foreign is None:
            try:
                accelerate(
                    pipe, **({"policy": None, "attention": None} | (self.acceleration or {}))
                )
                yield
            finally:
                restore(pipe)
            return
        before = {name: part for name, (part, _) in find_transformers(pipe).items()}
        try:
            for name, part in before.items():
                quantised = copy.deepcopy(part)
                self.foreign(quantised)
                setattr(pipe, name, quantised)
            yield
        finally:
            for name, part in before.items():
                setattr(pipe, name, part)


def calibration_file(folder: Path, group: int) -> Path:
    """Return the file of the calibration with rotations of so many channels."""
    return folder / f"calibration-{group}.safetensors"


def group_of(settings: LowPrecision) -> int:
    """Return the channels that a calibrated rotation of these settings acts on."""
    return GROUPS[1] if FORMATS[settings.format].block else GROUPS[0]


def grid(
    formats: tuple[str, ...] = tuple(FORMATS), rotations: tuple[str | None, ...] = ROTATIONS
) -> list[LowPrecision]:
    """Return every format with every rotation and sequence, without their calibrations."""
    found = []
    for name in formats:
        integers = FORMATS[name].bits == 4 and not FORMATS[name].floating
        for sequence in SEQUENCES:
            high = HIGH_TOKENS if integers and sequence else 0
            for rotation in rotations:
                found.append(_settings(name, rotation, sequence, high))
    return found


def best() -> list[LowPrecision]:
    """Return what may make the presets better, at a price.

    The first block left alone, which has the most sensitive layers; and in 4 bits rounding that
    knows the activations, and more high tokens.
    """
    four = LowPrecision(format="nvint4", gptq=True, calibration="-")
    return [
        *(replace(preset, skip=FIRST_BLOCK) for preset in PRESETS.values()),
        replace(four, sequence="haar", high_tokens=HIGH_TOKENS),
        replace(four, sequence="haar", high_tokens=2 * HIGH_TOKENS),
        replace(four, high_tokens=1.0),
    ]


def cases(settings: list[LowPrecision], folder: Path) -> list[PrecisionCase]:
    """Return settings as cases, with the calibrations of a folder.

    Args:
        settings: low precisions; a calibration in them is only that there is one.
        folder: has the files of `calibration_file`.
    """
    return [_case(one, folder) for one in settings]


def together(plans: dict[str, dict[str, Any]], precisions: dict[str, Any]) -> list[PrecisionCase]:
    """Return every piece alone and with the others, at some plans.

    Args:
        plans: name -> arguments of `accelerate` that ask for it.
        precisions: name -> precision.
    """
    sparse = SVG2(top_p=0.9, min_tokens=0, query_clusters=16, key_clusters=40)
    guard = DBCache(threshold=0.12)
    found = []
    for plan, asked in {"every step": {"policy": None}, **plans}.items():
        planned = asked["policy"] is not None
        for low, precision in {"": None, **precisions}.items():
            for cache in (None, guard) if planned else (None,):
                for attention in (None, sparse):
                    parts = [
                        plan,
                        "DBCache" if cache else "",
                        "SVG2" if attention else "",
                        low,
                    ]
                    if not planned and attention is None and not low:
                        continue
                    name = " + ".join(filter(None, parts))
                    acceleration = {
                        **asked,
                        "cache": cache,
                        "attention": attention,
                        "precision": precision,
                    }
                    found.append(PrecisionCase(name, {"pieces": parts}, acceleration))
    return found


def torchao() -> list[PrecisionCase]:
    """Return torchao's dynamic formats; those that do not run here fail and say so.

    Raises:
        BenchError: torchao is not installed.
    """
    try:
        from torchao import quantization  # type: ignore[import-untyped]
    except ImportError as error:
        raise BenchError("torchao is not installed: pip install torchao") from error
    found = []
    for name, config in (
        ("torchao int8 dynamic", "Int8DynamicActivationInt8WeightConfig"),
        ("torchao fp8 dynamic", "Float8DynamicActivationFloat8WeightConfig"),
    ):

        def put_in(transformer: Any, config: str = config) -> None:
            made = getattr(quantization, config)()
            for _, blocks in _block_lists(transformer):
                quantization.quantize_(blocks, made)

        found.append(PrecisionCase(name, {"config": config}, foreign=put_in))
    return found


def _block_lists(transformer: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, part in transformer.named_children():
        if isinstance(part, torch.nn.ModuleList):
            yield name, part


def _settings(name: str, rotation: Any, sequence: Any, high: float) -> LowPrecision:
    calibration = "-" if rotation in CALIBRATED else None
    return LowPrecision(
        format=name,  # type: ignore[arg-type]
        rotation=rotation,
        sequence=sequence,
        high_tokens=high,
        calibration=calibration,
        skip=(),
    )


def _case(settings: LowPrecision, folder: Path) -> PrecisionCase:
    parts: list[str] = [settings.format, settings.rotation or "", settings.sequence or ""]
    if settings.high_tokens:
        parts.append(f"{settings.high_tokens:.0%} of tokens in 8 bits")
    if settings.gptq:
        parts.append("GPTQ")
    parts += [f"{part} left alone" for part in settings.skip or ()]
    left_out = ("calibration",) if settings.skip else ("calibration", "skip")
    known = {k: v for k, v in asdict(settings).items() if k not in left_out}
    if settings.calibration is not None:
        settings = replace(settings, calibration=calibration_file(folder, group_of(settings)))
    preset = next((key for key, value in PRESETS.items() if value == settings), "")
    name = ", ".join(filter(None, [*parts, f'precision="{preset}"' if preset else ""]))
    return PrecisionCase(name, known, {"precision": settings})
