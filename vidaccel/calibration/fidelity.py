"""Fits how the PSNR of plans follows from the sum of their errors."""

import math
from collections.abc import Iterable

import numpy as np

# A curve of more points than this tells the noise of its samples.
MOST_POINTS = 12


def fit_fidelity(found: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Fit the PSNR of plans to the sum of their errors: the more error, the less PSNR.

    Isotonic regression over the logarithm of the error: no shape is assumed but that it falls.

    Args:
        found: (sum of errors, PSNR in dB) of plans that have run; infinite ones are left out.

    Returns:
        The points of a curve as `plans.fidelity` takes it; empty where there is nothing to fit.
    """
    from sklearn.isotonic import IsotonicRegression

    points = sorted((e, p) for e, p in found if e > 0.0 and math.isfinite(p))
    if not points:
        return ()
    errors = np.log([error for error, _ in points])
    fit = IsotonicRegression(increasing=False).fit(errors, [psnr for _, psnr in points])
    at = np.unique(np.quantile(errors, np.linspace(0.0, 1.0, MOST_POINTS)))
    levels = fit.predict(at)
    return tuple(
        (float(f"{math.exp(error):.6g}"), round(float(level), 2))
        for error, level in zip(at, levels, strict=True)
    )
