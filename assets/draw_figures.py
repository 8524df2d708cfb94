"""Draw the figures of assets/ anew, each from the numbers in assets/results.

    python assets/draw_figures.py [FOLDER]

FOLDER is where they go: assets/ if left out. Needs `pip install "vidaccel[bench]"`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidaccel.bench.attention import AttentionResult
from vidaccel.bench.curves import QualityResult
from vidaccel.bench.defaults import DefaultsResult
from vidaccel.bench.figures import draw_attention, draw_defaults, draw_quality
from vidaccel.bench.learning import LearningResult, Lesson, draw_learning
from vidaccel.bench.precision import PrecisionPoint, PrecisionResult
from vidaccel.bench.precision_crossover import CrossoverPoint, CrossoverResult
from vidaccel.bench.precision_figures import draw_crossover, draw_precision

ASSETS = Path(__file__).resolve().parent


def learning_of(data: dict[str, Any]) -> LearningResult:
    """Read the result of `vidaccel bench learning`, whose budgets are text in JSON."""

    def of_budget(found: dict[str, Any]) -> dict[int, Any]:
        return {int(budget): value for budget, value in found.items()}

    lessons = [
        Lesson(
            **lesson
            | {name: of_budget(lesson[name]) for name in ("predicted", "errors")}
            | {"psnr": {method: of_budget(each) for method, each in lesson["psnr"].items()}}
        )
        for lesson in data["lessons"]
    ]
    return LearningResult(**data | {"lessons": lessons})


def crossover_of(data: dict[str, Any]) -> CrossoverResult:
    """Read the result of `vidaccel bench precision --crossover`, its pairs in order of points."""
    points = [CrossoverPoint(**point) for point in data["points"]]
    even_at = {point.pair: data["even_at"][point.pair] for point in points}
    return CrossoverResult(**data | {"points": points, "even_at": even_at})


def precision_of(data: dict[str, Any]) -> PrecisionResult:
    """Read the result of `vidaccel bench precision`."""
    return PrecisionResult(**data | {"points": [PrecisionPoint(**p) for p in data["points"]]})


# Name of the file of numbers, and of the figure -> how the one is read, and the other drawn.
FIGURES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Path], None]]] = {
    "attention": (AttentionResult.from_dict, draw_attention),
    "defaults": (DefaultsResult.from_dict, draw_defaults),
    "learning": (learning_of, draw_learning),
    "precision": (precision_of, draw_precision),
    "precision-grid": (precision_of, draw_precision),
    "precision-crossover": (crossover_of, draw_crossover),
    "quality": (QualityResult.from_dict, draw_quality),
}


def main(folder: Path) -> None:
    """Draw all of them."""
    for name, (read, draw) in FIGURES.items():
        data = json.loads((ASSETS / "results" / f"{name}.json").read_text(encoding="utf-8"))
        draw(read(data), folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ASSETS)
