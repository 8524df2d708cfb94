"""The demo page: the real server, and a real browser where there is one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vidaccel.plans.shipped import shipped_policies

pytest.importorskip("gradio", reason='the page needs gradio: pip install "vidaccel[demo]"')

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds; only reached when something is broken
DONE = "#status:has-text('Done')"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def server(out):
    """The address of a running `vidaccel demo`."""
    port = free_port()
    command = [sys.executable, "-m", "vidaccel", "demo", "--server-port", str(port)]
    command += ["--size", "48x48", "--frames", "5", "--steps", "8", "--queue-size", "1"]
    command += ["--device", "cpu", "--out", str(out)]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (out.parent / "server.log").open("w")
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Tests that were started in the background ignore Ctrl-C, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (out.parent / "server.log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0  # Ctrl-C ends it without a complaint
        assert "vidaccel/studio" not in (out.parent / "server.log").read_text()  # no traceback
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """A page in a browser that has not been here before."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    tab.elsewhere = []
    tab.on("request", lambda request: tab.elsewhere.append(request.url))
    arrive(tab, server)
    yield tab
    strangers = [u for u in tab.elsewhere if not u.startswith((server, "data:", "blob:"))]
    assert strangers == []  # works without a network
    context.close()


def arrive(tab, server):
    tab.goto(server)
    tab.wait_for_selector("#generate:has-text('Generate')")


def fill(tab, **fields):
    """Fill in controls by their element ids."""
    for accordion in ("details", "custom"):
        if tab.locator(f"#{accordion} input:visible").count() == 0:
            tab.locator(f"#{accordion} button").first.click()
            tab.wait_for_selector(f"#{accordion} input:visible")
    # Gradio's fields can be seen a moment before they listen, and tell nobody when they do.
    tab.wait_for_timeout(700)
    for name, value in fields.items():
        field = tab.locator(f"#{name.replace('_', '-')} :is(input, textarea)").first
        field.fill(str(value))
        field.press("Tab")


def choose_custom(tab):
    """Choosing it opens its controls."""
    tab.locator("#acceleration label", has_text="custom").click()
    tab.wait_for_selector("#plan textarea:visible")


def long_run(tab):
    """Settings with time to look, in steps that are all computed."""
    choose_custom(tab)
    fill(tab, plan="all", steps=100, frames=17)


def step(tab):
    match = re.search(r"step (\d+)/", tab.inner_text("#status"))
    return int(match[1]) if match else 0


def until(condition):
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def playing(tab):
    """Time and state of both clips."""
    return tab.evaluate(
        "['original', 'accelerated'].map(id => document.querySelector(`#${id} video`))"
        ".map(v => v && [v.currentTime, v.paused, v.readyState])"
    )


def test_an_example_is_there_before_any_run(tab):
    tab.wait_for_selector("#numbers .va-cards")
    tab.wait_for_selector("#accelerated video")
    until(lambda: tab.locator("#examples img").count() >= 3)
    assert tab.locator("#history").count() == 0 or not tab.locator("#history").is_visible()
    until(lambda: all(clip and clip[2] >= 2 and not clip[1] for clip in playing(tab)))
    tab.locator("#examples button.thumbnail-item, #examples .grid-container button").nth(1).click()
    tab.wait_for_selector("#numbers:has-text('a cyan dotted square')")


def test_generate_compare_and_look_back(tab, tmp_path):
    tab.click("#generate")
    seen = set()
    tab.wait_for_selector("#status .va-bar")
    # Nothing of the example is left to be taken for this run.
    assert tab.locator("#files a").count() == 0 and tab.locator("#numbers .va-cards").count() == 0
    while tab.locator(DONE).count() == 0:
        seen.add(tab.inner_text("#status").split("\n")[0])
        time.sleep(0.05)
    assert len(seen) > 3, seen
    assert any("reused" in line for line in seen) and any("s left" in line for line in seen)
    numbers = tab.inner_text("#numbers")
    for word in ("as fast", "PSNR", "SSIM", "computed", "reused", "whole call", "denoising"):
        assert word in numbers
    assert len(tab.get_attribute("#numbers .va-strip", "data-timeline")) == 8
    # Both play, and what happens to one happens to the other.
    until(lambda: all(clip and clip[2] >= 2 for clip in playing(tab)))
    tab.evaluate("document.querySelector('#original video').pause()")
    until(lambda: [clip[1] for clip in playing(tab)] == [True, True])
    tab.evaluate("document.querySelector('#original video').currentTime = 0.2")
    until(lambda: abs(playing(tab)[1][0] - playing(tab)[0][0]) < 0.03)
    tab.evaluate("document.querySelector('#accelerated video').play()")
    until(lambda: [clip[1] for clip in playing(tab)] == [False, False])

    until(lambda: tab.locator("#history .grid-container button").count() == 1)
    with tab.expect_download() as download:
        tab.locator("#files a", has_text="B").first.click()
    clip = tmp_path / "clip.mp4"
    download.value.save_as(clip)

    # The clip brings its settings back, and so does the history.
    tab.reload()
    tab.wait_for_selector("#generate:has-text('Generate')")
    tab.wait_for_selector("#history .grid-container button")
    fill(tab, prompt="something else", seed=5)
    with tab.expect_file_chooser() as chooser:
        tab.click("#load")
    chooser.value.set_files(clip)
    until(lambda: tab.input_value("#prompt textarea").startswith("a magenta"))
    assert tab.input_value("#seed input") == "0"
    fill(tab, prompt="something else")
    tab.locator("#history .grid-container button").first.click()
    tab.wait_for_selector("#numbers:has-text('48x48')")
    tab.click("#reuse")
    until(lambda: tab.input_value("#prompt textarea").startswith("a magenta"))


def test_stop_within_a_step_and_go_on(tab):
    long_run(tab)
    tab.click("#generate")
    until(lambda: step(tab) >= 2)
    first = step(tab)
    until(lambda: step(tab) > first)
    tab.click("#stop")
    tab.wait_for_selector("#status:has-text('Stopped at step')")
    at = int(re.search(r"at step (\d+) of 100", tab.inner_text("#status"))[1])
    assert 2 <= at < 100
    fill(tab, steps=4)
    tab.wait_for_selector("#generate:not([disabled])")
    tab.click("#generate")
    tab.wait_for_selector(DONE)


def test_a_broken_policy_and_a_sound_one(tab, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema_version": "1.0", "model": {"transformer": "<script>"}}')
    fill(tab)
    tab.locator("#policy input[type=file]").set_input_files(broken)
    tab.wait_for_selector("#curve .va-error")
    assert "model.transformer" in tab.inner_text("#curve")
    assert str(tmp_path) not in tab.inner_text("body") and "/tmp" not in tab.inner_text("#curve")
    tab.locator(
        "#policy button[aria-label='Clear'], #policy .icon-button-wrapper button"
    ).last.click()
    until(lambda: not tab.inner_text("#curve"))
    sound = shipped_policies()["vidaccel--tiny-wan/50-steps.json"]
    tab.locator("#policy input[type=file]").set_input_files(sound)
    tab.wait_for_selector("#curve svg")
    assert "of 50 steps computed" in tab.inner_text("#curve")
    # It is made for 50 steps, and this page is set to 8.
    tab.click("#generate")
    tab.wait_for_selector("#status .va-error")
    assert "num_inference_steps: the policy is for 50" in tab.inner_text("#status")
    fill(tab, steps=50)
    tab.wait_for_selector("#generate:not([disabled])")
    tab.click("#generate")
    tab.wait_for_selector(DONE)
    timeline = tab.get_attribute("#numbers .va-strip", "data-timeline")
    assert len(timeline) == 50 and timeline.count("C") == 16


def test_the_block_cache_from_the_page(tab):
    choose_custom(tab)
    fill(tab, plan="all", threshold=5, warmup_steps=1, max_consecutive=2)
    tab.locator("#dbcache input").check()
    tab.click("#generate")
    tab.wait_for_selector(DONE)
    assert tab.get_attribute("#numbers .va-strip", "data-timeline") == "CppCppCp"
    assert "DBCache" in tab.inner_text("#numbers")


def test_sparse_attention_from_the_page(tab):
    choose_custom(tab)
    tab.wait_for_selector("#attention-note:has-text('no GPU here')")
    assert not tab.locator("#top-p").is_visible()
    tab.locator("#attention label", has_text="SVG2").click()
    tab.wait_for_selector("#top-p input:visible")
    fill(tab, plan="all", top_p=0.5, dense_steps=2, min_tokens=0)
    tab.click("#generate")
    tab.wait_for_selector(DONE)
    density = tab.locator("#numbers [data-density]").get_attribute("data-density")
    assert 0 < float(density) < 1
    assert "sparse calls" in tab.inner_text("#numbers")
    # The settings of a run bring it back.
    tab.locator("#attention label", has_text="off").click()
    tab.wait_for_selector("#top-p", state="hidden")
    tab.click("#reuse")
    tab.wait_for_selector("#top-p input:visible")
    values = [tab.input_value(f"#{name} input") for name in ("top-p", "dense-steps", "min-tokens")]
    assert values == ["0.5", "2", "0"]


def test_a_reload_in_the_middle_goes_on_where_it_was(tab, server):
    long_run(tab)
    tab.click("#generate")
    until(lambda: step(tab) >= 2)
    tab.reload()
    tab.wait_for_selector("#status .va-bar")
    before = step(tab)
    until(lambda: step(tab) > before)
    assert tab.locator("#generate").is_disabled()
    tab.click("#stop")
    tab.wait_for_selector("#status:has-text('Stopped at step')")
    tab.wait_for_selector("#generate:not([disabled])")


def test_two_tabs_wait_for_each_other(tab, server):
    other, third = tab.context.new_page(), tab.context.new_page()
    arrive(other, server)
    arrive(third, server)
    # Each in front while it is used: a tab behind others takes its time to notice anything.
    tab.bring_to_front()
    long_run(tab)
    tab.click("#generate")
    until(lambda: step(tab) >= 1)
    other.bring_to_front()
    other.click("#generate")
    other.wait_for_selector("#status:has-text('In the queue: 1 run is ahead')")
    third.bring_to_front()
    third.click("#generate")
    third.wait_for_selector("#status .va-error:has-text('1 runs are waiting already')")
    # The one that waits has not begun, and the one before it goes on.
    assert step(other) == 0 and other.locator("#numbers .va-cards").count() == 0
    tab.bring_to_front()
    before = step(tab)
    until(lambda: step(tab) > before)
    assert other.locator("#generate").is_disabled() and third.locator("#generate").is_enabled()
    tab.click("#stop")
    tab.wait_for_selector("#status:has-text('Stopped at step')")
    other.wait_for_selector(DONE)
    assert len(other.get_attribute("#numbers .va-strip", "data-timeline")) == 8
    assert step(third) == 0 and third.locator(DONE).count() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 101}, "101 steps: this page takes 100 at most"),
        ({"frames": 99}, "99 frames: this page takes 33 at most"),
        ({"prompt": "  "}, "prompt"),
        ({"plan": "/etc/passwd"}, "the steps are auto, all, every N"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_words(tab, fields, message):
    choose_custom(tab)
    fill(tab, **fields)
    tab.click("#generate")
    tab.wait_for_selector("#status .va-error")
    assert message in tab.inner_text("#status")
    assert tab.locator("#generate").is_enabled()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(tab, width):
    tab.set_viewport_size({"width": width, "height": 844})
    fill(tab)
    tab.wait_for_selector("#accelerated video")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [tab.locator(f"#{name}").bounding_box() for name in ("original", "accelerated")]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side on a phone too
    assert boxes[1]["x"] + boxes[1]["width"] <= width


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_no_other_file_of_the_server_can_be_read(server, out):
    secret = out.parent / "secret.txt"
    secret.write_text("the secret")
    repository = Path(__file__).resolve().parents[2]
    for path in (
        "/etc/passwd",
        secret,
        f"{out}/../secret.txt",
        f"{out}/..%2fsecret.txt",
        "%2e%2e/%2e%2e/etc/passwd",
        repository / "pyproject.toml",
        "pyproject.toml",
        repository / "vidaccel" / "demo.py",
        out.parent / "server.log",
    ):
        status, body = get(f"{server}/gradio_api/file={path}")
        assert status in (403, 404) and b"secret" not in body and b"root:" not in body, path


def test_a_file_that_was_not_uploaded_is_not_taken_for_one(server):
    """What a page is asked for directly, past its controls."""
    config = json.loads(get(f"{server}/config")[1])
    files = {c["id"] for c in config["components"] if c["type"] in ("file", "uploadbutton")}
    events = [e for e in config["dependencies"] if files & set(e["inputs"])]
    assert len(events) >= 2
    for event in events:
        body = {
            "fn_index": event["id"],
            "session_hash": "abcdef",
            "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        }
        request = urllib.request.Request(
            f"{server}/gradio_api/queue/join",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()
        with urllib.request.urlopen(
            f"{server}/gradio_api/queue/data?session_hash=abcdef", timeout=60
        ) as stream:
            told = stream.read().decode()
        assert '"success":false' in told.replace(" ", "") and "root:" not in told


def test_it_listens_to_this_machine_alone(server):
    port = int(server.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if local.endswith(f":{port:04X}") and state == "0A":
            assert local.startswith("0100007F"), local
