"""The pictures of the page."""

from vidaccel.demo import html
from vidaccel.demo.job_queue import Progress
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies


def test_pictures_escape_what_users_write():
    evil = "<script>alert(1)</script>"
    assert evil not in html.problem(evil)
    assert evil not in html.status(Progress(state="failed", message=evil))
    assert evil not in html.status(Progress(state="stopped", message=evil))
    assert evil not in html.status(Progress(state="running", phase=evil))


def test_the_strip_has_a_cell_per_step():
    strip = html.strip("CC-p", {2: ", difference 0.1"}, rest=2)
    assert strip.count("<span") - strip.count("va-key") == 6
    assert 'title="step 2: reused, difference 0.1"' in strip
    assert 'aria-label="2 computed, 1 probed, 1 reused"' in strip


def test_the_curve_of_every_shipped_policy():
    for path in shipped_policies().values():
        policy = CachePolicy.load(path)
        for budget in policy.budgets():
            curve = html.curve(policy, budget)
            assert f"{budget} of {policy.num_inference_steps} steps computed" in curve
            assert ("<svg" in curve) == (
                len([p for p in policy.plans.values() if any(p.errors)]) > 1
            )
