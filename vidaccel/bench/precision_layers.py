"""The error that low precision causes layer by layer: the sensitivity of a transformer."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidaccel.environment import environment
from vidaccel.precision.calibrate import calibrate_precision
from vidaccel.precision.settings import LowPrecision

SETTINGS = (LowPrecision(), LowPrecision(format="nvint4"))


def sensitivity(
    pipe: Any,
    call: dict[str, Any],
    prompts: Sequence[str],
    path: Path,
    settings: Sequence[LowPrecision] = SETTINGS,
) -> dict[str, Any]:
    """Measure what each layer alone moves the output of the transformer by.

    Args:
        pipe, call: the pipeline, and the arguments of its call but for the prompt.
        prompts: texts to generate from.
        path: file of the calibration, which is kept.
        settings: low precisions, one per format.

    Returns:
        For JSON: "settings", "layers" (component -> format -> layer -> relative error of the
        output, the larger of an early and a late call) and "environment".
    """
    made = calibrate_precision(pipe, prompts, path, rotations=(), sensitivity=settings, **call)
    return {
        "settings": {
            **call,
            "prompts": list(prompts),
            "precisions": [asdict(one) for one in settings],
        },
        "layers": {name: dict(known) for name, known in made.sensitivity.items()},
        "environment": environment(),
    }


def sensitivity_table(result: dict[str, Any], most: int = 12) -> str:
    """Return the most sensitive layers for people."""
    lines = []
    for component, formats in result["layers"].items():
        for name, layers in formats.items():
            ranked = sorted(layers.items(), key=lambda item: -item[1])
            total = sum(error**2 for error in layers.values()) ** 0.5
            lines.append(
                f"{component}, {name}: {len(layers)} layers, together about {total:.2%} of the "
                "output; the most sensitive"
            )
            lines += [f"  {error:8.3%}  {layer}" for layer, error in ranked[:most]]
    return "\n".join(lines)
