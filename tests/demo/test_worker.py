"""The worker: the clips it makes, their progress, and how it stops."""

import json
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

from tiny.demo import ME, progress_of, saved_run, settings, until
from tiny.hunyuan import hunyuan15
from vidaccel.api import engines_of
from vidaccel.clips import video
from vidaccel.demo import html
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Limits, Settings
from vidaccel.demo.worker import Worker, in_words
from vidaccel.hosts.registry import HOSTS, find_transformers
from vidaccel.plans import user_folder
from vidaccel.plans.policy import CachePolicy


def test_a_run_makes_both_clips_and_publishes_its_progress(queue):
    job = queue.submit(ME, settings())
    progress = progress_of(queue, job)
    phases = [p.phase for p in progress]
    assert [p for i, p in enumerate(phases) if p not in phases[:i] and p != ""][-2:] == [
        "original",
        "comparing",
    ]
    assert {p.state for p in progress} <= {"waiting", "running", "done"}
    # The accelerated clip is there while the original is still being made.
    early = next(p for p in progress if p.saved is not None)
    assert early.phase != "comparing" and early.saved.fidelity is None
    run = progress[-1].saved
    assert set(run.clips) == {"accelerated", "original"}
    assert [p.name for p in run.downloads] == [
        "accelerated.mp4",
        "original.mp4",
        "side-by-side.mp4",
        "run.json",
    ]
    assert run.result["report"]["transformers"][0]["timeline"] == "C-C-C-"
    assert run.result["speedup"] > 0 and 5 < run.fidelity["mean"]["psnr"] < 80
    written = json.loads(run.path("run.json").read_text())
    assert written["settings"]["seed"] == 0 and written["environment"]["packages"]["torch"]
    assert any(p.preview.startswith("data:image/png;base64,") for p in progress)


def test_the_original_is_kept_until_what_it_depends_on_changes(queue):
    few = {"steps": 3}
    first = saved_run(queue, **few)
    assert first.result["original_kept"] is False
    again = saved_run(queue, policy="every 3", **few)
    assert again.result["original_kept"] is True
    assert again.result["seconds"]["original"] == first.result["seconds"]["original"]
    assert again.clips["original"].read_bytes() != b""
    assert np.array_equal(
        video.read_video(again.clips["original"])[0], video.read_video(first.clips["original"])[0]
    )
    for changed in ({"seed": 1}, {"steps": 2}, {"guidance": 4.0}, {"negative_prompt": "blue"}):
        assert saved_run(queue, **few | changed).result["original_kept"] is False, changed
    off = saved_run(queue, acceleration="off", **few)
    assert off.result["original_kept"] is True and set(off.clips) == {"original"}


def test_an_original_of_which_nothing_is_known_comes_first_and_teaches(queue):
    asked = {"acceleration": "balanced", "policy": "auto", "steps": 12}
    progress = progress_of(queue, queue.submit(ME, settings(**asked)))
    assert progress[-1].state == "done", progress[-1].message
    phases = [p.phase for p in progress]
    assert phases.index("original") < phases.index("accelerated") < phases.index("comparing")
    run = progress[-1].saved
    assert "(learned)" in run.result["report"]["transformers"][0]["policy"]
    (note,) = [note for note in run.result["notes"] if "learned from" in note]
    assert "the plain run was learned from" in note and "without the" in note
    assert "the plain run was learned from" in html.numbers(run)
    (file,) = user_folder.files()
    (clip,) = user_folder.measured_clips(CachePolicy.load(file))
    assert clip.psnr == pytest.approx(run.fidelity["mean"]["psnr"])
    again = progress_of(queue, queue.submit(ME, settings(**asked, seed=1)))
    phases = [p.phase for p in again]
    assert phases.index("accelerated") < phases.index("original")
    assert not any("learned from" in note for note in again[-1].saved.result["notes"])
    assert len(user_folder.files()) == 1
    assert len(user_folder.measured_clips(CachePolicy.load(file))) == 2


def test_stop_ends_a_run_within_a_step_and_the_next_one_is_clean(queue, pipe):
    expected = saved_run(queue, compare=False)
    for phase in ("accelerated", "original"):
        job = queue.submit(ME, settings(steps=60, seed=3))
        until(lambda j=job, p=phase: j.progress.phase == p and j.progress.step >= 2)
        queue.stop(job)
        progress = progress_of(queue, job)
        at = job.progress.step
        assert progress[-1].state == "stopped"
        assert progress[-1].message == f"stopped at step {at} of 60" and at < 60
        assert (progress[-1].saved is not None) == (phase == "original")
        assert not engines_of(pipe)
        assert all(not m._forward_pre_hooks for m in pipe.transformer.modules())
    again = saved_run(queue, compare=False)
    assert np.array_equal(
        video.read_video(again.clips["accelerated"])[0],
        video.read_video(expected.clips["accelerated"])[0],
    )


@pytest.fixture
def silent():
    """A pipeline without a callback at the end of a step; prompts mean nothing to it."""
    case = hunyuan15()
    given = {name: value for name, value in case.kwargs.items() if "prompt" in name}

    def encode_prompt(prompt=None, **_):
        prefix = "negative_" if prompt in (None, "", [""]) else ""
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        return tuple(given[prefix + name] for name in names)

    case.pipe.encode_prompt = encode_prompt
    assert "callback_on_step_end" not in signature(type(case.pipe).__call__).parameters
    return case.pipe


def test_a_pipeline_without_step_callbacks_is_followed_and_stopped(silent, tmp_path):
    queue = JobQueue(Worker(lambda: silent, "silent"), RunStore(tmp_path), Limits())
    asked = {"guidance": None, "width": 16, "height": 16}
    try:
        progress = progress_of(queue, queue.submit(ME, settings(**asked)))
        expected = progress[-1].saved
        assert progress[-1].state == "done", progress[-1].message
        assert any(p.preview.startswith("data:image/png;base64,") for p in progress)
        for phase in ("accelerated", "original"):
            fields = asked | {"steps": 90, "seed": 3}
            job = queue.submit(ME, settings(**fields))
            until(lambda j=job, p=phase: j.progress.phase == p and j.progress.step >= 2)
            queue.stop(job)
            assert progress_of(queue, job)[-1].state == "stopped"
            assert 2 <= job.progress.step < 90 and job.progress.eta > 0
            assert not engines_of(silent)
            assert all(not m._forward_pre_hooks for m in silent.transformer.modules())
        again = saved_run(queue, **asked)
    finally:
        queue.close()
    for name, clip in again.clips.items():
        assert np.array_equal(video.read_video(clip)[0], video.read_video(expected.clips[name])[0])


def test_sparse_attention_is_set_shown_and_kept_with_the_run(queue):
    sparse = {"top_p": 0.5, "dense_steps": 2, "min_tokens": 0}
    run = saved_run(queue, compare=False, policy="all", attention="svg2", svg2=sparse)
    part = run.result["report"]["transformers"][0]["attention"]
    assert 0 < part["density"] < 1 and part["dense_calls"]["first steps"] > 0
    assert "top_p=0.5" in part["settings"] and "dense_steps=2" in part["settings"]
    numbers = html.numbers(run)
    assert f'data-density="{part["density"]:.4f}"' in numbers
    assert numbers.count("va-layer") == len(part["layers"]) > 2
    assert f"{part['sparse_calls']} sparse calls" in numbers and "of the first steps" in numbers
    assert Settings.from_file(run.clips["accelerated"]).svg2.top_p == 0.5
    assert queue.store.load(ME, run.id).settings == run.settings
    assert run.settings.original() == settings(policy="all").original()
    # The length from which on attention is sparse is the library's own where none is given.
    run = saved_run(queue, compare=False, policy="all", attention="svg2", svg2={})
    assert "of too few video tokens to gain" in html.numbers(run)
    run = saved_run(queue, compare=False, attention="off")
    assert "attention: dense" in html.numbers(run)


def test_the_words_on_whether_attention_can_be_sparse(pipe, monkeypatch):
    worker = Worker(lambda: pipe, "tiny-wan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(list(worker.attention(patience=0.0))) == 1  # it does not load
    words = worker.attention()
    assert "still being loaded" in next(words)
    worker.load()
    assert "no GPU here" in next(words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ["kernels for heads of size 64" in line for line in worker.attention()] == [True]
    monkeypatch.setattr("vidaccel.svg2.support.why_not_on", lambda *_: "")
    assert ["shorter than 16384 tokens" in line for line in worker.attention()] == [True]
    (transformer, host), *_ = find_transformers(pipe).values()
    linear = replace(host, attention=None, attention_note="linear attention")
    monkeypatch.setitem(HOSTS, type(transformer).__name__, linear)
    words = list(worker.attention())
    assert words == ["Attention stays dense with this model: linear attention."]


def test_errors_in_words():
    asked = settings()
    assert "too little memory for 48x48" in in_words(torch.OutOfMemoryError("CUDA ..."), asked)
    assert in_words(ValueError("no such size\nmore"), asked) == "no such size"
    assert in_words(KeyError("x"), asked) == "KeyError: 'x'"
