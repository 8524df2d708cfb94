"""The PSNR that a plan is predicted to reach, from the sum of its errors."""

import math
from collections.abc import Sequence

from vidaccel.plans.plan import Plan

# (sum of errors, PSNR in dB): errors rise, PSNR does not.
Curve = Sequence[tuple[float, float]]


def predicted_psnr(curve: Curve, plan: Plan) -> float | None:
    """Return the PSNR between a plan's clip and the plain one, in dB, as a curve predicts it.

    Between two points the PSNR is taken to fall with the logarithm of the error, as it does where
    the difference of two clips grows with that of their latents; beyond the ends by 20 dB for ten
    times the error.

    Args:
        curve: the points, at least one.
        plan: a plan whose errors are known.

    Returns:
        inf for a plan that reuses nothing; None where its errors are not known.
    """
    if len(plan.steps) == plan.num_inference_steps:
        return math.inf
    if not plan.errors:
        return None
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


def scaled(curve: Curve, scale: float) -> tuple[tuple[float, float], ...]:
    """Return the curve for errors in other units, `scale` times as large."""
    return tuple((error * scale, psnr) for error, psnr in curve)
