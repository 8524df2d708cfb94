"""A plain run teaches where nothing is known of such runs, and is not charged for it."""

from dataclasses import replace

from tiny.wan import wan
from vidaccel import accelerate
from vidaccel.api import engines_of
from vidaccel.clips.generate import generate
from vidaccel.clips.lesson import is_worth_learning, learning_from
from vidaccel.plans import user_folder

STEPS = 12


def _call(case):
    return {**case.kwargs, "num_inference_steps": STEPS}


def test_a_lesson_takes_its_time_off_the_plain_run():
    case = wan()
    with learning_from(case.pipe, _call(case), "auto") as lesson:
        run = generate(case.pipe, _call(case), progress=False)
    assert not engines_of(case.pipe)
    plain, (note,) = lesson.without(replace(run, seconds=100.0, denoising_seconds=90.0))
    spent = 100.0 - plain.seconds
    assert spent > 0 and 90.0 - plain.denoising_seconds == spent
    assert f"without the {spent:.2f} s" in note and "learned from" in note
    assert plain.report is None and len(user_folder.files()) == 1
    assert not is_worth_learning(case.pipe, _call(case), "auto")


def test_nothing_is_learned_for_another_policy():
    case = wan()
    with learning_from(case.pipe, _call(case), "every 2") as lesson:
        run = generate(case.pipe, _call(case), progress=False)
    assert lesson.without(run) == (run, []) and not user_folder.files()


def test_a_run_that_fails_leaves_the_pipeline_as_it_was():
    case = wan()
    try:
        with learning_from(case.pipe, _call(case), "learn"):
            raise RuntimeError("stopped")
    except RuntimeError:
        pass
    assert not engines_of(case.pipe) and not user_folder.files()
    accelerate(case.pipe, policy="every 2", attention=None)
