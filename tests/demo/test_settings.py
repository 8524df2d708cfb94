"""The settings of a run: what is taken, what is refused, and in which files they are found."""

import json

import numpy as np
import pytest

from tiny.demo import ME, SMALL, saved_run, settings
from vidaccel.clips import video
from vidaccel.demo.settings import Limits, Settings, policy_of_text, with_one_plan
from vidaccel.errors import PlanError, PolicyError, SettingsError, VideoError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies
from vidaccel.svg2.settings import SVG2


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
        ({"precision": "int2"}, "precision: "),
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
    "text",
    [
        "/etc/passwd",
        "org/name",
        "policy.json",
        "../x",
        "every 0",
        "1,2",
        pytest.param("9" * 5000, id="digits without end"),
    ],
)
def test_steps_name_nothing_of_the_server(text, queue):
    with pytest.raises(PlanError):
        queue.submit(ME, settings(policy=text))


@pytest.mark.parametrize("text", ["{", "{}", '{"schema_version": "9.0"}', "{" + "[" * 9999])
def test_policies_that_are_none(text):
    with pytest.raises(PolicyError):
        policy_of_text(text)


def test_one_plan_of_a_policy_is_held_against_the_run_and_used(queue):
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    for budget in (policy.budgets()[0], 16, 30):
        only = with_one_plan(policy, budget)
        assert len(only.to_json()) < 20_000
        assert {len(only.preset(name).steps) for name in ("quality", "fast")} == {budget}
    run = saved_run(queue, compare=False, steps=50, policy=with_one_plan(policy, 10).to_json())
    timeline = run.result["report"]["transformers"][0]["timeline"]
    assert timeline == "".join(
        "C" if policy.plan(budget=10).computes(s) else "-" for s in range(50)
    )


def test_the_attention_argument_of_accelerate():
    assert settings().acceleration_arguments()["attention"] == "auto"
    assert settings(attention="off").acceleration_arguments()["attention"] is None
    chosen = settings(attention="svg2", svg2={"top_p": 0.7}).acceleration_arguments()["attention"]
    assert chosen == SVG2(top_p=0.7)
    # The controls of custom acceleration say nothing about a preset.
    assert settings(acceleration="fast", attention="off").acceleration_arguments()["attention"] == (
        "auto"
    )


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
