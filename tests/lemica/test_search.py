"""The path search: against every path of small graphs, and one solver against another."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from vidaccel.errors import PlanError
from vidaccel.lemica import search
from vidaccel.plans.plan import Plan

OBJECTIVES = ("leximax", "sum", "power(2)", "power(3)", "bottleneck")


@pytest.fixture
def peeling(monkeypatch):
    """Make every leximax search use the second solver."""
    monkeypatch.setattr(search, "TABLE_BYTES", -1)


def random_errors(rng, nodes, levels, max_skip=None, missing=0.0):
    """[nodes, nodes] errors of few distinct values, so that most comparisons are ties."""
    errors = rng.integers(0, levels, (nodes, nodes)).astype(float)
    errors[rng.random((nodes, nodes)) < missing] = np.inf
    i, j = np.indices(errors.shape)
    errors[(j <= i) | (j - i > (max_skip or nodes))] = np.inf
    errors[j == i + 1] = 0
    return errors


def random_options(rng, errors):
    """Keyword arguments of `solve` for `errors`, each absent half of the time."""
    virtual_end = bool(rng.integers(2))
    inner = rng.permutation(np.arange(1, len(errors) - 1)).tolist()
    return {
        "virtual_end": virtual_end,
        "forced": inner[: rng.integers(3)] if rng.integers(2) else (),
        "forbidden": inner[-1:] if len(inner) > 2 and rng.integers(2) else (),
        "quantum": float(rng.choice([0.0, 2.0])),
    }


def key(objective, errors, quantum):
    """What a path is ordered by: the objective, then the raw sum; both exact."""
    rounded = [Fraction(round(e / quantum) if quantum else e) for e in errors]
    value = {
        "leximax": sorted(rounded, reverse=True) + [0] * 20,
        "sum": sum(rounded),
        "power(2)": sum(e**2 for e in rounded),
        "power(3)": sum(e**3 for e in rounded),
        "bottleneck": max(rounded),
    }[objective]
    return value[:20] if objective == "leximax" else value, sum(map(Fraction, errors))


def brute_force(errors, objective, virtual_end=False, forced=(), forbidden=(), quantum=0.0):
    """Every allowed path as (key, number of steps, steps, errors), best first."""
    end = len(errors) - 1
    found = []
    for size in range(end):
        for inner in itertools.combinations(range(1, end), size):
            path = (0, *inner, end)
            segments = [float(errors[s]) for s in itertools.pairwise(path)]
            steps = path[:-1] if virtual_end else path
            if np.inf in segments or not set(forced) <= set(steps) or set(forbidden) & set(steps):
                continue
            found.append((key(objective, segments, quantum), len(steps), steps, tuple(segments)))
    return sorted(found)


def check_against_brute_force(seed, objectives):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        errors = random_errors(rng, rng.integers(4, 9), rng.integers(1, 6), missing=0.15)
        options = random_options(rng, errors)
        for objective in objectives:
            paths = brute_force(errors, objective, **options)
            exact = search.solve(errors, objective=objective, **options)
            at_most = search.solve(errors, objective=objective, at_most=True, **options)
            assert set(exact) == {size for _, size, _, _ in paths}
            for budget in range(1, len(errors) + 1 - options["virtual_end"]):
                best = next((p for p in paths if p[1] == budget), None)
                if best is not None:
                    assert exact[budget].steps == best[2]
                    # The empty segment from the last step to the virtual end is no segment.
                    assert exact[budget].errors == best[3][: len(exact[budget].errors)]
                best = next((p for p in paths if p[1] <= budget), None)
                assert (best is None) == (budget not in at_most)
                if best is not None:
                    assert at_most[budget].steps == best[2]


@pytest.mark.parametrize("seed", range(3))
def test_every_objective_and_option_agrees_with_brute_force(seed):
    check_against_brute_force(seed, OBJECTIVES)


@pytest.mark.parametrize("seed", range(3))
def test_peeling_agrees_with_brute_force(seed, peeling):
    check_against_brute_force(10 + seed, ["leximax"])


@pytest.mark.parametrize("levels", [2, 5, 40, 10**6])
def test_the_two_solvers_agree(levels, monkeypatch):
    rng = np.random.default_rng(levels)
    for steps, max_skip in ((24, 5), (36, 8), (40, 40)):
        errors = random_errors(rng, steps, levels, max_skip, missing=0.05)
        options = random_options(rng, errors) | {"at_most": bool(rng.integers(2))}
        plans = search.solve(errors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(search, "TABLE_BYTES", -1)
            assert search.solve(errors, **options) == plans


def test_peeling_agrees_with_plain_labels_on_a_long_run(peeling):
    """Labels as sorted tuples, compared by Python: slow, and with nothing to get wrong."""
    rng = np.random.default_rng(0)
    steps, max_skip, budget = 150, 12, 40
    errors = random_errors(rng, steps, 50, max_skip) * np.linspace(3, 1, steps)[:, None].round(1)
    labels = {steps - 1: ((), (steps - 1,))}
    for _ in range(budget - 1):
        labels = {
            i: min(
                (tuple(sorted((*labels[j][0], errors[i, j]), reverse=True)), (i, *labels[j][1]))
                for j in range(i + 1, min(i + max_skip, steps - 1) + 1)
                if j in labels
            )
            for i in range(steps - 1)
            if any(j in labels for j in range(i + 1, min(i + max_skip, steps - 1) + 1))
        }
    worst, path = labels[0]
    (plan,) = search.solve(errors, [budget]).values()
    assert tuple(sorted(plan.errors, reverse=True)) == worst
    assert plan.steps == path


def test_a_large_graph_is_solved_without_a_table_of_labels():
    rng = np.random.default_rng(1)
    errors = random_errors(rng, 400, 10**6, 20)
    (plan,) = search.solve(errors, [60]).values()
    (bottleneck,) = search.solve(errors, [60], objective="bottleneck").values()
    assert len(plan.steps) == 60
    assert max(plan.errors) == max(bottleneck.errors)
    assert sum(bottleneck.errors) <= sum(plan.errors)


def test_budgets_that_no_path_has_are_absent():
    errors = random_errors(np.random.default_rng(2), 50, 9, max_skip=8)
    assert list(search.solve(errors)) == list(range(8, 51))
    assert list(search.solve(errors, [60, 20, 7, 0, -4, 8])) == [20, 8]
    assert search.solve(errors, []) == {}


def test_a_plan_holds_the_error_of_each_segment():
    errors = np.array([[0, 0, 2, 9], [0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert search.solve(errors)[3] == Plan((0, 2, 3), 4, (2.0, 0.0))
    assert search.solve(errors, virtual_end=True)[2] == Plan((0, 2), 3, (2.0,))
    assert search.solve(errors, virtual_end=True, forced=[1])[2] == Plan((0, 1), 3, (0.0, 5.0))
    assert search.solve(errors, [1], virtual_end=True)[1] == Plan((0,), 3, (9.0,))


def test_leximax_limits_the_worst_error_and_sum_the_total():
    errors = np.full((5, 5), np.inf)
    errors[range(4), range(1, 5)] = 0
    errors[0, 2], errors[2, 4] = 4, 4
    errors[1, 4] = 6
    assert search.solve(errors, [3])[3].steps == (0, 2, 4)
    assert search.solve(errors, [3], objective="sum")[3].steps == (0, 1, 4)
    assert search.solve(errors, [3], objective="power(1.5)")[3].steps == (0, 1, 4)
    assert search.solve(errors, [3], objective="power(2)")[3].steps == (0, 2, 4)


def test_differences_below_the_quantum_decide_only_ties():
    errors = np.full((5, 5), np.inf)
    errors[range(4), range(1, 5)] = 0
    errors[0, 2], errors[1, 3], errors[2, 4] = 1.04, 0.98, 1.0
    assert search.solve(errors, [4])[4].steps == (0, 1, 3, 4)
    assert search.solve(errors, [4], quantum=0.1)[4].steps == (0, 1, 3, 4)
    errors[2, 4], errors[1, 3] = 0.98, 0.98
    assert search.solve(errors, [4])[4].steps == (0, 1, 2, 4)


def test_errors_of_any_size_are_exact():
    tiny, huge = 5e-324, 1e308
    errors = np.full((5, 5), np.inf)
    errors[range(4), range(1, 5)] = 0
    errors[0, 2], errors[2, 4], errors[1, 3], errors[0, 3] = huge, tiny, 2 * tiny, huge
    for objective in ("leximax", "sum", "bottleneck"):
        plans = search.solve(errors, objective=objective)
        assert plans[4].steps == (0, 1, 2, 4)
        assert plans[3].errors == (huge, 0.0)


GOOD = np.triu(np.ones((5, 5)), 2)


@pytest.mark.parametrize(
    ("errors", "options", "message"),
    [
        (GOOD[:4], {}, r"square array, found shape \(4, 5\)"),
        (GOOD[0], {}, r"square array, found shape \(5,\)"),
        ([[0, 1], [2]], {}, "square array of numbers"),
        ("errors", {}, "square array of numbers"),
        (np.where(GOOD, np.nan, 0), {}, r"errors\[0, 2\] is NaN"),
        (-GOOD, {}, r"errors\[0, 2\] is negative"),
        (GOOD[:2, :2], {}, "3 steps or more, found 2"),
        (GOOD[:3, :3], {"virtual_end": True}, "3 steps or more, found 2"),
        (GOOD + np.eye(5, k=1), {}, r"errors\[0, 1\] is 1: without a reused step it must be 0"),
        (np.where(np.eye(5, k=1), np.inf, 0), {}, r"errors\[0, 1\] is inf"),
        (GOOD, {"objective": "best"}, "found 'best'"),
        (GOOD, {"objective": "power(0)"}, r"found 'power\(0\)'"),
        (GOOD, {"objective": "power(101)"}, "0 < g <= 100"),
        (GOOD, {"objective": None}, "found None"),
        (GOOD, {"forced": [5]}, "forced step 5 is outside 0 to 4"),
        (GOOD, {"forced": [4], "virtual_end": True}, "forced step 4 is outside 0 to 3"),
        (GOOD, {"forced": [-1]}, "forced step -1 is outside"),
        (GOOD, {"forbidden": [7]}, "forbidden step 7 is outside"),
        (GOOD, {"forced": [2], "forbidden": [1, 2]}, "step 2 is forbidden, but"),
        (GOOD, {"forbidden": [0]}, "step 0 is forbidden, but"),
        (GOOD, {"forbidden": [4]}, "step 4 is forbidden, but"),
        (GOOD, {"forced": [1.5]}, "forced must be a list of whole numbers"),
        (GOOD, {"forbidden": 3}, "forbidden must be a list of whole numbers"),
        (GOOD, {"budgets": 3}, "budgets must be a list of whole numbers"),
        (GOOD, {"quantum": -1.0}, "quantum is 0, or"),
        (GOOD, {"quantum": float("nan")}, "quantum is 0, or"),
        (GOOD * 1e300, {"quantum": 1e-300}, "quantum is 0, or"),
    ],
)
def test_bad_input_gets_one_clear_line(errors, options, message):
    with pytest.raises(PlanError, match=message) as caught:
        search.solve(errors, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "errors", "message"),
    [
        ((0, 2, 4), (1.0,), "2 segments, found 1 errors"),
        ((0, 2), (1.0,), "2 segments, found 1 errors"),
        ((0, 4), (float("nan"),), "error 0 is nan"),
        ((0, 2, 4), (0, -1.0), "error 1 is -1.0"),
        ((0, 4), (float("inf"),), "error 0 is inf"),
        ((0, 4), ("1",), "error 0 is '1'"),
    ],
)
def test_malformed_plan_errors_are_refused(steps, errors, message):
    with pytest.raises(PlanError, match=message):
        Plan(steps, 5, errors)
