"""The settings of low precision: which numbers the linear layers of the blocks compute with."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vidaccel.errors import PrecisionError

FormatName = Literal["int8", "mxint8", "nvint4", "mxint4", "fp8", "mxfp8", "nvfp4", "mxfp4"]
Rotation = Literal["hadamard", "dart", "wush"]
KeepWeights = Literal["cpu", "disk", "drop"]

# Rotations of these are made of statistics of the activations.
CALIBRATED: tuple[str, ...] = ("dart", "wush")
MAX_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class LowPrecision:
    """Settings of low precision in the linear layers of the blocks.

    Attributes:
        format: the numbers of weights and activations. "int8": 8 bits, a scale per token and one
            per output channel; "mxint8", "mxint4": a power of two per 32 channels; "nvint4": 4
            bits, a scale of 8 bits per 16 channels and one per tensor. "fp8", "mxfp8", "nvfp4" and
            "mxfp4" are the floating ones of the same layouts, for comparison: they are rounded to
            and multiplied in the type of the activations, which saves memory and no time.
        rotation: an orthogonal (or, "wush", an invertible) matrix on groups of channels, undone in
            the weights: "hadamard", the regular one; "dart" and "wush", made of a calibration.
            None: none.
        group: channels that are rotated together, 4, 16, 64 or 256; None takes 256 for formats with
            a scale per token and 16 for the others, or the largest of them that divides a layer's
            channels. The group of a "wush" or "dart" rotation is that of its calibration.
        sequence: "haar" mixes the video tokens over frames, height and width before they are
            rounded, and undoes it after the product (STaMP). None: not.
        high_tokens: tokens of each sequence in 8 bits where the format is of integers of 4, those
            of the coarsest scale after "haar": a share in [0, 1] as a float, or their number as an
            int; tokens of text always are then. Without "haar", 1.0: all of them.
        gptq: round the weights one channel after another, each making up for the errors of those
            before as the activations of the calibration weigh them (GPTQ, arXiv 2210.17323).
        skip: parts of the names of layers that are left alone, "blocks.0." say; None takes those
            that the calibration found more sensitive than `max_error`, or none without one.
        max_error: the relative error of the transformer's output that a single layer may cause
            before it is left alone.
        keep_weights: where the weights wait for `restore`: "cpu", "disk" (a file without a name,
            which no killed process leaves behind), or "drop": nowhere, so that `restore` refuses.
        calibration: the file of `calibrate_precision`; None without one.

    Raises:
        PrecisionError: a value is out of its range, or needs a calibration.
    """

    format: FormatName = "int8"
    rotation: Rotation | None = "hadamard"
    group: int | None = None
    sequence: Literal["haar"] | None = None
    high_tokens: float | int = 0
    gptq: bool = False
    skip: tuple[str, ...] | None = None
    max_error: float = 0.05
    keep_weights: KeepWeights = "cpu"
    calibration: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _one_of("format", self.format, get_args(FormatName))
        _one_of("rotation", self.rotation, (None, *get_args(Rotation)))
        _one_of("group", self.group, (None, 4, 16, 64, 256))
        _one_of("sequence", self.sequence, (None, "haar"))
        _one_of("gptq", self.gptq, (False, True))
        _one_of("keep_weights", self.keep_weights, get_args(KeepWeights))
        _number("high_tokens", self.high_tokens, "a share in [0, 1] or a whole number", _is_amount)
        _number("max_error", self.max_error, "a number above 0", lambda value: value > 0)
        whole = isinstance(self.high_tokens, float) and self.high_tokens == 1
        if self.high_tokens and not whole and self.sequence is None:
            raise PrecisionError(
                "LowPrecision.high_tokens picks the coarsest tokens of sequence='haar': set that, "
                "or take high_tokens=1.0 for activations in 8 bits throughout"
            )
        if self.skip is not None and not (
            isinstance(self.skip, tuple)
            and all(isinstance(part, str) and part for part in self.skip)
        ):
            raise PrecisionError(
                "LowPrecision.skip takes a tuple of parts of the names of layers, such as "
                f"('blocks.0.',), found {self.skip!r}"
            )
        if self.calibration is not None and not isinstance(self.calibration, str | os.PathLike):
            raise PrecisionError(
                "LowPrecision.calibration takes the name of a file, found "
                f"{type(self.calibration).__name__}"
            )
        wanted = [f"rotation={self.rotation!r}"] if self.rotation in CALIBRATED else []
        wanted += ["gptq=True"] if self.gptq else []
        if wanted and self.calibration is None:
            raise PrecisionError(
                f"LowPrecision({', '.join(wanted)}) needs a calibration: make one with "
                "vidaccel.calibrate_precision(pipe, prompts, file), and pass calibration=file"
            )
        if self.group is not None and self.rotation in CALIBRATED:
            raise PrecisionError(
                f"LowPrecision.group is that of the calibration for rotation={self.rotation!r}: "
                "leave it out"
            )

    @property
    def bits(self) -> int:
        """The bits of a weight."""
        return 4 if self.format.endswith("4") else 8

    def high_of(self, tokens: int) -> int:
        """Return how many of so many tokens are in 8 bits."""
        high = self.high_tokens
        # The tolerance keeps 0.29 * 100 from being 28.
        return min(high if isinstance(high, int) else int(high * tokens + 1e-9), tokens)

    @property
    def name(self) -> str:
        """The numbers alone, without files and places: a policy tells this."""
        return self._show(("calibration", "keep_weights", "max_error", "skip"))

    def __str__(self) -> str:
        """Show the format and the values that differ from the defaults."""
        return self._show(())

    def _show(self, without: tuple[str, ...]) -> str:
        changed = [
            f"{field.name}={_shown(getattr(self, field.name))}"
            for field in fields(self)
            if field.name not in without
            and (field.name == "format" or getattr(self, field.name) != field.default)
        ]
        return f"LowPrecision({', '.join(changed)})"


def _shown(value: Any) -> str:
    return repr(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    # Types too: True is no 1, and 4.0 no 4.
    if not any(type(value) is type(known) and value == known for known in allowed):
        listed = ", ".join(map(repr, allowed))
        raise PrecisionError(f"LowPrecision.{name} is one of {listed}, found {value!r}")


def _number(name: str, value: object, allowed: str, fits: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise PrecisionError(f"LowPrecision.{name} takes {allowed}, found {value!r}")


def _is_amount(value: float | int) -> bool:
    return value >= 0 if isinstance(value, int) else 0 <= value <= 1


# What `accelerate(precision=...)` takes by name: both need no calibration.
PRESETS: dict[str, LowPrecision] = {
    "int8": LowPrecision(),
    "int4": LowPrecision(format="nvint4", sequence="haar", high_tokens=0.1),
}

# The argument of `accelerate`.
Precision = str | LowPrecision | None


def settings_of(precision: Precision) -> LowPrecision | None:
    """Return the settings of what `accelerate(precision=...)` is given.

    Raises:
        PrecisionError: it is neither a preset nor a `LowPrecision`.
    """
    if precision is None or isinstance(precision, LowPrecision):
        return precision
    if isinstance(precision, str) and precision in PRESETS:
        return PRESETS[precision]
    raise PrecisionError(
        f"precision is None, {', '.join(map(repr, PRESETS))} or a LowPrecision, found {precision!r}"
    )
