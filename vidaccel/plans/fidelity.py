"""The PSNR that a plan is predicted to reach, from the sum of its errors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vidaccel.plans.plan import Plan

# (sum of errors, PSNR in dB): errors rise, PSNR does not.
Curve = Sequence[tuple[float, float]]


def predicted_psnr(
    curve: Curve, plan: Plan, run: Mapping[int, float] | None = None
) -> float | None:
    """Return the PSNR between a plan's clip and the plain one, in dB, as a curve predicts it.

    Between two points the PSNR is taken to fall with the logarithm of the error, as it does where
    the difference of two clips grows with that of their latents; beyond the ends by 20 dB for ten
    times the error.

    Args:
        curve: the points, at least one.
        plan: a plan.
        run: budget -> the PSNR of its plan, for a plan without errors: it is between those.

    Returns:
        inf for a plan that reuses nothing; None where nothing is known of it.
    """
    if len(plan.steps) == plan.num_inference_steps:
        return math.inf
    if not plan.errors:
        return _between(run or {}, len(plan.steps))
    error = sum(plan.errors)
    if error <= 0.0:
        return math.inf
    first, last = curve[0], curve[-1]
    if error <= first[0] or error >= last[0]:
        known, psnr = first if error <= first[0] else last
        return psnr - 20.0 * math.log10(error / known)
    right = next(i for i, (known, _) in enumerate(curve) if known >= error)
    (low, above), (high, below) = curve[right - 1], curve[right]
    share = math.log(error / low) / math.log(high / low)
    return above + share * (below - above)


def _between(psnr: Mapping[int, float], budget: int) -> float | None:
    """Return a PSNR between those of the budgets that were run; None beyond them."""
    known = sorted(psnr)
    if not known or not known[0] <= budget <= known[-1]:
        return None
    return float(np.interp(budget, known, [psnr[run] for run in known]))


def scaled(curve: Curve, scale: float) -> tuple[tuple[float, float], ...]:
    """Return the curve for errors in other units, `scale` times as large."""
    return tuple((error * scale, psnr) for error, psnr in curve)
