"""The search of BudCache (arXiv 2606.13496), written anew from its description.

A list of a fixed number of computed steps is searched end to end: of a few starts the best one is
annealed, and what comes of that climbs on by small moves. An energy is the mean error of whole runs
against those with every step computed. How the runs are shared out and how the temperature falls is
not described; both are chosen here for a hundred runs.
"""

import math
import random
from collections.abc import Callable, Generator

from vidaccel.calibration.task import Trial
from vidaccel.plans.plan import Plan

# Evenly spaced steps and random ones; the rest of the runs anneal for the most part.
STARTS, ANNEALED = 4, 0.6
# Temperatures at the first and last move, as shares of the energy.
HOT, COLD = 0.1, 0.005

_Steps = tuple[int, ...]
_Search = Generator[Trial, float, float]  # one energy


def annealing(
    budget: int,
    num_inference_steps: int,
    samples: int,
    runs: int,
    *,
    filled: Callable[[Plan], Plan] = lambda plan: plan,
    seed: int = 0,
) -> Generator[Trial, float, Plan]:
    """Ask for runs, and return the plan of the least energy that was met.

    Args:
        budget: computed steps.
        num_inference_steps: T.
        samples: number of samples; an energy takes a run of each.
        runs: the most runs, but for those of the first energy.
        filled: gives a plan what is done between its steps; they are held, as in the paper, if left
            out.
        seed: that of the moves.

    Yields:
        A sample and a plan, for the error of that run to be sent.

    Returns:
        The best plan.
    """
    rng, total = random.Random(seed), num_inference_steps
    known: dict[_Steps, float] = {}

    def energy(steps: _Steps) -> _Search:
        if steps not in known:
            errors = []
            for sample in range(samples):
                errors.append((yield sample, filled(Plan(steps, total))))
            known[steps] = sum(errors) / samples
        return known[steps]

    most = max(1, runs // samples)
    starts = [Plan.spread(budget, total).steps]
    starts += [_random(budget, total, rng) for _ in range(STARTS - 1)]
    for start in starts[:most]:
        yield from energy(start)
    at = min(known, key=lambda steps: known[steps])
    moves = max(1, int(ANNEALED * (most - len(known))))
    end = min(most, len(known) + moves)
    first = len(known)
    while len(known) < end and (move := _unknown(at, total, known, rng, near=False)) is not None:
        share = (len(known) - first) / moves
        temperature = HOT * (COLD / HOT) ** share
        before, after = known[at], (yield from energy(move))
        worse = (after - before) / before if before else math.inf
        if worse <= 0 or rng.random() < math.exp(-worse / temperature):
            at = move
    at = min(known, key=lambda steps: known[steps])
    while len(known) < most:
        # At a peak of small moves the runs that are left go to larger ones.
        move = _unknown(at, total, known, rng, near=True)
        move = move or _unknown(at, total, known, rng, near=False)
        if move is None:
            break
        if (yield from energy(move)) < known[at]:
            at = move
    return filled(Plan(at, total))


def _random(budget: int, total: int, rng: random.Random) -> _Steps:
    return (0, *sorted(rng.sample(range(1, total), budget - 1)))


def _unknown(
    at: _Steps, total: int, known: dict[_Steps, float], rng: random.Random, *, near: bool
) -> _Steps | None:
    """Return a list that differs in one step and was not met yet; None where there is none.

    Args:
        at: the list; its first step stays.
        total: T.
        known: those that were met.
        rng: chooses.
        near: the step moves by one alone; otherwise to any other place.
    """
    free = set(range(total)) - set(at)
    moves = [(step, to) for step in at[1:] for to in free if not near or abs(step - to) == 1]
    rng.shuffle(moves)
    for step, to in moves:
        steps = tuple(sorted({*at, to} - {step}))
        if steps not in known:
            return steps
    return None
