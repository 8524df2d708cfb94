"""The plans of a budget that are worth a run end to end."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from vidaccel.lemica.search import solve_edges
from vidaccel.plans.edge import Edge
from vidaccel.plans.generic import generic_plan
from vidaccel.plans.plan import Plan

OBJECTIVES = ("leximax", "power(2)")

# Gaps of the plans that compute a head of steps and then every so many.
GAPS = (2, 3, 4, 5)

# Longest segments that are tried beside the measured ones, as shares of those.
REACHES = (0.75, 0.5)


def validated_budgets(steps: int) -> list[int]:
    """Return the budgets that are checked end to end: three quarters to a fifth of the steps."""
    shares = (Fraction(3, 4), Fraction(2, 3), *(Fraction(1, n) for n in (2, 3, 4, 5)))
    return sorted({int(steps * share) for share in shares} - {0}, reverse=True)


def candidates(
    edges: Sequence[Edge],
    budget: int,
    steps: int,
    sigmas: tuple[float, ...] | None = None,
    *,
    guided: bool = True,
) -> dict[str, Plan]:
    """Find the plans of one budget that are worth a run, by a name that says what they are.

    Args:
        edges: as `lemica.search.solve_edges` takes them.
        budget: number of computed steps.
        steps: T.
        sigmas, guided: what the generic schedule takes of a run.

    Returns:
        The evenly spaced plan and the best path of the paper's objective, each held, half way and
        all the way along the line everywhere, the best path of every objective over all that was
        measured, with the last step computed and without, the generic schedule, those of shorter
        segments only, those of one step fewer or more with a step added or taken away, and first
        steps followed by every 2nd to 5th one, the last three with a line in between. Equal plans
        appear once, by their first name.
    """
    held = [edge for edge in edges if edge.order == 0]
    only_held = len(held) == len(edges)
    wanted = [("leximax", "leximax", held)]
    wanted += [(name if only_held else f"{name}, lines", name, list(edges)) for name in OBJECTIVES]
    plans = {"evenly spaced": Plan.spread(budget, steps)}
    for name, objective, allowed in wanted:
        solved = solve_edges(allowed, steps, [budget], objective=objective)
        if budget in solved:
            plans.setdefault(name, solved[budget])
    if not only_held:
        generic = generic_plan(budget, steps, sigmas, guided=guided)
        if len(generic.steps) == budget:  # a short run may need more
            plans["generic schedule"] = generic
        for objective in OBJECTIVES:
            solved = solve_edges(edges, steps, [budget], objective=objective, virtual_end=True)
            if budget in solved:
                plans[f"{objective}, lines to the end"] = solved[budget]
    near = dict(_near_the_path(held, budget, steps))
    if only_held:
        plans |= near
    else:
        for name in ("evenly spaced", "leximax"):
            if name in plans:
                plans[f"{name}, half line"] = plans[name].forecast(1, 0.5)
                plans[f"{name}, line"] = plans[name].forecast(1)
        plans |= {f"{name}, line": plan.forecast(1) for name, plan in near.items()}
        for gap in GAPS:
            if (plan := head_and_gap(budget, steps, gap)) is not None:
                plans[f"first steps, then every {gap}, line"] = plan.forecast(1)
    different: dict[Any, tuple[str, Plan]] = {}
    for name, plan in plans.items():
        different.setdefault((plan.steps, plan.orders, plan.scales), (name, plan))
    return {name: priced(plan, edges) for name, plan in different.values()}


def priced(plan: Plan, edges: Sequence[Edge]) -> Plan:
    """Return a plan with the errors of its segments, if it has none and all of them are known.

    A line whose own scale was not measured has the error of the one that was best there.
    """
    if plan.errors:
        return plan
    known: dict[tuple[int, int, int | None], float] = {}
    for edge in edges:
        forecast = edge.previous if edge.order else None
        place = (edge.start, edge.end, forecast)
        known[place] = min(edge.error, known.get(place, math.inf))
    errors = []
    ends = (*plan.steps[1:], plan.num_inference_steps)
    for position, (start, end) in enumerate(zip(plan.steps, ends, strict=True)):
        if start == plan.num_inference_steps - 1:
            break  # after it nothing is reused
        on_line = bool(position) and bool(plan.orders) and plan.orders[position] > 0
        previous = plan.steps[position - 1] if on_line else None
        held = known.get((start, end, None))
        found = 0.0 if end == start + 1 else known.get((start, end, previous), held)
        if found is None:
            return plan
        errors.append(found)
    return replace(plan, errors=tuple(errors))


def most_validation_forwards(steps: int, *, lines: bool, improved: bool) -> int:
    """Count the steps that one prompt's validation computes at most, plain runs among them.

    Args:
        steps: T.
        lines: the edges have forecasts.
        improved: an improved plan joins the candidates of each budget.
    """
    total = steps
    for budget in validated_budgets(steps):
        near = len(REACHES) + 2
        gaps = sum(head_and_gap(budget, steps, gap) is not None for gap in GAPS)
        # Evenly spaced and best paths, with lines half way and all the way along; see `candidates`.
        paths = 1 + len(OBJECTIVES)
        # With lines also the generic schedule, and every objective to the end.
        with_lines = 1 + 4 + 1 + len(OBJECTIVES) + gaps
        tried = paths + near + (with_lines if lines else 0)
        total += budget * (tried + improved + 1)  # and a plain run of so many sampling steps
    return total


def _near_the_path(held: Sequence[Edge], budget: int, steps: int) -> Iterator[tuple[str, Plan]]:
    """Plans whose errors are a little worse than those of the best path, for other reasons."""
    errors = {(edge.start, edge.end): edge.error for edge in held}
    longest = max(end - start for start, end in errors)
    for reach in (int(longest * share) for share in REACHES):
        short = [edge for edge in held if edge.end - edge.start <= reach]
        for plan in solve_edges(short, steps, [budget]).values():
            yield f"leximax, segments up to {reach}", plan
    paths = solve_edges(held, steps, [budget - 1, budget + 1])

    def worst_first(computed: tuple[int, ...]) -> list[float]:
        segments = itertools.pairwise(computed)
        return sorted((errors.get(segment, math.inf) for segment in segments), reverse=True)

    for count, path in sorted(paths.items()):
        now = set(path.steps)
        if count < budget:
            name = f"leximax of {count}, one step added"
            changed = [now | {step} for step in range(steps) if step not in now]
        else:
            name = f"leximax of {count}, one step taken away"
            changed = [now - {step} for step in path.steps[1:-1]]
        best = min((tuple(sorted(found)) for found in changed), key=worst_first, default=())
        if best and math.isfinite(max(worst_first(best), default=0.0)):
            yield name, Plan(best, steps)


def head_and_gap(budget: int, steps: int, gap: int) -> Plan | None:
    """Find the plan of first steps and then every `gap`-th; None when there is none."""
    for head in range(2, budget):
        computed = (*range(head), *range(head - 1 + gap, steps, gap))
        if len(computed) == budget:
            return Plan(computed, steps)
    return None
