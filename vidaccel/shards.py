"""A folder of small JSON files, from which a long measurement that was stopped goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vidaccel.errors import VidaccelError
from vidaccel.files import write_text

Parsed = TypeVar("Parsed")

_MANIFEST = "task.json"


def _as_it_is(data: Any) -> Any:
    return data


def read_manifest(path: Path) -> Any:
    """Read what is measured in a folder of shards; raises OSError or ValueError without one."""
    return json.loads((path / _MANIFEST).read_text(encoding="utf-8"))


class ShardFolder:
    """The shards of one measurement, beside a manifest that says what is measured.

    Every file appears whole or not at all, so that a killed run leaves nothing half written.

    Args:
        path: the folder; made if need be.
        manifest: what tells this measurement from others; kept as JSON.
        owner: what the folder belongs to, in a message: "build" or "run".
        error: the class of what is raised.

    Raises:
        VidaccelError: as `error`: the folder belongs to another measurement, or cannot be read or
            written.
    """

    def __init__(
        self, path: Path, manifest: Mapping[str, Any], owner: str, error: type[VidaccelError]
    ) -> None:
        self.path, self._error = path, error
        wanted: dict[str, Any] = json.loads(json.dumps(manifest, default=str))
        found = self._load(path / _MANIFEST)
        if found is None:
            self._write(path / _MANIFEST, wanted)
            return
        if not isinstance(found, dict):
            raise self._unreadable(path / _MANIFEST, f"found {type(found).__name__}")
        keys = sorted({*wanted, *found})
        if differing := [key for key in keys if found.get(key) != wanted.get(key)]:
            raise error(
                f"{path} belongs to another {owner}: its {', '.join(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}; use another work folder"
            )

    def read(self, name: str, parse: Callable[[Any], Parsed] = _as_it_is) -> Parsed | None:
        """Read a shard; None when there is no such shard yet.

        Args:
            name: name of the file, without .json.
            parse: what its JSON is passed through; a TypeError, KeyError or ValueError that it
                raises means that the shard is damaged.
        """
        file = self._file(name)
        data = self._load(file)
        if data is None:
            return None
        try:
            return parse(data)
        except (TypeError, KeyError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def write(self, name: str, data: Any) -> None:
        """Keep a shard; infinite numbers are kept as Python's JSON does."""
        self._write(self._file(name), data)

    def names(self, pattern: str) -> list[str]:
        """Return the names of the shards that fit a pattern of `Path.glob`, sorted."""
        return sorted(file.stem for file in self.path.glob(f"{pattern}.json"))

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _load(self, file: Path) -> Any | None:
        if not file.exists():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(file, error) from error
        if data is None:  # which says that there is no file
            raise self._unreadable(file, "found null")
        return data

    def _write(self, file: Path, data: Any) -> None:
        try:
            write_text(file, json.dumps(data, sort_keys=True) + "\n")
        except OSError as error:
            raise self._error(
                f"cannot write {file}: {error.strerror}; what was measured before is kept, and "
                "the same command goes on from there"
            ) from error

    def _unreadable(self, file: Path, reason: object) -> VidaccelError:
        return self._error(f"cannot read {file} ({reason}); remove it and run again")
