"""Results of a command: a table for people, JSON for programs, and the files that were written."""

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

from vidaccel import files


def check_writable(*paths: Path | None) -> None:
    """Find out before any work that files can be written later; "-" is the screen.

    Raises:
        OutputError: one of them cannot be written.
    """
    files.check_writable(*(path for path in paths if not _is_screen(path)))


def print_result(table: str, json_path: Path | None) -> None:
    """Print a result for people; on stderr where stdout is taken by JSON."""
    print(table, file=sys.stderr if _is_screen(json_path) else sys.stdout)


def print_written(paths: Iterable[Path]) -> None:
    """Print which files were written."""
    for path in paths:
        print(f"wrote {path}", file=sys.stderr)


def print_quiet(paths: Iterable[Path], json_path: Path | None) -> None:
    """Print the names of files and nothing else; nothing at all where stdout is taken by JSON."""
    if not _is_screen(json_path):
        for path in paths:
            print(path)


def numbered_names(path: Path, number: int) -> list[Path]:
    """Return names for so many files: video-1.mp4, video-2.mp4 and so on, or the name itself."""
    if number == 1:
        return [path]
    digits = len(str(number))
    return [path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(1, number + 1)]


def free_name(path: Path, written: Callable[[Path], Iterable[Path]]) -> Path:
    """Return a name under which nothing is written over: the path, or path-2, path-3 and so on.

    Args:
        path: the name that is wanted.
        written: the files that are written under a name.
    """
    names = (path if i == 1 else path.with_stem(f"{path.stem}-{i}") for i in count(1))
    return next(name for name in names if not any(file.exists() for file in written(name)))


def write_json(result: dict[str, Any], path: Path | None, *, one_line: str | None = None) -> None:
    """Write a result, sorted and indented; on stdout for the path "-", nowhere for None.

    The items of the list that `one_line` names take a line each.
    """
    if path is None:
        return
    text = files.json_text(result, one_line=one_line)
    if _is_screen(path):
        print(text, end="")
    else:
        path.write_text(text)


def _is_screen(path: Path | None) -> bool:
    """Tell whether a path stands for stdout."""
    return str(path) == "-"


def print_bench(
    arguments: argparse.Namespace,
    result: Any,
    table: Callable[[Any], str],
    draw: Callable[[Any, Path], object] | None = None,
) -> None:
    """Print what a bench has measured, and write and draw it where that was asked for.

    Args:
        arguments: those of the command line, with --json, and with --plot where it draws.
        result: has a `to_dict`.
        table: shows it.
        draw: draws it into a file.

    Raises:
        OutputError: it cannot be written.
    """
    print_result(table(result), arguments.json)
    found = result.to_dict()
    write_json(found, arguments.json, one_line="points" if "points" in found else None)
    if draw is not None and arguments.plot is not None:
        draw(result, arguments.plot)
        print_written([arguments.plot])
