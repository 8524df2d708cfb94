"""The folder of finished runs: a clip, its original, their settings and numbers."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel import video
from vidaccel.console import finite
from vidaccel.errors import OutputError, SettingsError
from vidaccel.files import write_text
from vidaccel.studio.settings import Settings
from vidaccel.video import Clip

RUN_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")

# Clip of a run -> the end of its file name.
ENDINGS = {"accelerated": "", "original": "-original"}


@dataclass(frozen=True)
class Finished:
    """A run as its files tell it.

    Attributes:
        id: names its files.
        folder: where they are.
        settings: what was asked for.
        result: what `vidaccel.studio.jobs` measured, read from JSON.
    """

    id: str
    folder: Path
    settings: Settings
    result: dict[str, Any]

    def path(self, ending: str) -> Path | None:
        """The file <id><ending>, if there is one."""
        path = self.folder / f"{self.id}{ending}"
        return path if path.is_file() else None

    @property
    def clips(self) -> dict[str, Path]:
        """Its clips: "accelerated", "original" or both."""
        found = {name: self.path(f"{ending}.mp4") for name, ending in ENDINGS.items()}
        return {name: path for name, path in found.items() if path is not None}

    @property
    def downloads(self) -> list[Path]:
        """The files for the user: clips, both beside each other, settings and numbers."""
        endings = [*(f"{ending}.mp4" for ending in ENDINGS.values()), "-side-by-side.mp4", ".json"]
        return [path for ending in endings if (path := self.path(ending)) is not None]


class Runs:
    """Runs in a folder, kept apart by owner.

    Args:
        root: the folder; made when the first run is saved.
        keep: runs of one owner; older ones are removed.
    """

    def __init__(self, root: Path, keep: int = 50) -> None:
        self.root = root.resolve()
        self.keep = keep

    def folder(self, owner: str) -> Path:
        """Where the runs of an owner are. The name tells nothing about the owner's token."""
        return self.root / (sha256(owner.encode()).hexdigest()[:24] if owner else ".")

    def save(
        self,
        owner: str,
        settings: Settings,
        result: dict[str, Any],
        clips: Mapping[str, Clip],
        run: str | None = None,
    ) -> Finished:
        """Write a run, or write it again when there is more of it.

        Args:
            owner: the token of the browser.
            settings: what was asked for.
            result: plain numbers.
            clips: "accelerated", "original" or both.
            run: the id, when it was written before.

        Raises:
            OutputError, VideoError: the folder cannot be written.
        """
        # Sorts by time, and cannot be guessed.
        run = run or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(8)}"
        folder = self.folder(owner)
        comment = settings.to_json()
        for name, clip in clips.items():
            video.write_video(
                folder / f"{run}{ENDINGS[name]}.mp4", clip, settings.fps, comment=comment
            )
        if len(clips) == 2:
            beside = {"original": clips["original"], "accelerated": clips["accelerated"]}
            video.write_video(
                folder / f"{run}-side-by-side.mp4",
                video.side_by_side(beside),
                settings.fps,
                comment=comment,
            )
            video.write_image(folder / f"{run}-contact-sheet.png", video.contact_sheet(beside))
        first = next(iter(clips.values()))
        video.write_image(folder / f"{run}-thumbnail.png", _enlarged(first[len(first) // 2]))
        result = finite(result)
        described = {"settings": settings.model_dump(mode="json"), **result}
        try:
            # Last: a run without it does not exist.
            write_text(folder / f"{run}.json", json.dumps(described, indent=1) + "\n")
            self._remove_old(folder)
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
        return Finished(run, folder, settings, result)

    def load(self, owner: str, run: str) -> Finished | None:
        """One run of an owner; None when there is no such run."""
        if not RUN_ID.fullmatch(run):
            return None
        path = self.folder(owner) / f"{run}.json"
        try:
            text = path.read_text(encoding="utf-8")
            settings = Settings.from_json(text)
            result = json.loads(text)
        except (OSError, UnicodeDecodeError, SettingsError):
            return None
        result.pop("settings")
        return Finished(run, path.parent, settings, result)

    def of(self, owner: str) -> list[Finished]:
        """All runs of an owner, the newest first."""
        files = sorted(self.folder(owner).glob("*.json"), reverse=True)
        runs = (self.load(owner, file.stem) for file in files)
        return [run for run in runs if run is not None]

    def _remove_old(self, folder: Path) -> None:
        for file in sorted(folder.glob("*.json"), reverse=True)[self.keep :]:
            for old in folder.glob(f"{file.stem}*"):
                old.unlink(missing_ok=True)


def _enlarged(frame: Clip) -> Clip:
    factor = max(1, -(-160 // frame.shape[0]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)
