"""Plans of several budgets as lines of text."""

import math
from collections.abc import Mapping

from vidaccel.plans.plan import Plan


def plan_table(plans: Mapping[int, Plan], psnr: Mapping[int, float]) -> list[str]:
    """Return a heading and a line for each plan: C is a computed step, - one that is reused.

    Args:
        plans: budget -> plan.
        psnr: budget -> dB, of those that were validated.
    """
    lines = ["budget  speedup  largest error       PSNR"]
    for budget, plan in plans.items():
        total = plan.num_inference_steps
        steps = "".join("C" if plan.computes(step) else "-" for step in range(total))
        error = max(plan.errors, default=math.inf)
        shown = f"{error:.4g}" if math.isfinite(error) else "not known"
        quality = f"{psnr[budget]:6.1f} dB" if budget in psnr else f"{'-':>9}"
        lines.append(f"{budget:6d}  {total / budget:6.2f}x  {shown:>13}  {quality}  {steps}")
    return lines
