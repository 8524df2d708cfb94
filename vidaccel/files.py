"""Files of text and JSON: found writable in time, written whole, holding what JSON can hold."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from vidaccel.errors import OutputError


def check_writable(*paths: Path | None) -> None:
    """Find out before any work that files can be written later; None is no file.

    Makes the folders if need be.

    Raises:
        OutputError: one of them cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            with path.open("a"):
                pass
            if new:
                path.unlink()
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: after a crash there is the old file, the new one, or none.

    Makes the folder if need be. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process and thread: others may be writing the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: without infinity, so the PSNR of equal clips is null."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, *, one_line: str | None = None) -> str:
    """Return a value as JSON, sorted and indented, without infinities.

    Args:
        value: what JSON can hold.
        one_line: name of a list in it whose many items take a line each.
    """
    value = finite(value)
    items: list[str] = []
    if one_line is not None and value[one_line]:
        items = [json.dumps(item, sort_keys=True) for item in value[one_line]]
        value = {**value, one_line: []}
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    if not items:
        return text
    lines = ",\n    ".join(items)
    return text.replace(f'\n  "{one_line}": []', f'\n  "{one_line}": [\n    {lines}\n  ]')
