"""A picture of a policy: the error of every measured segment, and the plans of several budgets."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidaccel.errors import OutputError
from vidaccel.plans.plan import Plan
from vidaccel.plans.policy import CachePolicy

# So many plans can be told apart in one picture.
MOST_PLANS = 8


def plot_policy(policy: CachePolicy, path: Path) -> None:
    """Draw a policy.

    Above, the error of holding the residual, by the step where a segment starts and by its length,
    where the policy has such errors; below, a row for each of several budgets: dark where a step is
    computed, and between them how far each reused step goes along the line.

    Args:
        policy: what is drawn.
        path: an image file; its ending says of what kind.

    Raises:
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError('--plot needs matplotlib: pip install "vidaccel[plot]"') from error
    surface = error_surface(policy)
    plans = [policy.plan(budget=budget) for budget in _several(policy.budgets())]
    heights = ([4.0] if surface is not None else []) + [0.6 + 0.32 * len(plans)]
    figure = Figure(figsize=(9.0, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, sharex=True)
    name = policy.model.id or policy.model.transformer
    figure.suptitle(f"{name}, {policy.num_inference_steps} steps, {policy.provenance}")
    if surface is not None:
        _draw_surface(figure, panels[0, 0], surface)
    _draw_plans(panels[-1, 0], plans)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def error_surface(policy: CachePolicy) -> NDArray[np.float64] | None:
    """Return [reused steps - 1, start] errors of held segments, NaN where none is; None without."""
    held = [edge for edge in policy.edges if edge.order == 0]
    if not held:
        return None
    longest = max(edge.end - edge.start for edge in held)
    surface = np.full((longest - 1, policy.num_inference_steps), np.nan)
    for edge in held:
        surface[edge.end - edge.start - 2, edge.start] = edge.mean
    return surface


def _several(budgets: list[int]) -> list[int]:
    """Pick at most `MOST_PLANS` budgets, from the fastest plan to the slowest, evenly spaced."""
    count = min(MOST_PLANS, len(budgets))
    places = np.linspace(0, len(budgets) - 1, count).round().astype(int)
    return [budgets[place] for place in places]


def _draw_surface(figure: Any, panel: Any, surface: NDArray[np.float64]) -> None:
    from matplotlib.colors import LogNorm

    positive = surface[np.isfinite(surface) & (surface > 0)]
    lengths, steps = surface.shape
    image = panel.imshow(
        surface,
        origin="lower",
        aspect="auto",
        cmap="magma_r",
        norm=LogNorm(positive.min(), positive.max()) if positive.size else None,
        extent=(-0.5, steps - 0.5, 0.5, lengths + 0.5),
        interpolation="nearest",
    )
    figure.colorbar(image, ax=panel, label="error of the outcome")
    panel.set_ylabel("reused steps after it")
    panel.set_title("What holding the residual of a step costs", fontsize="medium", loc="left")
    panel.tick_params(labelbottom=True)


def _draw_plans(panel: Any, plans: list[Plan]) -> None:
    total = plans[0].num_inference_steps
    for row, plan in enumerate(plans):
        for start, end in plan.segments():
            scale = plan.scale(start) if plan.order(start) else 0.0
            color = (0.85 - 0.55 * min(scale, 1.0), 0.88 - 0.28 * min(scale, 1.0), 0.95)
            panel.barh(row, end - start - 1, left=start + 0.5, height=0.62, color=color)
        panel.barh(
            [row] * len(plan.steps), 1.0, left=[s - 0.5 for s in plan.steps], height=0.62,
            color="#1b2a49", edgecolor="white", linewidth=0.4,
        )  # fmt: skip
    panel.set_yticks(range(len(plans)), [f"{len(plan.steps)} of {total}" for plan in plans])
    panel.set_xlim(-0.5, total - 0.5)
    panel.set_xticks(range(0, total, max(1, 5 * math.ceil(total / 60))))
    panel.set_xlabel("denoising step")
    panel.set_title(
        "dark: computed; pale: held; blue: along the line of the last two computed",
        fontsize="medium",
        loc="left",
    )
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
