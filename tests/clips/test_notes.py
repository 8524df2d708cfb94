"""Notes on the numbers of a clip."""

from types import SimpleNamespace

import numpy as np
import pytest

from tiny.hunyuan import hunyuan
from tiny.wan import wan
from vidaccel.clips.generate import Run
from vidaccel.clips.notes import (
    clocks_disagree,
    cpu_speedup,
    notes_before,
    notes_on,
    notes_on_times,
)

CALL = {"prompt": "x", "num_frames": 9, "height": 32, "width": 48}


def notes(timeline="C-C-", *, sparse=0, device="cpu", told=(), shape=(9, 32, 48, 3)):
    attention = {"sparse_calls": sparse}
    part = {"timeline": timeline, "attention": attention, "notes": list(told)}
    run = Run(np.zeros(shape, np.uint8), 1.0, 1.0, {"transformers": [part]})
    return notes_on(SimpleNamespace(device=device), CALL, run)


def test_a_run_as_asked_for_has_none():
    assert notes() == notes("CpCp") == notes(sparse=4, device="cuda:0") == []


def test_that_nothing_was_reused():
    [note] = notes("CCCC")
    assert note.startswith("nothing was reused")
    assert notes("CCCC", told=["nothing was reused at threshold 0.1: ..."]) == []


def test_that_sparse_attention_costs_time_on_a_cpu():
    [note] = notes(sparse=4)
    assert "sparse attention" in note and "costs time" in note


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, 32, 48, 3), "made 10 frames, not 9"),
        ((9, 16, 48, 3), "made 16 rows, not 32"),
        ((9, 32, 64, 3), "made 64 columns, not 48"),
    ],
)
def test_another_size_than_asked_for(shape, message):
    [note] = notes(shape=shape)
    assert message in note


def test_a_plain_run_has_no_report():
    run = Run(np.zeros((9, 32, 48, 3), np.uint8), 1.0, None, None)
    assert notes_on(SimpleNamespace(device="cpu"), CALL, run) == []


def pipeline(each, default, name="vae_scale_factor_temporal"):
    class Pipe:
        def __call__(self, prompt, num_frames=default):
            """Make a clip."""

    pipe = Pipe()
    setattr(pipe, name, each)
    return pipe


@pytest.mark.parametrize(
    ("pipe", "asked", "made"),
    [
        (pipeline(2, 81), 10, "9 or 11"),
        (pipeline(4, 81), 12, "9 or 13"),
        (pipeline(4, 81), 13, None),
        (pipeline(8, 121, "vae_temporal_compression_ratio"), 24, "17 or 25"),
        (pipeline(4, 88), 88, None),
        (pipeline(4, None), 10, None),
        (SimpleNamespace(), 10, None),
    ],
    ids=range(7),
)
def test_frames_that_cannot_be_are_told_before_the_run(pipe, asked, made):
    notes = notes_before(pipe, {"prompt": "x", "num_frames": asked})
    assert len(notes) == (made is not None)
    if made:
        assert notes[0].endswith(f"of the {asked} asked for it makes {made}")
    assert notes_before(pipe, {"prompt": "x"}) == []


@pytest.mark.parametrize("make", [wan, hunyuan], ids=lambda make: make.__name__)
def test_what_is_made_of_a_number_of_frames_is_one_of_those_told(make):
    case = make()
    frames = {"num_frames": case.kwargs["num_frames"] + 1}
    (note,) = notes_before(case.pipe, {**case.kwargs, **frames})
    clip = case.run(**frames, output_type="pt", num_inference_steps=1)  # [B, F, C, H, W]
    assert str(clip.shape[1]) in note.rpartition("makes ")[2].split(" or ")


def timed(seconds, cpu_seconds, others=None):
    return Run(np.zeros((1, 8, 8, 3), np.uint8), seconds, None, None, cpu_seconds, others)


def timing_notes(plain, fast, **options):
    return notes_on_times({"plain": plain, "accelerated": fast}, **{"on_cpu": True} | options)


def test_clocks_that_agree_on_an_idle_machine_need_no_note():
    assert timing_notes(timed(12, 12, 0.1), timed(4, 4, 0.0), cores=2) == []
    # Two threads, and 9 % between the clocks.
    assert timing_notes(timed(12, 24), timed(4.36, 8), cores=2) == []


def test_cpu_time_is_told_where_the_clock_tells_another_speedup():
    plain, fast = timed(12, 12), timed(8, 4)
    [note] = timing_notes(plain, fast, cores=2)
    assert "by CPU time the speedup is 3.00x, by the clock 1.50x" in note and "10%" in note
    assert timing_notes(plain, fast, on_cpu=False) == []  # a GPU works while CPU time stands still


def test_runs_without_cpu_time_are_judged_by_the_clock_alone():
    assert cpu_speedup(timed(12, None), timed(4, 4)) is None
    assert not clocks_disagree(timed(12, None), timed(8, 4))


def test_a_busy_machine_is_told():
    [note] = timing_notes(timed(10, 10, 14), timed(4, 4, 0.1), cores=2)
    assert "busy" in note
    assert "of its 2 cores other programs used 1.4 during the plain run and 0.0" in note
    # The same programs are a small part of a large machine.
    assert timing_notes(timed(10, 10, 14), timed(4, 4, 0.1), cores=16) == []
