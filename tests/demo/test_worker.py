"""What runs behind the demo page, without a page."""

import json
import threading
import time
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

from tiny.hunyuan import hunyuan15
from vidaccel.api import engines_of
from vidaccel.clips import video
from vidaccel.clips.generate import load_pipeline
from vidaccel.demo import html as panels
from vidaccel.demo import job_queue as jobs
from vidaccel.demo.eta import Countdown
from vidaccel.demo.job_queue import JobQueue, Progress
from vidaccel.demo.preview import Preview, data_uri
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Limits, Settings, policy_argument, with_one_plan
from vidaccel.demo.worker import Worker, in_words
from vidaccel.errors import (
    ModelError,
    PlanError,
    PolicyError,
    QueueFullError,
    SettingsError,
    VideoError,
)
from vidaccel.hosts.registry import HOSTS, find_transformers
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies
from vidaccel.svg2.settings import SVG2

PROMPT = "a red striped circle moving right on a navy dotted background"
SMALL = {"prompt": PROMPT, "width": 48, "height": 48, "frames": 5, "steps": 6, "guidance": 5.0}
ME, YOU = "1" * 32, "2" * 32


def settings(**fields):
    return Settings.of(SMALL | {"acceleration": "custom", "policy": "every 2"} | fields)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(device="cpu")


@pytest.fixture
def studio(pipe, tmp_path):
    studio = JobQueue(Worker(lambda: pipe, "tiny-wan"), RunStore(tmp_path / "runs"), Limits(), 2)
    yield studio
    studio.close()


def finish(studio, job):
    """All progress of a job."""
    return list(studio.follow(job))


def last(studio, owner=ME, **fields):
    progress = finish(studio, studio.submit(owner, settings(**fields)))[-1]
    assert progress.state == "done", progress.message
    return progress.finished


def test_a_run_makes_both_clips_and_tells_how_far_it_is(studio):
    job = studio.submit(ME, settings())
    told = finish(studio, job)
    phases = [p.phase for p in told]
    assert [p for i, p in enumerate(phases) if p not in phases[:i] and p != ""][-2:] == [
        "original",
        "comparing",
    ]
    assert {p.state for p in told} <= {"waiting", "running", "done"}
    # The accelerated clip is there while the original is still being made.
    early = next(p for p in told if p.finished is not None)
    assert early.phase != "comparing" and "fidelity" not in early.finished.result
    run = told[-1].finished
    assert set(run.clips) == {"accelerated", "original"}
    assert [p.name for p in run.downloads] == [
        "accelerated.mp4",
        "original.mp4",
        "side-by-side.mp4",
        "run.json",
    ]
    assert run.result["report"]["transformers"][0]["timeline"] == "C-C-C-"
    assert run.result["speedup"] > 0 and 5 < run.result["fidelity"]["mean"]["psnr"] < 80
    written = json.loads(run.path("run.json").read_text())
    assert written["settings"]["seed"] == 0 and written["environment"]["packages"]["torch"]
    assert any(p.preview.startswith("data:image/png;base64,") for p in told)


def test_the_clip_carries_the_settings_that_make_it_again(studio, tmp_path):
    cache = {"threshold": 0.2, "max_consecutive": None}
    run = last(
        studio, compare=False, seed=7, cache=cache, policy="all", prompt=PROMPT + ' = "é; #\\'
    )
    assert set(run.clips) == {"accelerated"}
    for path in (run.clips["accelerated"], run.path("run.json")):
        assert Settings.from_file(path) == run.settings
    assert studio.runs.load(ME, run.id).settings == run.settings


def test_the_original_is_kept_until_what_it_depends_on_changes(studio):
    few = {"steps": 3}
    first = last(studio, **few)
    assert first.result["original_kept"] is False
    again = last(studio, policy="every 3", **few)
    assert again.result["original_kept"] is True
    assert again.result["seconds"]["original"] == first.result["seconds"]["original"]
    assert again.clips["original"].read_bytes() != b""
    assert np.array_equal(
        video.read_video(again.clips["original"])[0], video.read_video(first.clips["original"])[0]
    )
    for changed in ({"seed": 1}, {"steps": 2}, {"guidance": 4.0}, {"negative_prompt": "blue"}):
        assert last(studio, **few | changed).result["original_kept"] is False, changed
    off = last(studio, acceleration="off", **few)
    assert off.result["original_kept"] is True and set(off.clips) == {"original"}


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_stop_ends_a_run_within_a_step_and_the_next_one_is_clean(studio, pipe):
    expected = last(studio, compare=False)
    for phase in ("accelerated", "original"):
        job = studio.submit(ME, settings(steps=60, seed=3))
        until(lambda j=job, p=phase: j.progress.phase == p and j.progress.step >= 2)
        studio.stop(job)
        told = finish(studio, job)
        at = job.progress.step
        assert told[-1].state == "stopped"
        assert told[-1].message == f"stopped at step {at} of 60" and at < 60
        assert (told[-1].finished is not None) == (phase == "original")
        assert not engines_of(pipe)
        assert all(not m._forward_pre_hooks for m in pipe.transformer.modules())
    again = last(studio, compare=False)
    assert np.array_equal(
        video.read_video(again.clips["accelerated"])[0],
        video.read_video(expected.clips["accelerated"])[0],
    )


@pytest.fixture
def silent():
    """A pipeline that does not tell its steps; prompts mean nothing to it."""
    case = hunyuan15()
    given = {name: value for name, value in case.kwargs.items() if "prompt" in name}

    def encode_prompt(prompt=None, **_):
        prefix = "negative_" if prompt in (None, "", [""]) else ""
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        return tuple(given[prefix + name] for name in names)

    case.pipe.encode_prompt = encode_prompt
    assert "callback_on_step_end" not in signature(type(case.pipe).__call__).parameters
    return case.pipe


def test_a_pipeline_that_does_not_tell_its_steps_is_followed_and_stopped(silent, tmp_path):
    studio = JobQueue(Worker(lambda: silent, "silent"), RunStore(tmp_path), Limits())
    asked = {"guidance": None, "width": 16, "height": 16}
    try:
        told = finish(studio, studio.submit(ME, settings(**asked)))
        expected = told[-1].finished
        assert told[-1].state == "done", told[-1].message
        assert any(p.preview.startswith("data:image/png;base64,") for p in told)
        for phase in ("accelerated", "original"):
            fields = asked | {"steps": 90, "seed": 3}
            job = studio.submit(ME, settings(**fields))
            until(lambda j=job, p=phase: j.progress.phase == p and j.progress.step >= 2)
            studio.stop(job)
            assert finish(studio, job)[-1].state == "stopped"
            assert 2 <= job.progress.step < 90 and job.progress.eta > 0
            assert not engines_of(silent)
            assert all(not m._forward_pre_hooks for m in silent.transformer.modules())
        again = last(studio, **asked)
    finally:
        studio.close()
    for name, clip in again.clips.items():
        assert np.array_equal(video.read_video(clip)[0], video.read_video(expected.clips[name])[0])


def test_the_queue_is_bounded_and_keeps_its_order(studio):
    running = studio.submit(ME, settings(steps=60))
    until(lambda: running.progress.state == "running")
    first, second = studio.submit(YOU, settings(seed=1)), studio.submit(ME, settings(seed=2))
    assert (first.progress.ahead, second.progress.ahead) == (1, 2)
    with pytest.raises(QueueFullError, match="2 runs are waiting already"):
        studio.submit(YOU, settings())
    studio.stop(first)
    assert first.progress.message == "taken out of the queue"
    assert second.progress.ahead == 1
    studio.stop(running)
    assert finish(studio, running)[-1].state == "stopped"
    assert finish(studio, second)[-1].state == "done"


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ({"steps": None}, "50 steps: this page takes 8 at most"),
        ({"frames": None}, "81 frames: this page takes 9 at most"),
        ({"width": None, "height": None}, "832x480 has more pixels than 64x64"),
    ],
    ids=str,
)
def test_what_is_left_to_the_model_is_bounded_too(studio, left_out, message):
    studio.limits = Limits(width=64, height=64, frames=9, steps=8)
    told = finish(studio, studio.submit(ME, settings(**left_out)))
    assert told[-1].state == "failed" and message in told[-1].message
    assert all(progress.step == 0 for progress in told)


def test_jobs_and_runs_belong_to_one_browser(studio):
    job = studio.submit(ME, settings(compare=False))
    run = finish(studio, job)[-1].finished
    assert studio.job(ME, job.id) is job and studio.job(YOU, job.id) is None
    assert [r.id for r in studio.runs.of(ME)] == [run.id] and studio.runs.of(YOU) == []
    assert studio.runs.load(YOU, run.id) is None
    assert ME not in str(run.folder)
    for name in ("..", "../..", f"../{run.folder.parent.name}/{run.id}", "/etc", "", "a" * 99):
        assert studio.runs.load(ME, name) is None


def test_a_run_that_nobody_waits_for_is_dropped(studio, monkeypatch):
    monkeypatch.setattr(jobs, "ABANDONED_AFTER", -1.0)
    told = finish(studio, studio.submit(ME, settings()))
    assert told[-1].state == "stopped" and "nobody was waiting" in told[-1].message


def test_what_a_pipeline_refuses_is_told_in_words_and_the_next_run_works(studio):
    told = finish(studio, studio.submit(ME, settings(width=50)))
    assert told[-1].state == "failed" and "divisible by" in told[-1].message
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    text = with_one_plan(policy, 16).to_json()
    told = finish(studio, studio.submit(ME, settings(policy=text)))
    assert told[-1].state == "failed"
    assert "num_inference_steps: the policy is for 50, this run has 6" in told[-1].message
    assert last(studio, compare=False).clips


def test_one_plan_of_a_policy_is_held_against_the_run_and_used(studio):
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    for budget in (policy.budgets()[0], 16, 30):
        only = with_one_plan(policy, budget)
        assert len(only.to_json()) < 20_000
        assert {len(only.preset(name).steps) for name in ("quality", "fast")} == {budget}
    run = last(studio, compare=False, steps=50, policy=with_one_plan(policy, 10).to_json())
    timeline = run.result["report"]["transformers"][0]["timeline"]
    assert timeline == "".join(
        "C" if policy.plan(budget=10).computes(s) else "-" for s in range(50)
    )


def test_a_model_that_does_not_load_is_told_and_tried_again(pipe, tmp_path):
    answers = [ModelError("the disk is asleep"), ModelError("the disk is asleep"), pipe]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    studio = JobQueue(Worker(load, "some"), RunStore(tmp_path), Limits())
    told = finish(studio, studio.submit(ME, settings(compare=False)))
    assert (told[-1].state, told[-1].message) == ("failed", "the disk is asleep")
    assert last(studio, compare=False).clips
    studio.close()


def test_sparse_attention_is_set_told_and_kept_with_the_run(studio):
    sparse = {"top_p": 0.5, "dense_steps": 2, "min_tokens": 0}
    run = last(studio, compare=False, policy="all", attention="svg2", svg2=sparse)
    told = run.result["report"]["transformers"][0]["attention"]
    assert 0 < told["density"] < 1 and told["dense_calls"]["first steps"] > 0
    assert "top_p=0.5" in told["settings"] and "dense_steps=2" in told["settings"]
    html = panels.numbers(run)
    assert f'data-density="{told["density"]:.4f}"' in html
    assert html.count("va-layer") == len(told["layers"]) > 2
    assert f"{told['sparse_calls']} sparse calls" in html and "of the first steps" in html
    assert Settings.from_file(run.clips["accelerated"]).svg2.top_p == 0.5
    assert studio.runs.load(ME, run.id).settings == run.settings
    assert run.settings.original() == settings(policy="all").original()
    # The length from which on attention is sparse is the library's own where none is given.
    run = last(studio, compare=False, policy="all", attention="svg2", svg2={})
    assert "of too few video tokens to gain" in panels.numbers(run)
    run = last(studio, compare=False, attention="off")
    assert "attention: dense" in panels.numbers(run)


def test_what_accelerate_is_told_about_attention():
    assert settings().acceleration_arguments()["attention"] == "auto"
    assert settings(attention="off").acceleration_arguments()["attention"] is None
    chosen = settings(attention="svg2", svg2={"top_p": 0.7}).acceleration_arguments()["attention"]
    assert chosen == SVG2(top_p=0.7)
    # The controls of custom acceleration say nothing about a preset.
    assert settings(acceleration="fast", attention="off").acceleration_arguments()["attention"] == (
        "auto"
    )


def test_whether_attention_can_be_sparse_is_told_in_words(pipe, monkeypatch):
    stage = Worker(lambda: pipe, "tiny-wan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(list(stage.attention(patience=0.0))) == 1  # it does not load
    told = stage.attention()
    assert "still being loaded" in next(told)
    stage.load()
    assert "no GPU here" in next(told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ["shorter than 16384 tokens" in line for line in stage.attention()] == [True]
    (transformer, host), *_ = find_transformers(pipe).values()
    linear = replace(host, attention=None, attention_note="linear attention")
    monkeypatch.setitem(HOSTS, type(transformer).__name__, linear)
    told = list(stage.attention())
    assert told == ["Attention stays dense with this model: linear attention."]


def test_old_runs_make_room(studio):
    studio.runs.keep = 2
    for seed in range(3):
        last(studio, compare=False, steps=2, seed=seed, policy="all")
    assert [r.settings.seed for r in studio.runs.of(ME)] == [2, 1]
    assert len(list(studio.runs.folder(ME).iterdir())) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: "),
        ({"prompt": "x" * 5000}, "prompt: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 2**32}, "seed: "),
        ({"steps": 2.5}, "steps: "),
        ({"steps": 0}, "steps: "),
        ({"guidance": float("nan")}, "guidance: "),
        ({"acceleration": "warp"}, "acceleration: "),
        ({"cache": {"probe_blocks": -1}}, "cache probe blocks: "),
        ({"fps": 0}, "fps: "),
        ({"attention": "half"}, "attention: "),
        ({"svg2": {"top_p": 0}}, "svg2 top p: "),
        ({"svg2": {"dense_steps": -1}}, "svg2 dense steps: "),
    ],
)
def test_settings_out_of_range_are_named(fields, message):
    with pytest.raises(SettingsError, match=message):
        Settings.of(SMALL | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 1281, "height": 720}, "more pixels than 1280x720"),
        ({"width": 64, "height": None}, "a width and a height"),
        ({"frames": 130}, "130 frames: this page takes 129 at most"),
        ({"steps": 101}, "101 steps: this page takes 100 at most"),
    ],
)
def test_limits(fields, message):
    with pytest.raises(SettingsError, match=message):
        Limits().check(settings(**fields))
    Limits().check(settings(width=720, height=1280))


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "org/name", "policy.json", "../x", "every 0", "1,2"]
)
def test_steps_name_nothing_of_the_server(text, studio):
    with pytest.raises(PlanError):
        studio.submit(ME, settings(policy=text))


@pytest.mark.parametrize("text", ["{", "{}", '{"schema_version": "9.0"}', "{" + "[" * 9999])
def test_policies_that_are_none(text):
    with pytest.raises(PolicyError):
        policy_argument(text)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"[]", b"{}", b'{"settings": 3}', b"[" * 99999, b'"x"', b"1"]
)
def test_files_that_hold_no_settings(raw, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(raw)
    with pytest.raises(SettingsError, match="holds no settings"):
        Settings.from_file(file)


def test_clips_that_hold_no_settings(tmp_path):
    clip = tmp_path / "clip.mp4"
    video.write_video(clip, np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(SettingsError, match="holds no settings"):
        Settings.from_file(clip)
    secret = tmp_path / "secret.txt"
    secret.write_text("comment={}")
    # A playlist that points at another file of the server.
    clip.write_text(f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile://{secret}\n")
    with pytest.raises(VideoError, match="damaged or no"):
        Settings.from_file(clip)
    clip.write_text(f";FFMETADATA1\ncomment={json.dumps(SMALL)}\n")
    with pytest.raises(VideoError):
        Settings.from_file(clip)


def test_comments_come_back_from_a_clip(tmp_path):
    clip = tmp_path / "clip.mp4"
    for text in ("", "plain", 'a=b; c#d \\ "e"\nsecond line', "é漢" * 100, "x" * 30_000):
        video.write_video(clip, np.zeros((2, 16, 16, 3), np.uint8), comment=text)
        assert video.read_comment(clip) == text
    with pytest.raises(VideoError, match="no video file"):
        video.read_comment(tmp_path / "nothing.mp4")


def test_preview_learns_the_colours_of_a_model():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 6, 5, generator=generator)
    mix = torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1], [0.02, 0.02, 0.02]])
    colours = (latents[0].permute(1, 2, 3, 0) @ mix + 0.5).clamp(0, 1)
    frames = (colours.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy() * 255).round()
    frames = frames.astype(np.uint8)
    preview = Preview(4)
    before = preview.frames(latents)
    assert before.shape == (3, 6, 5, 3) and before.dtype == np.uint8 and before.std() > 20
    preview.learn(latents, frames)
    assert np.abs(preview.frames(latents).astype(int) - frames[:, ::8, ::8]).max() <= 2
    # CogVideoX has frames before channels; packed latents cannot be drawn.
    swapped = preview.frames(latents.transpose(1, 2))
    assert np.array_equal(swapped, preview.frames(latents))
    assert preview.frames(torch.zeros(1, 90, 4)) is None and preview.frames(None) is None
    assert preview.frames(torch.zeros(1, 7, 3, 6, 5)) is None
    assert data_uri(before).startswith("data:image/png;base64,")


def test_main_directions_keep_their_colours_from_step_to_step():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 8, 3, 6, 6, generator=generator) * torch.arange(1, 9).view(8, 1, 1, 1)
    preview = Preview(8)
    first = preview.frames(latents).astype(int)
    for _ in range(3):
        latents = latents + 0.01 * torch.randn(latents.shape, generator=generator)
        assert np.abs(preview.frames(latents) - first).mean() < 12


def test_countdown_knows_that_reused_steps_are_cheap(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vidaccel.demo.eta.time.perf_counter", lambda: now[0])
    countdown = Countdown(8)
    countdown.start()
    for letter, seconds in (("C", 4.0), ("C", 4.0), ("-", 1.0)):
        now[0] += seconds
        countdown.start()
        countdown.lap(letter)
    computed = [True, True, False, False, True, False, False, True]
    assert countdown.left(computed) == pytest.approx(2 * 4.0 + 3 * 1.0)
    assert countdown.left() == pytest.approx(5 * 3.0)


def test_errors_in_words():
    asked = settings()
    assert "too little memory for 48x48" in in_words(torch.OutOfMemoryError("CUDA ..."), asked)
    assert in_words(ValueError("no such size\nmore"), asked) == "no such size"
    assert in_words(KeyError("x"), asked) == "KeyError: 'x'"


def test_pictures_escape_what_users_write():
    evil = "<script>alert(1)</script>"
    assert evil not in panels.problem(evil)
    assert evil not in panels.status(Progress(state="failed", message=evil))
    assert evil not in panels.status(Progress(state="stopped", message=evil))
    assert evil not in panels.status(Progress(state="running", phase=evil))


def test_the_strip_has_a_cell_per_step():
    html = panels.strip("CC-p", {2: ", difference 0.1"}, rest=2)
    assert html.count("<span") - html.count("va-key") == 6
    assert 'title="step 2: reused, difference 0.1"' in html
    assert 'aria-label="2 computed, 1 probed, 1 reused"' in html


def test_the_curve_of_every_shipped_policy():
    for path in shipped_policies().values():
        policy = CachePolicy.load(path)
        for budget in policy.budgets():
            html = panels.curve(policy, budget)
            assert f"{budget} of {policy.num_inference_steps} steps computed" in html
            assert ("<svg" in html) == (
                len([p for p in policy.plans.values() if any(p.errors)]) > 1
            )


def test_closing_stops_what_runs(pipe, tmp_path):
    studio = JobQueue(Worker(lambda: pipe, "tiny-wan"), RunStore(tmp_path), Limits())
    job = studio.submit(ME, settings(steps=90))
    until(lambda: job.progress.step >= 1)
    studio.close()
    assert job.progress.state == "stopped"
    assert "studio" not in [t.name for t in threading.enumerate() if t is studio._thread]
