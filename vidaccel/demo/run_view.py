"""The part of the page that shows one run."""

from pathlib import Path
from typing import Any

import gradio as gr

from vidaccel.demo import html
from vidaccel.demo.run_store import SavedRun


class RunView:
    """The components that show one run, made inside a `gr.Blocks`.

    `show` and `clear` return the components that change, with their new values.

    Args:
        first: the run to show at first; None for none.

    Attributes:
        shown: the run, in the page of one visitor.
        reuse, upload: buttons for the settings of this run, or of a file.
        note: what came of those buttons, beside them.
        accordions: those that open and close, by their element ids.
        outputs: the components that `show` changes.
    """

    def __init__(self, first: SavedRun | None) -> None:
        self.shown = gr.State(first)
        with gr.Row(elem_id="pair"):
            self._original, self._accelerated = (
                gr.Video(
                    _text(first.clips.get(name)) if first else None,
                    label=name.capitalize(),
                    elem_id=name,
                    autoplay=True,
                    loop=True,
                    interactive=False,
                    min_width=120,
                )
                for name in ("original", "accelerated")
            )
        self._numbers = gr.HTML(html.numbers(first) if first else "", elem_id="numbers")
        with gr.Row():
            self.reuse = gr.Button(
                "Use the settings of this run",
                size="sm",
                interactive=first is not None,
                elem_id="reuse",
            )
            self.upload = gr.UploadButton(
                "Settings from a clip or .json",
                file_types=[".mp4", ".json"],
                size="sm",
                elem_id="load",
            )
        self.note = gr.HTML("", elem_id="settings-note")
        sheet = _sheet(first)
        with gr.Accordion(
            "Frames and difference", open=False, visible=sheet is not None, elem_id="frames-shown"
        ) as self._frames:
            self._sheet = gr.Image(
                sheet, label="Frames and difference", show_label=False, interactive=False
            )
        files = [str(path) for path in first.downloads] if first else []
        self._files = gr.Files(
            files or None,
            label="Downloads",
            interactive=False,
            visible=bool(files),
            elem_id="files",
        )
        self.accordions = {"frames-shown": self._frames}
        self.outputs = [
            self._original,
            self._accelerated,
            self._numbers,
            self.reuse,
            self.note,
            self._frames,
            self._sheet,
            self._files,
            self.shown,
        ]

    def show(self, run: SavedRun | None) -> dict[Any, Any]:
        """Show a run; None shows that there is none."""
        clips = run.clips if run is not None else {}
        files = [str(path) for path in run.downloads] if run is not None else []
        sheet = _sheet(run)
        return {
            self._original: _text(clips.get("original")),
            self._accelerated: _text(clips.get("accelerated")),
            self._numbers: html.numbers(run) if run is not None else "",
            self.reuse: gr.update(interactive=run is not None),
            self.note: "",
            self._frames: gr.update(visible=sheet is not None),
            self._sheet: sheet,
            self._files: gr.update(value=files or None, visible=bool(files)),
            self.shown: run,
        }

    def clear(self) -> dict[Any, Any]:
        """Show nothing, as where a run begins or fails: what was there is not of that run."""
        return self.show(None)


def _sheet(run: SavedRun | None) -> str | None:
    """Return the path of the frames of both clips; None where there are none."""
    return None if run is None else _text(run.path("contact-sheet.png"))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
