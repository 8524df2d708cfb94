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
            self.reuse = gr.Button("Use the settings of this run", size="sm", elem_id="reuse")
            self.upload = gr.UploadButton(
                "Settings from a clip or .json",
                file_types=[".mp4", ".json"],
                size="sm",
                elem_id="load",
            )
        with gr.Accordion("Frames and difference", open=False):
            self._sheet = gr.Image(show_label=False, interactive=False, elem_id="sheet")
        self._files = gr.Files(
            [str(path) for path in first.downloads] if first else None,
            label="Downloads",
            interactive=False,
            elem_id="files",
        )
        self.outputs = [
            self._original,
            self._accelerated,
            self._numbers,
            self._sheet,
            self._files,
            self.shown,
        ]

    def show(self, run: SavedRun | None) -> dict[Any, Any]:
        """Show a run; None changes nothing."""
        if run is None:
            return {}
        return {
            self._original: _text(run.clips.get("original")),
            self._accelerated: _text(run.clips.get("accelerated")),
            self._numbers: html.numbers(run),
            self._sheet: _text(run.path("contact-sheet.png")),
            self._files: [str(path) for path in run.downloads],
            self.shown: run,
        }

    def clear(self) -> dict[Any, Any]:
        """Show nothing."""
        return {**dict.fromkeys(self.outputs), self._numbers: ""}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
