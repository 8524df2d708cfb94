"""The folder of saved runs: a clip, its original, their settings and numbers."""

import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidaccel.clips import video
from vidaccel.clips.video import Clip
from vidaccel.demo.settings import Settings
from vidaccel.errors import OutputError, SettingsError
from vidaccel.files import finite, write_text

RUN_ID = re.compile(r"[0-9a-z][0-9a-z-]{0,63}")

CLIPS = ("accelerated", "original")
DESCRIPTION = "run.json"


@dataclass(frozen=True)
class SavedRun:
    """A run as it is in its files.

    Attributes:
        folder: where the files are; its name is the id of the run.
        settings: what was asked for.
        result: the numbers that `vidaccel.demo.worker` measured, as read from JSON.
    """

    folder: Path
    settings: Settings
    result: dict[str, Any]

    @property
    def id(self) -> str:
        """The name of the run among those of its owner."""
        return self.folder.name

    def path(self, name: str) -> Path | None:
        """Return the path of a file of the run; None when there is no such file."""
        path = self.folder / name
        return path if path.is_file() else None

    @property
    def clips(self) -> dict[str, Path]:
        """The clips by name: "accelerated", "original" or both."""
        found = {name: self.path(f"{name}.mp4") for name in CLIPS}
        return {name: path for name, path in found.items() if path is not None}

    @property
    def fidelity(self) -> dict[str, Any] | None:
        """The measurements of `vidaccel.clips.fidelity.fidelity`; None without a comparison."""
        found: dict[str, Any] | None = self.result.get("closeness")  # its name in the files
        return found

    @property
    def downloads(self) -> list[Path]:
        """The files for the user: the clips, both beside each other, settings and numbers."""
        names = [*(f"{name}.mp4" for name in CLIPS), "side-by-side.mp4", DESCRIPTION]
        return [path for name in names if (path := self.path(name)) is not None]


class RunStore:
    """The saved runs in a folder, kept apart by owner.

    Args:
        root: the folder; made when the first run is saved.
        keep: number of runs of one owner; older ones are removed.
    """

    def __init__(self, root: Path, keep: int = 50) -> None:
        self.root = root.resolve()
        self.keep = keep

    def folder(self, owner: str) -> Path:
        """Return the folder of an owner, whose name does not give the owner's token away."""
        return self.root / (sha256(owner.encode()).hexdigest()[:24] if owner else ".")

    def save(
        self,
        owner: str,
        settings: Settings,
        result: dict[str, Any],
        clips: Mapping[str, Clip],
        run_id: str | None = None,
    ) -> SavedRun:
        """Write a run, or write it again when there is more of it.

        Args:
            owner: the token of the browser.
            settings: what was asked for.
            result: plain numbers.
            clips: "accelerated", "original" or both.
            run_id: the id of the run when it was written before; None for a new one.

        Raises:
            OutputError, VideoError: the folder cannot be written.
        """
        # Sorts by time, and cannot be guessed.
        now = time.time_ns() // 1_000_000
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now // 1000))
        run_id = run_id or f"{stamp}-{now % 1000:03d}-{secrets.token_hex(8)}"
        folder = self.folder(owner) / run_id
        files = dict(clips)
        if len(clips) == len(CLIPS):
            beside = {name: clips[name] for name in ("original", "accelerated")}
            files["side-by-side"] = video.side_by_side(beside)
            video.write_image(folder / "contact-sheet.png", video.contact_sheet(beside))
        comment = settings.to_json()
        for name, clip in files.items():
            video.write_video(folder / f"{name}.mp4", clip, settings.fps, comment=comment)
        first = next(iter(clips.values()))
        video.write_image(folder / "thumbnail.png", _enlarged(first[len(first) // 2]))
        result = finite(result)
        described = {"settings": settings.model_dump(mode="json"), **result}
        try:
            # Last: a run without it does not exist.
            write_text(folder / DESCRIPTION, json.dumps(described, indent=1) + "\n")
            for old in self._folders(owner)[self.keep :]:
                shutil.rmtree(old)
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
        return SavedRun(folder, settings, result)

    def load(self, owner: str, run_id: str) -> SavedRun | None:
        """Return one run of an owner; None when there is no such run."""
        if not RUN_ID.fullmatch(run_id):
            return None
        folder = self.folder(owner) / run_id
        try:
            text = (folder / DESCRIPTION).read_text(encoding="utf-8")
            settings = Settings.from_json(text)
            result = json.loads(text)
        except (OSError, UnicodeDecodeError, SettingsError):
            return None
        result.pop("settings")
        return SavedRun(folder, settings, result)

    def of(self, owner: str) -> list[SavedRun]:
        """Return all runs of an owner, the newest first."""
        runs = (self.load(owner, folder.name) for folder in self._folders(owner))
        return [run for run in runs if run is not None]

    def _folders(self, owner: str) -> list[Path]:
        return sorted((f.parent for f in self.folder(owner).glob(f"*/{DESCRIPTION}")), reverse=True)


def _enlarged(frame: Clip) -> Clip:
    factor = max(1, -(-160 // frame.shape[0]))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)
