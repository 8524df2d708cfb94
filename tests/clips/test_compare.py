"""A comparison learns from its plain run where nothing is known of such runs."""

from tiny.wan import wan
from vidaccel.clips import compare as comparing
from vidaccel.clips import lesson
from vidaccel.clips.compare import compare, comparison_table
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


def test_the_clips_are_kept_before_they_are_measured(monkeypatch):
    events = []
    measured = comparing.summary

    def summary(*clips, **options):
        events.append("measured")
        return measured(*clips, **options)

    monkeypatch.setattr(comparing, "summary", summary)
    plain, fast, result = _compare(policy="every 2", keep=lambda *runs: events.append(runs))
    assert events == [(plain, fast), "measured"]
    assert result["cpu_seconds"] == [plain.cpu_seconds, fast.cpu_seconds]
    table = comparison_table(result)
    assert all(f"{title} (worst frame)" in table for title in ("PSNR", "VMAF", "ColorVideoVDP"))
    assert "flicker" in table


def test_the_table_has_cpu_time_where_the_clock_tells_another_speedup():
    _, _, result = _compare(policy="every 2")
    result |= {"clocks_disagree": True, "cpu_seconds": [9.0, 3.0], "cpu_speedup": 3.0}
    result["notes"] = []  # on a busy machine one of them tells both
    assert "CPU time" in comparison_table(result) and "3.00x" in comparison_table(result)
    assert "CPU time" not in comparison_table(result | {"clocks_disagree": False})
