"""The pictures of the page."""

from tiny.demo import SMALL
from vidaccel.demo import html
from vidaccel.demo.job_queue import Progress
from vidaccel.demo.run_store import SavedRun
from vidaccel.demo.settings import Settings
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
            errors = [p for p in policy.plans.values() if any(p.errors)]
            predicted = [b for b in policy.budgets() if (policy.predicted_psnr(b) or 0) > 0]
            assert ("<svg" in curve) == (len(errors) > 1 or len(predicted) > 1)
            assert ("PSNR in dB" in curve) == (len(errors) < 2 < len(predicted))


def run_of(tmp_path, **result):
    both = {"original": 12.0, "accelerated": 4.0}
    found = {"seconds": both, "denoising_seconds": both, "speedup": 3.0, **result}
    return SavedRun(tmp_path, Settings.of(SMALL), found)


def test_the_numbers_have_every_measure_with_its_worst_frame(tmp_path):
    values = {"psnr": 40.0, "ssim": 0.99, "vmaf": 95.0, "cvvdp": 9.5}
    closeness = {
        "mean": values,
        "worst": {name: {"frame": 1, "value": value - 0.5} for name, value in values.items()},
        "flicker": [3.0, 3.25],
        "unavailable": {"lpips": "no <weights>"},
    }
    cpu = {"original": 11.0, "accelerated": 2.0}
    text = html.numbers(run_of(tmp_path, closeness=closeness, cpu_seconds=cpu, notes=["busy"]))
    assert "95.0" in text and "VMAF, worst frame 94.5" in text
    assert "9.50 JOD" in text and "ColorVideoVDP, worst frame 9.00 JOD" in text
    assert "LPIPS is not available: no &lt;weights&gt;" in text
    assert "CPU time" in text and "11.00 s" in text and "busy" in text


def test_runs_of_before_have_no_cpu_time(tmp_path):
    assert "CPU time" not in html.numbers(run_of(tmp_path))
