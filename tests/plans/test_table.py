"""Plans as lines of text."""

from vidaccel.plans.plan import Plan
from vidaccel.plans.table import plan_table, what_is_missing

PLANS = {
    2: Plan((0, 3), 5),
    3: Plan((0, 2, 4), 5, errors=(0.25, 0.5)),
    5: Plan(tuple(range(5)), 5),
}


def test_every_row_has_both_numbers_or_words_for_them():
    _, *rows = plan_table(PLANS, {3: 31.25})
    assert [row.split() for row in rows] == [
        ["2", "2.50x", "not", "measured", "not", "run", "C--C-"],
        ["3", "1.67x", "0.5", "31.2", "dB", "C-C-C"],
        ["5", "1.00x", "0", "identical", "CCCCC"],
    ]


def test_what_is_missing_is_explained_once():
    measured, run = what_is_missing(PLANS, {3: 31.25}, published=False)
    assert measured.startswith("not measured: ") and run.endswith(
        "the budgets 3 were run end to end"
    )
    measured, run = what_is_missing(PLANS, {}, published=True)
    assert "published" in measured and run.startswith("not run: no plan")
    whole = {budget: plan for budget, plan in PLANS.items() if budget != 2}
    assert what_is_missing(whole, {3: 30.0}, published=False) == []
