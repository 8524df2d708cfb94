"""A comparison learns from its plain run where nothing is known of such runs."""

from tiny.wan import wan
from vidaccel.clips import lesson
from vidaccel.clips.compare import compare
from vidaccel.engine.stats import StepKind
from vidaccel.plans import user_folder


def _compare(steps=12, **acceleration):
    case = wan()
    call = {**case.kwargs, "num_inference_steps": steps}
    return compare(case.pipe, call, progress=False, attention=None, **acceleration)


def test_the_plain_run_teaches_the_accelerated_one():
    plain, _, result = _compare()
    assert plain.report is None or result["steps_computed"][1] < 12
    assert result["steps_computed"][1] == 4
    assert any("learned from" in note for note in result["notes"])
    assert "(learned" in result["report"]["transformers"][0]["policy"]
    assert len(user_folder.files()) == 1


def test_what_is_known_is_not_learned_again(monkeypatch):
    _compare()
    monkeypatch.setattr(lesson, "accelerate", None)
    _, _, result = _compare()
    assert not any("learned from" in note for note in result["notes"])


def test_other_policies_and_short_runs_teach_nothing():
    _, _, result = _compare(policy="every 2")
    assert result["steps_computed"][1] == 6
    _compare(steps=4)
    assert not user_folder.files()
    timeline = result["report"]["transformers"][0]["timeline"]
    assert timeline.count(StepKind.COMPUTED) == 6
