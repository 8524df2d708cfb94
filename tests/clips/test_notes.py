"""Notes on the numbers of a clip."""

from types import SimpleNamespace

import numpy as np
import pytest

from vidaccel.clips.generate import Run
from vidaccel.clips.notes import notes_on

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
