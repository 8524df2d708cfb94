"""Plans of several budgets as lines of text."""

from collections.abc import Mapping, Sequence

from vidaccel.plans.plan import Plan

# What stands in the place of a number that nobody has measured.
NO_ERROR, NO_PSNR = "not measured", "not run"


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
        whole = budget == total
        error = "0" if whole else f"{max(plan.errors):.4g}" if plan.errors else NO_ERROR
        quality = f"{psnr[budget]:.1f} dB" if budget in psnr else "identical" if whole else NO_PSNR
        lines.append(f"{budget:6d}  {total / budget:6.2f}x  {error:>13}  {quality:>9}  {steps}")
    return lines


def what_is_missing(
    plans: Mapping[int, Plan], psnr: Mapping[int, float], *, published: bool
) -> list[str]:
    """Return why rows of `plan_table` lack a number, a line for each reason.

    Args:
        plans, psnr: as `plan_table` takes them.
        published: the plans are a list that somebody has published.
    """
    reused = {b: plan for b, plan in plans.items() if b < plan.num_inference_steps}
    lines = []
    if any(not plan.errors for plan in reused.values()):
        why = (
            "published lists come without the errors of their segments"
            if published
            else "a plan that was chosen by runs end to end, not by the errors of its segments"
        )
        lines.append(f"{NO_ERROR}: {why}")
    if reused.keys() - psnr.keys():
        why = (
            f"only the budgets {', '.join(map(str, sorted(psnr)))} were run end to end"
            if psnr
            else "no plan of this policy was run end to end"
        )
        lines.append(f"{NO_PSNR}: {why}")
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as text: 4-9, 12."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
