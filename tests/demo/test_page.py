"""The demo page in a real browser, where there is one."""

import re
import shutil

import pytest

from tiny.demo import PATIENCE, until
from vidaccel.plans.shipped import shipped_policies

# A run of the page takes seconds, and many times that on a busy machine.
pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

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
DONE = "#status:has-text('Done')"

# Keeps every first line that the status shows, however late anybody looks.
RECORD_STATUS = """() => {
  const status = document.querySelector('#status');
  window.statusLines = [];
  const note = () => window.statusLines.push(status.innerText.split('\\n')[0]);
  new MutationObserver(note).observe(status, {subtree: true, childList: true, characterData: true});
}"""


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
    context.set_default_timeout(1000 * PATIENCE)
    urls = []
    context.on("request", lambda request: urls.append(request.url))
    tab = open_page(context, server)
    yield tab
    assert [url for url in urls if not url.startswith((server, "data:", "blob:"))] == []
    context.close()


def open_page(context, server):
    """Open the page in a new tab."""
    tab = context.new_page()
    tab.running = set()  # requests that have not been answered yet
    tab.on("request", lambda request: tab.running.add(request))
    tab.on("requestfinished", lambda request: tab.running.discard(request))
    tab.on("requestfailed", lambda request: tab.running.discard(request))
    tab.goto(server)
    tab.wait_for_selector("#generate:has-text('Generate')")
    settle(tab)
    return tab


def settle(tab):
    """Wait until the page has loaded its parts and the answers to its events have been handled.

    Gradio's fields can be seen before they listen, and forget what was written into them when a
    part or an answer that was on its way arrives.
    """

    def at_rest():
        # In this time the page handles what has arrived, and asks for what that makes it need.
        tab.evaluate("() => new Promise(resolve => setTimeout(resolve, 100))")
        return not any(awaited(request) for request in tab.running)

    until(lambda: at_rest() and at_rest())


def awaited(request):
    """Tell whether the page waits for the end of a request; that of a clip or heartbeat is open."""
    return request.resource_type in ("script", "fetch", "xhr", "eventsource") and (
        "/heartbeat/" not in request.url
    )


def fill(tab, **fields):
    """Fill in controls by their element ids."""
    for accordion in ("details", "custom"):
        if tab.locator(f"#{accordion} input:visible").count() == 0:
            tab.locator(f"#{accordion} button").first.click()
            tab.wait_for_selector(f"#{accordion} input:visible")
    settle(tab)
    for name, value in fields.items():
        field = tab.locator(f"#{name.replace('_', '-')} :is(input, textarea)").first
        field.fill(str(value))
        field.press("Tab")
        assert field.input_value() == str(value)


def choose_custom(tab):
    """Choose custom acceleration, which opens its controls."""
    tab.locator("#acceleration label", has_text="custom").click()
    tab.wait_for_selector("#plan textarea:visible")


def long_run(tab):
    """Set what takes longer than any test looks, in steps that are all computed."""
    choose_custom(tab)
    fill(tab, plan="all", steps=100, frames=33, size="96x96")


def wait_until_done(tab):
    """Wait for the end of the run, which has to be a good one."""
    tab.wait_for_selector(f"{DONE}, #status .va-error")
    assert tab.locator(DONE).count() == 1, tab.inner_text("#status")


def step(tab):
    match = re.search(r"step (\d+)/", tab.inner_text("#status"))
    return int(match[1]) if match else 0


def playing(tab):
    """Return time, paused and readiness of both clips."""
    return tab.evaluate(
        "['original', 'accelerated'].map(id => document.querySelector(`#${id} video`))"
        ".map(v => v && [v.currentTime, v.paused, v.readyState])"
    )


def both_ready(tab):
    return all(clip and clip[2] >= 2 for clip in playing(tab))


def both_pause(tab, pause):
    """Pause or play one clip, and tell whether both do so; asked again until events are over."""
    name, verb = ("original", "pause") if pause else ("accelerated", "play")
    tab.evaluate(f"document.querySelector('#{name} video').{verb}()")
    return [clip[1] for clip in playing(tab)] == [pause, pause]


def test_an_example_is_there_before_any_run(tab):
    tab.wait_for_selector("#numbers .va-cards")
    tab.wait_for_selector("#accelerated video")
    until(lambda: tab.locator("#examples img").count() >= 3)
    assert tab.locator("#history").count() == 0 or not tab.locator("#history").is_visible()
    until(lambda: both_ready(tab) and not any(clip[1] for clip in playing(tab)))
    tab.locator("#examples button.thumbnail-item, #examples .grid-container button").nth(1).click()
    tab.wait_for_selector("#numbers:has-text('a cyan dotted square')")


def test_generate_compare_and_look_back(tab, tmp_path):
    tab.evaluate(RECORD_STATUS)
    tab.click("#generate")
    tab.wait_for_selector("#status .va-bar")
    # Nothing of the example is left to be taken for this run.
    assert tab.locator("#files a").count() == 0 and tab.locator("#numbers .va-cards").count() == 0
    wait_until_done(tab)
    seen = set(tab.evaluate("window.statusLines"))
    assert len(seen) > 3, seen
    assert any("reused" in line for line in seen) and any("s left" in line for line in seen)
    numbers = tab.inner_text("#numbers")
    for word in ("as fast", "PSNR", "SSIM", "computed", "reused", "whole call", "denoising"):
        assert word in numbers
    assert len(tab.get_attribute("#numbers .va-strip", "data-timeline")) == 8
    # Both play, and what happens to one happens to the other.
    until(lambda: both_ready(tab))
    until(lambda: both_pause(tab, True))
    # Farther off than what the page takes for the same moment.
    moment = 0.02 if playing(tab)[1][0] > 0.15 else 0.28
    tab.evaluate(f"document.querySelector('#original video').currentTime = {moment}")
    until(lambda: abs(playing(tab)[1][0] - moment) < 0.03)
    until(lambda: both_pause(tab, False))

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
    fill(tab, steps=4, frames=5, size="48x48")
    tab.wait_for_selector("#generate:not([disabled])")
    tab.click("#generate")
    wait_until_done(tab)


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
    tab.wait_for_selector("#status .va-error", state="detached")
    wait_until_done(tab)
    timeline = tab.get_attribute("#numbers .va-strip", "data-timeline")
    assert len(timeline) == 50 and timeline.count("C") == 16


def test_the_block_cache_from_the_page(tab):
    choose_custom(tab)
    fill(tab, plan="all", threshold=5, warmup_steps=1, max_consecutive=2)
    tab.locator("#dbcache input").check()
    tab.click("#generate")
    wait_until_done(tab)
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
    wait_until_done(tab)
    density = tab.locator("#numbers [data-density]").get_attribute("data-density")
    assert 0 < float(density) < 1
    assert "sparse calls" in tab.inner_text("#numbers")
    # The settings of a run bring it back.
    tab.locator("#attention label", has_text="off").click()
    tab.wait_for_selector("#top-p", state="hidden")
    tab.click("#reuse")
    tab.wait_for_selector("#top-p input:visible")
    names = ("top-p", "dense-steps", "min-tokens")
    until(lambda: [tab.input_value(f"#{name} input") for name in names] == ["0.5", "2", "0"])


def test_a_reload_in_the_middle_goes_on_where_it_was(tab):
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
    other, third = (open_page(tab.context, server) for _ in range(2))
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
    other.bring_to_front()
    wait_until_done(other)
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
def test_bad_input_is_answered_in_words(tab, fields, message):
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
    until(lambda: both_ready(tab))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [tab.locator(f"#{name}").bounding_box() for name in ("original", "accelerated")]
    assert boxes[0]["y"] == boxes[1]["y"]  # side by side on a phone too
    assert boxes[1]["x"] + boxes[1]["width"] <= width
