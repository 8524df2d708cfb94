"""What a comparison has shown is added to the learned policy whose plan was compared."""

import pytest

from tiny.wan import wan
from vidaccel import DBCache, accelerate, report
from vidaccel.clips.compare import compare
from vidaccel.clips.measurement import learned_plan
from vidaccel.plans import user_folder
from vidaccel.plans.policy import CachePolicy

STEPS = 12


def _compare(case, seed=0, **acceleration):
    call = {**case.kwargs, "num_inference_steps": STEPS}
    return compare(case.pipe, call, seed=seed, progress=False, attention=None, **acceleration)[2]


def _policy():
    (file,) = user_folder.files()
    return CachePolicy.load(file)


def test_comparisons_add_to_what_is_known_of_the_plan():
    case = wan()
    first = _compare(case)
    (clip,) = user_folder.measured_clips(_policy())
    assert clip.budget == 4 and clip.seed == 0
    assert clip.psnr == pytest.approx(first["metrics"]["psnr"])
    assert clip.speedup == pytest.approx(first["speedup"])
    _compare(case)
    assert len(user_folder.measured_clips(_policy())) == 1  # the same clip again
    second = _compare(case, seed=1)
    assert len(user_folder.measured_clips(_policy())) == 2
    told = second["report"]["transformers"][0]["policy"]
    assert "dB predicted" in told and "dB measured on 1 clip" in told
    _compare(case, seed=2, preset="quality")
    assert {clip.budget for clip in user_folder.measured_clips(_policy())} == {4, 6}


def test_what_a_cache_changed_and_plans_of_others_are_not_added():
    case = wan()
    _compare(case)
    before = user_folder.measured_clips(_policy())
    accelerate(case.pipe, policy="auto", cache=DBCache(threshold=0.01), attention=None)
    case.run(num_inference_steps=STEPS)
    assert learned_plan(case.pipe) is None
    _compare(case, seed=1, policy="every 3")
    assert learned_plan(case.pipe) is None
    assert user_folder.measured_clips(_policy()) == before
    accelerate(case.pipe, policy="auto", attention=None)
    case.run(num_inference_steps=STEPS)
    ran = learned_plan(case.pipe)
    assert ran is not None and ran.policy == _policy()
    assert report(case.pipe).transformers[0].timeline.count("C") == len(ran.plan.steps)


def test_a_folder_that_cannot_be_written_harms_nothing(monkeypatch):
    case = wan()
    _compare(case)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidaccel.plans.measured.write_text", refuse)
    result = _compare(case, seed=1)
    assert any("could not be kept" in note and "No space left" in note for note in result["notes"])
