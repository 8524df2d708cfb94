"""Attention is sparse only where that works and pays: the trial call, and the race with dense."""

import re

import pytest
import torch

from tiny import STEPS
from tiny.base import LAYERS
from tiny.hunyuan import hunyuan
from tiny.machine import card, offloaded_to
from tiny.wan import wan, wan_transformer
from vidaccel import SVG2, accelerate, report
from vidaccel.api import engines_of
from vidaccel.errors import AttentionError
from vidaccel.hosts.registry import HOSTS
from vidaccel.kernels.semantic_attention import semantic_attention
from vidaccel.resolve import attention_of
from vidaccel.svg2 import gate, support
from vidaccel.svg2.gate import Gate, Verdict, why_kernels_fail
from vidaccel.svg2.tokens import Tokens

CPU = torch.device("cpu")
SETTINGS = SVG2(
    query_clusters=4, key_clusters=8, top_p=0.9, min_tokens=0, dense_steps=0, dense_layers=0
)
SIZE = {"height": 64, "width": 64}


def clock(sparse, dense):
    """A clock by which the calls take so many milliseconds: a sparse one gives [B, H, S, D]."""
    asked = []

    def timed(compute, device):
        out = compute()
        # The tiny models have more tokens than heads.
        seconds = (sparse if out.shape[1] < out.shape[2] else dense) / 1e3
        asked.append(seconds)
        return out, seconds

    timed.asked = asked
    return timed


def guarded(case, clock, method=semantic_attention):
    """Sparse attention behind a gate, on the CPU."""
    accelerate(case.pipe, policy=None, attention=SETTINGS)
    for engine in engines_of(case.pipe).values():
        engine.attention.gate, engine.attention.method = Gate(clock), method
    return case


def told(case):
    return report(case.pipe).transformers[0].attention


# The trial call.


@pytest.mark.parametrize("text", [False, True], ids=["video", "with text"])
@pytest.mark.parametrize(
    "settings",
    [SVG2(), SVG2.faithful("wan2.1-t2v-14b-720p"), SVG2(int8_qk=True, query_metric=True)],
    ids=["default", "faithful", "int8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_passes_where_attention_is_right(settings, text, dtype):
    assert why_kernels_fail(CPU, 64, dtype, settings, text=text) == ""


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda q, *_, **__: q * float("nan"), r"a trial call of the kernels was wrong by nan%"),
        (lambda q, *_, **__: torch.zeros_like(q), r"was wrong by 100.0%"),
        (lambda q, k, v, *_, **__: v.mean(2, keepdim=True).expand_as(q), r"was wrong by \d"),
    ],
    ids=["NaN", "zeros", "means"],
)
def test_a_trial_with_wrong_numbers(attention, reason):
    found = why_kernels_fail(CPU, 64, torch.float16, SVG2(), attention=attention)
    assert re.search(reason, found)


def broken(*args, **options):
    raise RuntimeError("ptxas died\nwith a long log")


def test_a_trial_that_does_not_compile():
    found = why_kernels_fail(CPU, 64, torch.float16, SVG2(), attention=broken)
    assert found == "a trial call of the kernels failed (RuntimeError: ptxas died)"


def test_a_failing_trial_is_told_by_auto_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(support, "HEAD_DIMS", (12,))
    card(monkeypatch)
    tried = []

    def fails(device, head_dim, dtype, settings, **options):
        tried.append((device.type, head_dim, dtype))
        return "a trial call of the kernels failed (RuntimeError: ptxas died)"

    monkeypatch.setattr(gate, "why_kernels_fail", fails)
    case = wan()
    offloaded_to("cuda", case.pipe.transformer)
    with pytest.raises(AttentionError, match=r"on cuda: a trial .*died\); pass attention"):
        accelerate(case.pipe, policy=None, attention=SETTINGS)
    assert not engines_of(case.pipe)
    assert tried == [("cuda", 12, torch.float32)]
    sparse = attention_of("auto", case.pipe.transformer, HOSTS["WanTransformer3DModel"])
    query, tokens = OnGPU(), Tokens(20_000, 0, 20_000)
    assert "ptxas died" in sparse.why_dense_here(query, tokens, False)
    assert "ptxas died" in sparse.why_dense_here(query, tokens, False)
    assert len(tried) == 2, "once for a kind of call"


class OnGPU:
    """What sparse attention looks at of queries on a GPU."""

    is_cuda, requires_grad, device = True, False, torch.device("cuda:1")
    shape, dtype = (1, 20_000, 2, 12), torch.float16


def test_a_model_that_does_not_tell_its_heads_is_tried_when_it_runs(monkeypatch):
    monkeypatch.setattr(gate, "why_kernels_fail", broken)
    model, row = wan_transformer(), HOSTS["WanTransformer3DModel"]
    monkeypatch.setattr(gate, "head_size", lambda *_: None)
    assert gate.why_trial_fails(CPU, model, row, SVG2()) == ""
    monkeypatch.undo()
    assert gate.why_trial_fails(CPU, model.double(), row, SVG2()) == ""


# The race.


def test_where_sparse_wins_nothing_changes_but_the_report():
    free = wan()
    accelerate(free.pipe, policy=None, attention=SETTINGS)
    expected = free.run(**SIZE)
    time = clock(sparse=2, dense=5)
    case = guarded(wan(), time)
    assert torch.equal(case.run(**SIZE), expected)
    found = told(case)
    assert found.sparse_calls == STEPS * LAYERS * 2 and not found.dense_calls
    (verdict,) = found.verdicts
    assert "float32: 2 ms sparse, 5 ms dense, " in verdict and verdict.endswith("% off dense")
    assert verdict in str(report(case.pipe))
    once = len(time.asked)
    assert once == 2 * gate.TIMES
    assert torch.equal(case.run(**SIZE), expected)
    assert len(time.asked) == once, "held against dense once, not again in a later generation"


def test_where_dense_is_faster_attention_stays_dense_and_says_so():
    plain = wan().run(**SIZE)
    case = guarded(wan(), clock(sparse=5, dense=2))
    assert torch.equal(case.run(**SIZE), plain)
    found = told(case)
    ((reason, calls),) = found.dense_calls.items()
    assert calls == STEPS * LAYERS * 2 and not found.sparse_calls and found.bytes_held == 0
    assert reason.startswith("not faster for 1x") and "5 ms sparse, 2 ms dense" in reason
    assert reason in str(report(case.pipe))


def test_each_shape_is_judged_for_itself():
    time = clock(sparse=5, dense=2)
    case = guarded(wan(), time)
    case.run(**SIZE)
    case.run(height=32, width=32)
    assert len(told(case).verdicts) == 2 and len(told(case).dense_calls) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out * float("nan"), "is nan% off dense attention"),
        (lambda out: torch.zeros_like(out), "is 100% off dense attention"),
        (lambda out: out.index_fill(2, torch.tensor([5]), float("inf")), "off dense attention"),
    ],
    ids=["NaN", "zeros", "one bad row"],
)
def test_wrong_numbers_reach_no_picture(spoil, reason):
    plain = wan().run(**SIZE)

    def method(*args, **text):
        return spoil(semantic_attention(*args, **text))

    case = guarded(wan(), clock(sparse=1, dense=2), method)
    assert torch.equal(case.run(**SIZE), plain)
    ((found, _),) = told(case).dense_calls.items()
    assert reason in found


def test_a_call_that_fails_on_its_shape_leaves_the_generation_whole():
    plain = wan().run(**SIZE)
    case = guarded(wan(), clock(sparse=1, dense=2), broken)
    assert torch.equal(case.run(**SIZE), plain)
    ((reason, calls),) = told(case).dense_calls.items()
    assert "failed (RuntimeError: ptxas died)" in reason and calls == STEPS * LAYERS * 2


def test_text_beside_the_video():
    case = guarded(hunyuan(), clock(sparse=1, dense=2))
    case.run(**SIZE)
    found = told(case)
    assert found.sparse_calls and len(found.verdicts) == 1


def test_auto_has_a_gate_and_an_svg2_has_none(monkeypatch):
    monkeypatch.setattr(support, "HEAD_DIMS", (12,))
    card(monkeypatch)
    model, row = wan_transformer(), HOSTS["WanTransformer3DModel"]
    assert isinstance(attention_of("auto", model, row).gate, Gate)
    assert attention_of(SETTINGS, model, row).gate is None


def test_the_clock_of_the_device():
    out, seconds = gate.seconds_on(lambda: torch.ones(3), CPU)
    assert out.sum() == 3 and seconds >= 0


def test_a_verdict_says_what_counts_first():
    assert Verdict("x", 1.0, 2.0, 0.1).why_dense == ""
    assert "50%" not in Verdict("x", 1.0, 2.0, gate.CALL_ERROR).why_dense
    assert "90% off" in Verdict("x", 2.0, 1.0, 0.9).why_dense
    assert "not faster" in Verdict("x", 2.0, 2.0, 0.1).why_dense
    assert "failed (E)" in Verdict("x", failed="E").why_dense
