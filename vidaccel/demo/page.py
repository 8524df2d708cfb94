"""The demo page: a clip with and without acceleration, beside each other."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vidaccel.clips.embedded import EMBEDDED_PROMPT, embedded_model
from vidaccel.clips.generate import load_pipeline
from vidaccel.clips.video import check_writable
from vidaccel.demo import html as panels
from vidaccel.demo.controls import Controls
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.run_store import RunStore, SavedRun
from vidaccel.demo.settings import Limits, Settings
from vidaccel.demo.worker import Worker
from vidaccel.errors import OutputError, VidaccelError

TITLE = "vidaccel"
MADE_BEFORE = "An example, made before."

# The size at which two CPU cores make a clip while one looks at the page.
EMBEDDED_FIRST: dict[str, Any] = {
    "prompt": EMBEDDED_PROMPT,
    "width": 64,
    "height": 64,
    "frames": 9,
    "steps": 50,
    "guidance": 5.0,
}
EMBEDDED_LIMITS = Limits(width=128, height=128, frames=33, steps=100)
EMBEDDED_SIZES = ["64x64", "96x96"]
SIZES = ["832x480", "480x832", "1280x720", "720x1280"]

OWNER = re.compile(r"[0-9a-f]{32}")

# Who this browser is, kept in it, and the run that this tab follows, kept in the tab: after a
# reload the page goes on where it was. Asked with each event, since one can come before `load`.
ARRIVE = "() => [vidaccel.owner(), vidaccel.job()]"
SUBMIT = "(_, ...values) => [vidaccel.owner(), ...values]"
REMEMBER = """(job) => {
  vidaccel.remember(job);
  document.querySelector('#status').scrollIntoView({block: 'nearest', behavior: 'smooth'});
}"""

# Two clips in step: what happens to one of them happens to the other.
HEAD = """<script>
(() => {
  let token = Array.from(crypto.getRandomValues(new Uint8Array(16)),
                         byte => byte.toString(16).padStart(2, '0')).join('');
  let following = '';
  try {  // a browser can forbid storage; then the page forgets when it is reloaded
    token = localStorage.vidaccelOwner ||= token;
    following = sessionStorage.vidaccelJob || '';
  } catch {}
  window.vidaccel = {
    owner: () => token,
    job: () => following,
    remember: (job) => { following = job; try { sessionStorage.vidaccelJob = job; } catch {} },
  };

  const pair = {original: 'accelerated', accelerated: 'original'};
  const partner = (event) => {
    const box = event.target.closest?.('#original, #accelerated');
    return box && document.querySelector(`#${pair[box.id]} video`);
  };
  const follow = (event) => {
    const leader = event.target, other = partner(event);
    if (!other || other.readyState < 1) return;
    if (Math.abs(other.currentTime - leader.currentTime) > 0.06)
      other.currentTime = leader.currentTime;
    if (event.type === 'play' && other.paused) other.play().catch(() => {});
    if (event.type === 'pause' && !other.paused && !leader.ended) other.pause();
    if (event.type === 'ratechange') other.playbackRate = leader.playbackRate;
  };
  // Media events do not bubble, but they can be captured. The accelerated clip leads while both
  // play, so that they do not pull each other to and fro.
  for (const type of ['play', 'pause', 'seeked', 'ratechange'])
    document.addEventListener(type, follow, true);
  document.addEventListener('timeupdate', (event) => {
    if (event.target.closest?.('#accelerated') && !event.target.paused) follow(event);
  }, true);
})();
</script>"""

CSS = (
    panels.CSS
    + """
#original video, #accelerated video { image-rendering: pixelated; background: #141414; }
#pair { flex-wrap: nowrap; gap: 8px; }
#pair > div { min-width: 0 !important; }
#examples .grid-container, #history .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; }
#examples .grid-wrap, #history .grid-wrap { height: auto; min-height: 0; max-height: none; }
#examples img, #history img { image-rendering: pixelated; }
footer { display: none !important; }
"""
)

THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)  # the default fonts are fetched from elsewhere


def create_demo(
    studio: JobQueue, defaults: Settings, sizes: list[str], examples: RunStore
) -> gr.Blocks:
    """The page over a studio.

    Args:
        studio: runs what the page asks for.
        defaults: what the controls show at first.
        sizes: proposed sizes, as in 832x480.
        examples: finished runs that are shown before any other.
    """
    shown_first = examples.of("")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        first = shown_first[0] if shown_first else None
        gr.Markdown(
            f"# {TITLE}\nThe same prompt and the same noise, as the model makes it and accelerated "
            f"without training. Model: {studio.stage.model}."
        )
        owner = gr.Textbox(visible=False)
        job = gr.Textbox(visible=False)
        shown = gr.State(first)
        listed = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                controls = Controls(
                    defaults, studio.limits, sizes, on_attention=studio.stage.attention
                )
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(panels.note(MADE_BEFORE) * bool(first), elem_id="status")
                with gr.Row(elem_id="pair"):
                    original, accelerated = (
                        gr.Video(
                            _path(first and first.clips.get(name)),
                            label=name.capitalize(),
                            elem_id=name,
                            autoplay=True,
                            loop=True,
                            interactive=False,
                            min_width=120,
                        )
                        for name in ("original", "accelerated")
                    )
                numbers = gr.HTML(panels.numbers(first) if first else "", elem_id="numbers")
                with gr.Row():
                    reuse = gr.Button("Use the settings of this run", size="sm", elem_id="reuse")
                    upload = gr.UploadButton(
                        "Settings from a clip or .json",
                        file_types=[".mp4", ".json"],
                        size="sm",
                        elem_id="load",
                    )
                with gr.Accordion("Frames and difference", open=False):
                    sheet = gr.Image(show_label=False, interactive=False, elem_id="sheet")
                files = gr.Files(
                    [str(path) for path in first.downloads] if first else None,
                    label="Downloads",
                    interactive=False,
                    elem_id="files",
                )
        shelf = gr.Gallery(
            _thumbnails(shown_first),
            label="Examples, made before",
            columns=4,
            height="auto",
            allow_preview=False,
            visible=bool(shown_first),
            elem_id="examples",
        )
        history = gr.Gallery(
            label="Your runs",
            columns=4,
            height="auto",
            allow_preview=False,
            visible=False,
            elem_id="history",
        )
        result = [original, accelerated, numbers, sheet, files, shown]

        # The handlers of events: each gives the components that change, with their new values.

        def present(finished: SavedRun | None) -> dict[Any, Any]:
            """Show a run; None changes nothing."""
            if finished is None:
                return {}
            clips = finished.clips
            return {
                original: _path(clips.get("original")),
                accelerated: _path(clips.get("accelerated")),
                numbers: panels.numbers(finished),
                sheet: _path(finished.path("contact-sheet.png")),
                files: [str(path) for path in finished.downloads],
                shown: finished,
            }

        def gallery(token: str) -> dict[Any, Any]:
            """Show the runs of the visitor."""
            runs = studio.runs.of(token)
            return {
                history: gr.update(value=_thumbnails(runs), visible=bool(runs)),
                listed: [run.id for run in runs],
            }

        def buttons(busy: bool) -> dict[Any, Any]:
            """Let a run be stopped while one runs, and begun while none does."""
            return {
                controls.generate: gr.update(value="Generate", interactive=not busy),
                controls.stop: gr.update(value="Stop", interactive=busy),
            }

        def arrive(token: str, _: str) -> dict[Any, Any]:
            """A visitor has opened the page, perhaps again and with a run under way."""
            # The answer may come after a run was begun, so nothing of a run is in it.
            return {owner: _owner(token), **gallery(token), **dict.fromkeys(controls.blank)}

        def submit(token: str, *values: Any) -> dict[Any, Any]:
            """Begin a run with the values of the controls, or say what is wrong with them."""
            try:
                settings = controls.settings(list(values))
                started = studio.submit(_owner(token), settings)
            except VidaccelError as error:
                return {job: "", status: panels.problem(str(error))}
            return {
                job: started.id,
                controls.seed: settings.seed,
                status: panels.status(started.progress),
                # Nothing of what was shown before belongs to this run.
                **dict.fromkeys(result),
                numbers: "",
                **buttons(busy=True),
            }

        def follow(token: str, job_id: str) -> Iterator[dict[Any, Any]]:
            """Show the progress of a run until it has ended."""
            followed = studio.job(_owner(token), job_id)
            if followed is None:
                yield {}
                return
            last: SavedRun | None = None
            for progress in studio.follow(followed):
                news = {status: panels.status(progress), **buttons(busy=not progress.final)}
                if progress.finished is not last:
                    last = progress.finished
                    news |= present(last)
                if progress.final:
                    news |= gallery(token)
                yield news

        def stop(token: str, job_id: str) -> None:
            """Have the visitor's run end."""
            followed = studio.job(_owner(token), job_id)
            if followed is not None:
                studio.stop(followed)

        def choose_example(event: gr.SelectData) -> dict[Any, Any]:
            """Show one of the runs that come with the page."""
            return {status: panels.note(MADE_BEFORE), **present(shown_first[event.index])}

        def choose_run(token: str, ids: list[str], event: gr.SelectData) -> dict[Any, Any]:
            """Show one of the visitor's earlier runs."""
            run = studio.runs.load(_owner(token), ids[event.index])
            if run is None:
                return {status: panels.problem("this run is no longer there"), **gallery(token)}
            return {status: panels.note("A run of yours, made before."), **present(run)}

        def use(finished: SavedRun | None) -> dict[Any, Any]:
            """Put the settings of the shown run into the controls."""
            return {} if finished is None else controls.show(finished.settings)

        def read(path: str) -> dict[Any, Any]:
            """Put the settings of a file into the controls, or say what is wrong with it."""
            try:
                return controls.show(Settings.from_file(Path(path)))
            except VidaccelError as error:
                return {status: panels.problem(str(error))}

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        board = [status, controls.generate, controls.stop, *result, history, listed]
        page.load(
            arrive, [owner, job], [owner, history, listed, *controls.blank], js=ARRIVE, **quiet
        ).then(follow, [owner, job], board, js=ARRIVE, **quiet)
        controls.generate.click(
            submit,
            [owner, *controls.inputs],
            [job, controls.seed, status, controls.generate, controls.stop, *result],
            js=SUBMIT,
            **quiet,
        ).then(None, job, None, js=REMEMBER).then(follow, [owner, job], board, js=ARRIVE, **quiet)
        controls.stop.click(stop, [owner, job], None, js=ARRIVE, queue=False, **quiet)
        shelf.select(choose_example, None, [status, *result], **quiet)
        history.select(choose_run, [owner, listed], [status, history, listed, *result], **quiet)
        reuse.click(use, shown, controls.outputs, **quiet)
        upload.upload(read, upload, [status, *controls.outputs], **quiet)
    page.queue(default_concurrency_limit=None)
    return page


def serve(
    model: str | None = None,
    *,
    load: Callable[[], Any] | None = None,
    defaults: Settings | None = None,
    limits: Limits | None = None,
    queue_size: int = 8,
    out: Path = Path("out/demo"),
    **options: Any,
) -> None:
    """Serve the page until it is interrupted, then end what runs.

    Args:
        model: a folder or hub id; None for the embedded model.
        load: gives its pipeline; None to load it as `vidaccel.clips.generate.load_pipeline` does.
        defaults: what the controls show at first.
        limits: the largest run.
        queue_size: runs that may wait.
        out: folder of the runs. Of all files, only these, the examples and what was uploaded can
            be read, and of the runs only one's own: their folders have names nobody can guess.
        options: of `gr.Blocks.launch`, such as server_name, server_port and share.

    Raises:
        OutputError: the port is taken, or `out` cannot be written.
    """
    check_writable(out / "check.mp4")
    small = model is None
    stage = Worker(load or partial(load_pipeline, model), model or "tiny-wan")
    limits = limits or (EMBEDDED_LIMITS if small else Limits())
    examples = RunStore(embedded_model().parent / "demo")
    studio = JobQueue(stage, RunStore(out), limits, queue_size)
    sizes = EMBEDDED_SIZES if small else SIZES
    # Shown from where they are; Gradio would copy each of them into a folder of its own.
    gr.set_static_paths([studio.runs.root, examples.root])
    try:
        page = create_demo(studio, defaults or first_settings(small), sizes, examples)
        page.launch(
            theme=THEME,
            css=CSS,
            head=HEAD,
            max_file_size="64mb",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            **options,
        )
    except OSError as error:
        raise OutputError(f"cannot serve the page: {error}") from error
    finally:
        studio.close()


def first_settings(embedded: bool, **given: Any) -> Settings:
    """What the controls show at first.

    Args:
        embedded: for the embedded model; for others, what is not given is left to the model.
        given: fields of `Settings`; those that are None are not given.
    """
    first = EMBEDDED_FIRST if embedded else {"prompt": "a cat surfing a wave"}
    return Settings.of(first | {name: value for name, value in given.items() if value is not None})


def _owner(token: str) -> str:
    if not OWNER.fullmatch(token or ""):
        raise gr.Error("this browser has no name: reload the page")
    return token


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _thumbnails(runs: list[SavedRun]) -> list[tuple[str, str]]:
    found = ((run.path("thumbnail.png"), panels.caption(run)) for run in runs)
    return [(str(path), text) for path, text in found if path is not None]
