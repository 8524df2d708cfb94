"""The demo page: a clip with and without acceleration, beside each other."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from vidaccel.demo import html
from vidaccel.demo.controls import Controls
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.run_store import RunStore, SavedRun
from vidaccel.demo.run_view import RunView
from vidaccel.demo.settings import Settings
from vidaccel.errors import VidaccelError

TITLE = "vidaccel"
MADE_BEFORE = "Shown below: an example, made before."
YOURS = "Shown below: a run of yours, made before."

OWNER = re.compile(r"[0-9a-f]{32}")

# What page.js is asked as an event begins; see there.
VISITOR = "() => [vidaccel.owner(), vidaccel.job()]"
ASK = "() => [vidaccel.owner(), vidaccel.job(), vidaccel.heard(), vidaccel.ask()]"
ARRIVAL = "() => [vidaccel.owner(), vidaccel.job(), vidaccel.opened()]"
OWNER_AND_VALUES = "(_, ...values) => [vidaccel.owner(), ...values]"
LOOK = "() => vidaccel.look()"
REMEMBER = "(job) => vidaccel.remember(job)"

# Of every event: no overlay while it is handled, no place in the public API, and an answer of its
# own. Those of Gradio's queue come over one connection that has to last, and where that is lost
# without a word (a computer that slept, another network), the page would wait for them for ever.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

# component -> its new value. Where nothing changes, it is gr.skip(): Gradio takes an empty one for
# a value.
Updates = dict[Any, Any]


# The colours of Gradio's theme that are too pale: text has to have a contrast of 4.5 to 1.
LEGIBLE = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "block_label_text_color": "*neutral_600",
    "block_label_text_color_dark": "*neutral_200",
    "block_title_text_color": "*neutral_600",
    "block_title_text_color_dark": "*neutral_200",
    "link_text_color_dark": "*secondary_300",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "button_cancel_background_fill": gr.themes.colors.red.c700,
    "button_cancel_background_fill_hover": gr.themes.colors.red.c800,
}


def create_demo(
    queue: JobQueue, defaults: Settings, sizes: list[str], examples: RunStore
) -> gr.Blocks:
    """Build the page over a queue.

    Args:
        queue: runs what the page asks for.
        defaults: what the controls show at first.
        sizes: proposed sizes, as in 832x480.
        examples: saved runs that are shown before any other.
    """
    return Page(queue, defaults, sizes, examples).blocks


def look() -> dict[str, Any]:
    """Return the arguments of `gr.Blocks.launch` that make the page look and act as it should."""
    folder = files("vidaccel.demo")
    script = (folder / "page.js").read_text(encoding="utf-8")
    # Gradio's default fonts are fetched from elsewhere.
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**LEGIBLE)
    return {
        "theme": theme,
        "css": (folder / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>\n{script}</script>",
    }


class Page:
    """The page: its components, and what happens when a visitor uses them.

    The handlers of events return the components that change, with their new values. Each gets the
    token of the visitor's browser.

    Args: those of `create_demo`.

    Attributes:
        blocks: the page for Gradio.
    """

    def __init__(
        self, queue: JobQueue, defaults: Settings, sizes: list[str], examples: RunStore
    ) -> None:
        self._queue = queue
        self._examples = examples.of("")
        first = self._examples[0] if self._examples else None
        self.blocks = gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400))
        with self.blocks:
            gr.Markdown(
                f"# {TITLE}\nThe same prompt and the same noise, as the model makes it and "
                f"accelerated without training. Model: {queue.worker.model}."
            )
            self._owner = gr.Textbox(visible=False)
            self._job = gr.Textbox(visible=False)
            self._opened = gr.Textbox(visible=False)
            # What the page has been told of a run, and the button with which page.js asks for more.
            self._heard = gr.HTML("", visible="hidden", elem_id="heard")
            self._asked = gr.Textbox(visible=False)
            self._ask = gr.Button("Ask", visible="hidden", elem_id="ask")
            self._history_ids = gr.State([])
            with gr.Row(elem_id="board"):  # page.css lays it out on a narrow screen
                with gr.Column(scale=2, min_width=320):
                    self._controls = Controls(
                        defaults, queue.limits, sizes, on_attention=queue.worker.attention
                    )
                with gr.Column(scale=3, min_width=320):
                    self._status = gr.HTML(
                        html.note(MADE_BEFORE) if first else "", elem_id="status"
                    )
                    with gr.Column(elem_id="shown"):
                        self._view = RunView(first)
            self._accordions = self._controls.accordions | self._view.accordions
            self._gallery = _gallery("Examples, made before", "examples", self._examples)
            self._history = _gallery("Your runs", "history", [])
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)

    def _connect(self) -> None:
        """Connect the events of the components with their handlers."""
        controls, view, status = self._controls, self._view, self._status
        visitor, history = [self._owner, self._job], [self._history, self._history_ids]
        buttons = [controls.generate, controls.stop]
        arrival = [self._owner, *history, *controls.outputs, *self._accordions.values()]
        self.blocks.load(
            self.arrive,
            [*visitor, self._opened],
            list(dict.fromkeys(arrival)),
            js=ARRIVAL,
            **QUIET,
        )
        controls.generate.click(
            self.submit,
            [self._owner, *controls.inputs],
            [self._job, controls.seed, status, *buttons, *view.outputs],
            js=OWNER_AND_VALUES,
            **QUIET,
        ).then(None, self._job, None, js=REMEMBER)
        # A question or a wish to stop whose answer is lost is not in the way of the next one.
        self._ask.click(
            self.follow,
            [*visitor, self._heard, self._asked],
            [self._heard, status, *buttons, *view.outputs, *history],
            js=ASK,
            trigger_mode="multiple",
            show_progress_on=self._asked,  # elsewhere Gradio writes how long it takes, unseen
            **QUIET,
        )
        controls.stop.click(self.stop, visitor, None, js=VISITOR, trigger_mode="multiple", **QUIET)
        self._gallery.select(self.choose_example, None, [status, *view.outputs], **QUIET).then(
            None, None, None, js=LOOK
        )
        self._history.select(
            self.choose_run,
            [self._owner, self._history_ids],
            [status, *history, *view.outputs],
            **QUIET,
        ).then(None, None, None, js=LOOK)
        view.reuse.click(self.use, view.shown, [view.note, *controls.outputs], **QUIET)
        view.upload.upload(self.read, view.upload, [view.note, *controls.outputs], **QUIET)

    def arrive(self, token: str, job_id: str, opened: str) -> Updates:
        """Answer a visitor who has opened the page, perhaps again and with a run under way.

        Args:
            token: the visitor's.
            job_id: the run that this tab follows; "" for none.
            opened: names of the accordions that were open before, joined by commas.
        """
        # The answer may come after a run was begun, so nothing of a run's progress is in it.
        job = self._queue.job(_checked(token), job_id)
        controls = self._controls
        fields = dict.fromkeys(controls.blank) if job is None else controls.show(job.settings)
        was_open = [name for name in opened.split(",") if name in self._accordions]
        return {
            self._owner: token,
            **self._show_history(token),
            **fields,
            **(controls.open_custom() if "custom" in was_open else {}),
            **{self._accordions[name]: gr.update(open=True) for name in was_open},
        }

    def submit(self, token: str, *values: Any) -> Updates:
        """Begin a run with the values of the controls, or show what is wrong with them."""
        try:
            settings = self._controls.settings(list(values))
            job = self._queue.submit(_checked(token), settings)
        except VidaccelError as error:
            problem = html.problem(str(error))
            return {self._job: "", self._status: problem, **self._view.clear()}
        return {
            self._job: job.id,
            self._controls.seed: settings.seed,
            self._status: html.status(job.progress),
            **self._view.clear(),
            **self._controls.show_busy(True),
        }

    def follow(self, token: str, job_id: str, heard: str, asked: str) -> Updates:
        """Show what has become of a run since the page was told of it last.

        Args:
            token: the visitor's.
            job_id: the run that this tab follows.
            heard: what came with the answer that the page shows; "" where it has had none.
            asked: names the question, and comes back with its answer.
        """
        before, number, saves, *_ = [*heard.split(), "", "", ""]
        job = self._queue.job(_checked(token), job_id)
        if job is None:
            forgotten = html.note("This run is no longer known here.")
            return {
                self._heard: f"{job_id} 0 0 over {asked}",
                **({self._status: forgotten} if before == job_id else {}),
                **self._controls.show_busy(False),
            }
        progress = self._queue.look(job)
        state = "over" if progress.final else "on"
        updates: Updates = {
            self._heard: f"{job_id} {progress.number} {progress.saves} {state} {asked}"
        }
        if (before, number) != (job_id, str(progress.number)):
            updates |= {
                self._status: html.status(progress),
                **self._controls.show_busy(not progress.final),
            }
            if progress.final:
                updates |= self._show_history(token)
        if (before, saves) != (job_id, str(progress.saves)):
            updates |= self._view.show(progress.saved)
        return updates

    def stop(self, token: str, job_id: str) -> None:
        """Have the visitor's run end."""
        job = self._queue.job(_checked(token), job_id)
        if job is not None:
            self._queue.stop(job)

    def choose_example(self, event: gr.SelectData) -> Updates:
        """Show one of the runs that come with the page."""
        run = self._examples[event.index]
        return {self._status: html.note(MADE_BEFORE), **self._view.show(run)}

    def choose_run(self, token: str, ids: list[str], event: gr.SelectData) -> Updates:
        """Show one of the visitor's earlier runs."""
        run = self._queue.store.load(_checked(token), ids[event.index])
        if run is None:
            problem = html.problem("this run is no longer there")
            return {self._status: problem, **self._show_history(token), **self._view.clear()}
        return {self._status: html.note(YOURS), **self._view.show(run)}

    def use(self, run: SavedRun | None) -> Updates:
        """Put the settings of the shown run into the controls."""
        if run is None:
            unchanged: Updates = gr.skip()
            return unchanged
        note = html.note("The controls show the settings of this run now.")
        return {self._view.note: note, **self._controls.show(run.settings)}

    def read(self, path: str) -> Updates:
        """Put the settings of a file into the controls, or show what is wrong with it."""
        note, name = self._view.note, Path(path).name
        try:
            fields = self._controls.show(Settings.from_file(Path(path)))
        except VidaccelError as error:
            return {note: html.problem(str(error))}
        return {note: html.note(f"The controls show the settings of {name} now."), **fields}

    def _show_history(self, token: str) -> Updates:
        """Show the runs of a visitor."""
        runs = self._queue.store.of(token)
        return {
            self._history: gr.update(value=_thumbnails(runs), visible=bool(runs)),
            self._history_ids: [run.id for run in runs],
        }


def _checked(token: str) -> str:
    """Return the token of a browser; raises gr.Error if it is none."""
    if not OWNER.fullmatch(token or ""):
        raise gr.Error("this browser has no name: reload the page")
    return token


def _gallery(label: str, name: str, runs: list[SavedRun]) -> gr.Gallery:
    return gr.Gallery(
        _thumbnails(runs),
        label=label,
        columns=4,
        height="auto",
        allow_preview=False,
        buttons=[],
        visible=bool(runs),
        elem_id=name,
    )


def _thumbnails(runs: list[SavedRun]) -> list[tuple[str, str]]:
    found = ((run.path("thumbnail.png"), html.caption(run)) for run in runs)
    return [(str(path), text) for path, text in found if path is not None]
