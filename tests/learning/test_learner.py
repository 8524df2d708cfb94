"""Learning from whole generations: what is learned, kept and used, and what never harms a run."""

import threading
import warnings

import pytest
import torch

from tiny.wan import wan, wan22, wan_unipc
from vidaccel import accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.segment_errors import deviations
from vidaccel.learning import learner
from vidaccel.learning.token_slots import TokenSlots
from vidaccel.plans import user_folder
from vidaccel.plans.policy import CachePolicy

STEPS = 12


def _learn(case, **more):
    accelerate(case.pipe, policy="learn", attention=None, **more)
    return case.run(num_inference_steps=STEPS)


def _part(case):
    return report(case.pipe).transformers[-1]


def _only_policy():
    (file,) = user_folder.files()
    return CachePolicy.load(file)


def test_the_first_run_is_plain_and_the_next_one_reuses_what_it_has_taught():
    case = wan()
    plain = case.run(num_inference_steps=STEPS)
    assert torch.equal(_learn(case), plain)
    part = _part(case)
    assert part.timeline == "C" * STEPS and "to learn from this run" in part.policy
    assert any("was learned from" in note for note in part.notes)
    policy = _only_policy()
    assert policy.provenance == "learned" and policy.budgets()[-1] == STEPS
    assert policy.guidance.scale == case.pipe.guidance_scale and policy.latents
    case.run(num_inference_steps=STEPS)
    part = _part(case)
    assert part.timeline.count("C") == 4 and "(learned)" in part.policy


def test_another_process_uses_it_and_auto_does_too():
    _learn(wan())
    for policy in ("learn", "auto"):
        case = wan()  # nothing in memory is shared with the one that was learned from
        accelerate(case.pipe, policy=policy, attention=None)
        case.run(num_inference_steps=STEPS)
        assert "(learned)" in _part(case).policy
        assert len(user_folder.files()) == 1


@pytest.mark.parametrize("make", [wan, wan_unipc], ids=["euler", "unipc"])
def test_a_step_reused_alone_moves_the_latents_as_learned(make, monkeypatch):
    monkeypatch.setattr(learner, "PASSES", 1000)  # every token
    tables = {}
    monkeypatch.setattr(
        learner,
        "learned_edges",
        lambda holds, lines, *rest, **more: tables.update(holds=holds, lines=lines),
    )
    case = make()
    _learn(case)
    restore(case.pipe)
    call = {**case.kwargs, "num_inference_steps": STEPS}
    with Replayer(case.pipe, call) as replayer:
        exact = deviations(replayer, 4, lines=True)
    # UniPC corrects each step by the one after it, so its sums are not exact.
    close = {"rel": 1e-3} if make is wan else {"rel": 0.6}
    for start in range(STEPS - 2):
        alone = start, start + 2
        assert tables["holds"][alone] == pytest.approx(exact.holds[alone], **close)
        for gap in (1, 2, 4):
            if gap <= start and make is wan:
                # Damped, it lies between the held residual and the full line.
                row = [exact.holds[alone], *exact.lines[(*alone, start - gap)]]
                found = tables["lines"][(*alone, start - gap)]
                assert 0.97 * min(row) <= found <= 1.03 * max(row)


def test_a_segment_of_several_steps_is_near_what_a_run_shows(monkeypatch):
    monkeypatch.setattr(learner, "PASSES", 1000)
    tables = {}
    monkeypatch.setattr(
        learner, "learned_edges", lambda holds, *rest, **more: tables.update(holds=holds)
    )
    case = wan()
    _learn(case)
    restore(case.pipe)
    with Replayer(case.pipe, {**case.kwargs, "num_inference_steps": STEPS}) as replayer:
        exact = deviations(replayer, 6).holds
    for segment, found in exact.items():
        assert tables["holds"][segment] == pytest.approx(found, rel=0.1)


def test_no_segment_reaches_over_the_switch_of_two_transformers():
    case = wan22()
    plain = case.run(num_inference_steps=STEPS)
    assert torch.equal(_learn(case), plain)
    policy = _only_policy()
    parts = [part.timeline for part in report(case.pipe).transformers]
    assert sum(len(part) for part in parts) == STEPS
    switch = len(parts[0])
    assert 0 < switch < STEPS
    assert not [e for e in policy.edges if e.start < switch < e.end]
    assert not [
        e for e in policy.edges if e.previous is not None and e.previous < switch <= e.start
    ]


def test_other_kinds_of_run_are_learned_for_themselves():
    case = wan()
    _learn(case)
    case.run(num_inference_steps=STEPS + 2)
    assert _part(case).timeline == "C" * (STEPS + 2)
    case.run(num_inference_steps=STEPS, guidance_scale=2.5)
    assert _part(case).timeline == "C" * STEPS
    case.run(**{**case.other, "num_inference_steps": STEPS})
    assert _part(case).timeline == "C" * STEPS
    assert len(user_folder.files()) == 4
    accelerate(case.pipe, attention=None)  # auto takes the nearest that there is
    case.run(num_inference_steps=STEPS, guidance_scale=7.5)
    assert "learned with guidance scale" in _part(case).policy


def test_short_runs_are_computed_whole_and_teach_nothing():
    case = wan()
    accelerate(case.pipe, policy="learn", attention=None)
    case.run(num_inference_steps=6)
    assert "few" in _part(case).policy and not user_folder.files()


def test_a_run_that_ends_early_leaves_nothing_behind():
    case = wan()
    accelerate(case.pipe, policy="learn", attention=None)

    def stop(pipe, step, timestep, kwargs):
        if step == 5:
            raise RuntimeError("stopped")
        return kwargs

    with pytest.raises(RuntimeError, match="stopped"):
        case.run(num_inference_steps=STEPS, callback_on_step_end=stop)
    assert not user_folder.files()

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 5
        return kwargs

    case.run(num_inference_steps=STEPS, callback_on_step_end=interrupt)
    assert not user_folder.files()
    case.run(num_inference_steps=STEPS)
    assert _only_policy().provenance == "learned"


def test_a_prompt_that_changes_on_the_way_is_not_learned_from():
    case = wan()
    accelerate(case.pipe, policy="learn", attention=None)

    def change(pipe, step, timestep, kwargs):
        if step == 5:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] + 1.0
        return kwargs

    case.run(
        num_inference_steps=STEPS,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert not user_folder.files()
    assert any("changed in the middle" in note for note in _part(case).notes)


@pytest.mark.parametrize("how", ["a file in its place", "no permission to write", "full"])
def test_a_folder_that_cannot_be_written_is_told_and_harms_nothing(how, monkeypatch, tmp_path):
    case = wan()
    plain = case.run(num_inference_steps=STEPS)
    if how == "a file in its place":
        (tmp_path / "vidaccel-home").write_text("taken")
    else:
        error = PermissionError(13, "Permission denied")
        if how == "full":
            error = OSError(28, "No space left on device")

        def fail(*_):
            raise error

        monkeypatch.setattr("vidaccel.files.os.replace", fail)
    assert torch.equal(_learn(case), plain)
    (note,) = [note for note in _part(case).notes if "nothing was learned" in note]
    assert "cannot write policy" in note
    monkeypatch.undo()
    # What cannot be learned is not tried again: such runs go on as with "auto".
    case.run(num_inference_steps=STEPS)
    assert "generic schedule" in _part(case).policy


def test_an_error_of_ours_ends_the_lesson_and_not_the_run(monkeypatch):
    case = wan()
    plain = case.run(num_inference_steps=STEPS)

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory\nwith details")

    monkeypatch.setattr(TokenSlots, "evaluate", fail)
    assert torch.equal(_learn(case), plain)
    assert any("OutOfMemoryError: out of memory" in note for note in _part(case).notes)


def test_damaged_foreign_and_newer_files_are_left_out_with_a_word():
    _learn(wan())
    (file,) = user_folder.files()
    text = file.read_text()
    others = {
        "a": text[: len(text) // 2],
        "b": '{"something": "else"}',
        "c": text.replace('"schema_version": "1.', '"schema_version": "2.'),
    }
    for name, content in others.items():
        file.with_name(f"WanTransformer3DModel-{name}.json").write_text(content)
    case = wan()
    accelerate(case.pipe, attention=None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        case.run(num_inference_steps=STEPS)
    assert "(learned)" in _part(case).policy
    assert len([w for w in told if "left out" in str(w.message)]) == len(others)


def test_two_threads_learn_the_same_at_once():
    shared = [wan(), wan()]
    threads = [threading.Thread(target=_learn, args=(case,)) for case in shared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _only_policy().provenance == "learned"
    assert len(list(user_folder.folder().iterdir())) == 1  # no partial file is left


def test_the_folder_is_bounded(monkeypatch):
    monkeypatch.setattr(user_folder, "MOST_FILES", 2)
    case = wan()
    accelerate(case.pipe, policy="learn", attention=None)
    for steps in (8, 9, 10, 11):
        case.run(num_inference_steps=steps)
    assert len(user_folder.files()) == 2
    assert any("11-steps" in file.name for file in user_folder.files())


def test_families_teach_or_say_why_not(case):
    plain = case.run(num_inference_steps=STEPS)
    assert torch.equal(_learn(case), plain)
    notes = " ".join(_part(case).notes)
    print(notes)
    assert "was learned from" in notes or "nothing was learned from this run" in notes


def test_what_was_learned_in_low_precision_is_another_kind():
    case = wan()
    _learn(case, precision="int8")
    assert "(learned)" not in _part(case).policy
    assert _only_policy().model.precision
    _learn(case)  # in full precision there is nothing yet
    assert _part(case).timeline == "C" * STEPS and len(user_folder.files()) == 2


def test_few_files_of_other_steps_are_read(monkeypatch):
    monkeypatch.setattr(user_folder, "MOST_OTHERS", 2)
    case = wan()
    accelerate(case.pipe, policy="learn", attention=None)
    for steps in (9, 10, 11, STEPS):
        case.run(num_inference_steps=steps)
    read = []
    monkeypatch.setattr(
        user_folder, "_load", lambda file, *_: read.append(file) or CachePolicy.load(file)
    )
    run = engines_of(case.pipe)["transformer"].generation.run
    user_folder.policies(run)
    assert len(read) == 3 and sum(f"-{STEPS}-steps-" in file for file in read) == 1
