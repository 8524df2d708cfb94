"""The demo page in a real browser, where there is one."""

import json
import re
import shutil
import time

import pytest

from tiny.demo import PATIENCE, until
from tiny.relay import Relay
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
STREAM_PATIENCE = 15.0  # seconds
DONE = "#status:has-text('Done')"

# Keeps every first line that the status shows, and how many steps' bars were there, however late
# anybody looks.
RECORD_STATUS = """() => {
  const status = document.querySelector('#status');
  window.statusLines = [];
  window.bars = 0;
  const note = () => {
    window.statusLines.push(status.innerText.split('\\n')[0]);
    window.bars += status.querySelectorAll('.va-bar').length;
  };
  new MutationObserver(note).observe(status, {subtree: true, childList: true, characterData: true});
}"""

# The texts that can be seen with a contrast of less than 4.5 to 1 (WCAG 2.2, 1.4.3; what is
# disabled is exempt), each with its contrast.
PALE_TEXTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map(c => c / 255).map(
      c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element) => {
    const line = [];
    for (let e = element; e; e = e.parentElement) line.unshift(e);
    let under = [255, 255, 255], opacity = 1;
    for (const e of line) {
      const style = getComputedStyle(e), [r, g, b, a] = rgba(style.backgroundColor);
      opacity *= style.opacity;
      under = over([r, g, b, a * opacity], under);
    }
    if (opacity < 0.05) return 21;
    const [r, g, b, a] = rgba(getComputedStyle(element).color);
    const [low, high] = [over([r, g, b, a * opacity], under), under].map(luminance)
      .sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode())
    if (walker.currentNode.data.trim())
      texts.push([walker.currentNode.parentElement, walker.currentNode.data.trim()]);
  for (const field of document.querySelectorAll('input, textarea'))
    if (field.value && !['file', 'radio', 'checkbox'].includes(field.type))
      texts.push([field, field.value]);
  const seen = texts.filter(([e]) => e.checkVisibility({visibilityProperty: true})
    && e.getBoundingClientRect().width > 1 && !e.closest(':disabled, svg, script, style'));
  return {
    looked_at: seen.length,
    pale: seen.map(([e, text]) => [contrast(e), text]).filter(([c]) => c < 4.5),
  };
}"""

# The pictures, clips and controls that can be seen and have no name for those who do not see them.
NAMELESS = """() => {
  const given = (e) => e?.alt || e?.getAttribute('aria-label') || e?.title;
  const name = (e) => given(e) || given(e.querySelector('[aria-label]')) || e.innerText?.trim()
    || (e.getAttribute('aria-labelledby') || '').split(' ').map(
      id => document.getElementById(id)?.innerText).join('').trim()
    || Array.from(e.labels || [], label => label.innerText).join('').trim();
  return Array.from(document.querySelectorAll('img, video, progress, button, a, input, textarea, '
      + '[role=button], [role=img], [role=progressbar]'))
    .filter(e => e.checkVisibility({visibilityProperty: true}) && e.type !== 'file' && !name(e))
    .map(e => e.outerHTML.slice(0, 300));
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


@pytest.fixture(scope="module", autouse=True)
def log_without_errors(server, out):
    """The server's log, in which no test may leave an error of the page or of Gradio."""
    yield
    log = (out.parent / "server.log").read_text()
    assert "Traceback" not in log and "Error:" not in log, log


@pytest.fixture
def tab(browser, server):
    """A page in a browser that has not been here before; neither page nor server may complain."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * PATIENCE)
    urls = []
    context.on("request", lambda request: urls.append(request.url))
    complaints = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on(
        "console",
        lambda message: message.type == "error" and complaints.append(message.text),
    )
    tab = open_page(context, server)
    yield tab
    for page in context.pages:  # where a test has failed, its run is in the way of the next one
        if page.locator("#stop:not([disabled])").count():
            page.click("#stop")
            page.wait_for_selector("#stop[disabled]")
    assert complaints == []
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
    asked_since = {"at": time.monotonic(), "requests": set()}

    def at_rest():
        # By then the page has handled what has arrived, and asked for what that makes it need.
        tab.evaluate("() => new Promise(done => requestIdleCallback(() => setTimeout(done, 100)))")
        waited_for = {request for request in tab.running if awaited(request)}
        if waited_for != asked_since["requests"]:
            asked_since.update(at=time.monotonic(), requests=waited_for)
        # Gradio may leave a stream of answers open though all of them have come.
        only_streams = all("/queue/data" in request.url for request in waited_for)
        return not waited_for or (
            only_streams and time.monotonic() - asked_since["at"] > STREAM_PATIENCE
        )

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
    """Return how many steps of a long run have ended; those of its warm-up do not count."""
    match = re.search(r"step (\d+)/100", tab.inner_text("#status"))
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


def in_sight(tab, selector):
    """Tell whether the whole of an element is on the screen."""
    box = tab.locator(selector).first.bounding_box()
    return box is not None and 0 <= box["y"] <= tab.viewport_size["height"] - box["height"]


def assert_nothing_is_shown(tab):
    """Assert that no clip, no numbers and no files of any run are there."""
    tab.wait_for_selector("#pair video", state="detached")
    tab.wait_for_selector("#numbers .va-cards", state="detached")
    tab.wait_for_selector("#files a", state="detached")
    tab.wait_for_selector("#reuse[disabled]")


def test_an_example_is_there_before_any_run(tab):
    tab.wait_for_selector("#numbers .va-cards")
    tab.wait_for_selector("#accelerated video")
    until(lambda: tab.locator("#examples img").count() >= 3)
    assert tab.locator("#history").count() == 0 or not tab.locator("#history").is_visible()
    until(lambda: both_ready(tab) and not any(clip[1] for clip in playing(tab)))
    tab.locator("#examples button.thumbnail-item, #examples .grid-container button").nth(1).click()
    tab.wait_for_selector("#numbers:has-text('a cyan dotted square')")


def test_generate_compare_and_look_back(tab, tmp_path):
    tab.click("#generate")
    wait_until_done(tab)
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
    tab.click("#frames-shown button")
    tab.wait_for_selector("#frames-shown img:visible")
    assert tab.evaluate(NAMELESS) == []
    with tab.expect_download() as download:
        tab.locator("#files a", has_text="B").first.click()
    clip = tmp_path / "clip.mp4"
    download.value.save_as(clip)

    # The clip brings its settings back, and so does the history.
    tab.reload()
    tab.wait_for_selector("#generate:has-text('Generate')")
    tab.wait_for_selector("#history .grid-container button")
    settle(tab)
    fill(tab, prompt="something else", seed=5)
    with tab.expect_file_chooser() as chooser:
        tab.click("#load")
    chooser.value.set_files(clip)
    tab.wait_for_selector("#settings-note:has-text('the settings of clip.mp4')")
    until(lambda: tab.input_value("#prompt textarea").startswith("a magenta"))
    assert tab.input_value("#seed input") == "0"
    fill(tab, prompt="something else")
    tab.locator("#history .grid-container button").first.click()
    tab.wait_for_selector("#numbers:has-text('48x48')")
    tab.click("#reuse")
    until(lambda: tab.input_value("#prompt textarea").startswith("a magenta"))


def told(tab):
    """All that the status has said since it is recorded."""
    return "\n".join(tab.evaluate("window.statusLines"))


def test_stop_within_a_step_and_go_on(tab):
    long_run(tab)
    tab.evaluate(RECORD_STATUS)
    tab.click("#generate")
    until(lambda: step(tab) >= 2)
    first = step(tab)
    until(lambda: step(tab) > first)
    # A run is asked for its state now and then, so that not every step has to be shown.
    until(lambda: "reused" in told(tab) and "s left" in told(tab))
    assert tab.evaluate("window.bars") > 0
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


def test_low_precision_from_the_page(tab):
    choose_custom(tab)
    fill(tab, plan="every 2")
    tab.locator("#precision label", has_text="int8").click()
    tab.click("#generate")
    wait_until_done(tab)
    assert re.search(
        r"LowPrecision\(format='int8'\), 100 layers, .* -> .* MiB", tab.inner_text("#numbers")
    )
    # The settings of a run bring it back.
    tab.locator("#precision label", has_text="off").click()
    tab.click("#reuse")
    until(lambda: tab.locator("#precision input[value=int8]").is_checked())


def test_a_reload_in_the_middle_goes_on_where_it_was(tab):
    long_run(tab)
    fill(tab, prompt="a red circle", seed=7)
    tab.click("#generate")
    until(lambda: step(tab) >= 2)
    tab.reload()
    tab.wait_for_selector("#status .va-bar")
    # The example that the page comes with is not taken for this run.
    assert_nothing_is_shown(tab)
    # The controls are as they were, and as open.
    tab.wait_for_selector("#steps input:visible")
    tab.wait_for_selector("#plan textarea:visible")
    tab.wait_for_selector("#attention-note:has-text('no GPU here')")
    wanted = {"prompt": "a red circle", "seed": "7", "steps": "100", "plan": "all"}
    until(
        lambda: all(
            tab.locator(f"#{name} :is(input, textarea)").first.input_value() == value
            for name, value in wanted.items()
        )
    )
    before = step(tab)
    until(lambda: step(tab) > before)
    assert tab.locator("#generate").is_disabled()
    tab.click("#stop")
    tab.wait_for_selector("#status:has-text('Stopped at step')")
    tab.wait_for_selector("#generate:not([disabled])")


def lost_in_silence(relay, tab):
    """The connections that there are say nothing any more: a computer slept, a network changed."""
    # As many as a browser makes to one server; another one comes only where one of them has ended.
    tab.evaluate("Promise.all([...Array(20).keys()].map(i => fetch(`/theme.css?${i}`)))")
    relay.lose()


def cut_off(relay, tab):
    """The connections that there are end, and others can be made: a proxy has had enough."""
    relay.cut()


def out_of_reach(relay, tab):
    """The server cannot be reached for a while, until the page has noticed."""
    relay.reachable = False
    relay.cut()


@pytest.mark.parametrize("happens", [lost_in_silence, cut_off, out_of_reach])
def test_a_run_goes_on_after_a_lost_connection(browser, server, happens):
    relay = Relay(int(server.rpartition(":")[2]))
    context = browser.new_context()
    context.set_default_timeout(1000 * PATIENCE)
    try:
        tab = open_page(context, relay.address)
        long_run(tab)
        tab.click("#generate")
        until(lambda: step(tab) >= 1)
        happens(relay, tab)
        if not relay.reachable:
            tab.wait_for_selector("text=Connection to the server was lost")
            relay.reachable = True
            tab.wait_for_selector("text=Connection to the server was lost", state="detached")
            tab.wait_for_selector("#status .va-bar")
        before = step(tab)
        until(lambda: step(tab) > before)
        assert tab.locator("#generate").is_disabled()
        tab.click("#stop")
        tab.wait_for_selector("#status:has-text('Stopped at step')")
        tab.wait_for_selector("#generate:not([disabled])")
        # And so does the next one.
        tab.click("#generate")
        tab.wait_for_selector("#status .va-bar")
        tab.click("#stop")
        tab.wait_for_selector("#status:has-text('Stopped at step')")
        tab.wait_for_selector("#generate:not([disabled])")
    finally:
        context.close()
        relay.close()


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
        ({"plan": "/etc/passwd"}, "the steps are auto, learn, all, every N"),
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
    # A clip of before would look like what this message is about.
    assert_nothing_is_shown(tab)


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


@pytest.mark.parametrize("size", [(390, 844), (375, 667), (1280, 900)], ids=str)
def test_progress_is_in_sight(tab, size):
    tab.set_viewport_size({"width": size[0], "height": size[1]})
    long_run(tab)
    tab.click("#generate")
    tab.wait_for_selector("#status .va-bar")
    until(lambda: in_sight(tab, "#status .va-bar") and in_sight(tab, "#stop"))
    # Nothing of the example is left to be taken for this run.
    assert_nothing_is_shown(tab)
    tab.click("#stop")
    tab.wait_for_selector("#status:has-text('Stopped')")
    until(lambda: in_sight(tab, "#status"))


def test_what_is_chosen_is_brought_into_sight(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.locator("#examples button.thumbnail-item").nth(2).click()
    tab.wait_for_selector("#numbers:has-text('a yellow checkered circle')")
    until(lambda: in_sight(tab, "#pair"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.reload()
    tab.wait_for_selector("#generate:has-text('Generate')")
    tab.wait_for_selector("#numbers .va-cards")
    settle(tab)
    fill(tab, steps=101)
    tab.locator("#attention label", has_text="SVG2").click()
    tab.wait_for_selector("#top-p input:visible")
    looked = tab.evaluate(PALE_TEXTS)
    assert looked["looked_at"] > 60 and looked["pale"] == []
    tab.click("#generate")
    tab.wait_for_selector("#status .va-error")
    assert tab.evaluate(PALE_TEXTS)["pale"] == []


def test_examples_say_what_they_show(tab):
    label, first = (
        tab.locator(f"#examples {part}").first.bounding_box()
        for part in ("[data-testid=block-label]", "img")
    )
    assert label["y"] + label["height"] <= first["y"]  # no picture below the label
    prompts = ("a magenta striped square", "a cyan dotted square", "a yellow checkered circle")
    buttons = tab.locator("#examples button.thumbnail-item")
    assert buttons.count() == len(prompts)
    for index, prompt in enumerate(prompts):
        button = buttons.nth(index)
        alt = button.locator("img").get_attribute("alt")
        for text in (button.inner_text(), alt, button.get_attribute("aria-label")):
            assert text.startswith(prompt) and "as fast" in text and "PSNR" in text


def test_everything_has_a_name(tab):
    fill(tab)
    tab.wait_for_selector("#accelerated video")
    assert tab.evaluate(NAMELESS) == []
    names = [
        tab.get_attribute(f"#{name} video", "aria-label") for name in ("original", "accelerated")
    ]
    assert names == ["The original clip", "The accelerated clip"]


def test_a_file_without_settings_is_answered_beside_its_button(tab, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"no": "settings"}))
    tab.wait_for_selector("#accelerated video")
    with tab.expect_file_chooser() as chooser:
        tab.click("#load")
    chooser.value.set_files(file)
    tab.wait_for_selector("#settings-note .va-error:has-text('holds no settings')")
    # It says nothing about the clip, which stays.
    assert tab.locator("#accelerated video").count() == 1
    assert tab.locator("#status .va-error").count() == 0
    tab.click("#reuse")
    tab.wait_for_selector("#settings-note:has-text('the settings of this run')")
    assert tab.locator("#settings-note .va-error").count() == 0
