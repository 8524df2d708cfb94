"""The command `vidaccel compare`: how two clips differ."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.options import add_command, add_json_option
from vidaccel.cli.output import check_writable, free_name, print_result, print_written, write_json

DEFAULT_OUT = "out/compare.mp4"

NOTE = (
    "measured on the frames of the files, so what their compression has lost counts; "
    "vidaccel generate --compare measures frames as they were generated"
)


def add_compare(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "compare", "measure and draw how two clips differ")
    parser.add_argument("reference", type=Path, help="the plain clip")
    parser.add_argument("clip", type=Path, help="the other one, of the same size and length")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"both beside each other, .mp4; {DEFAULT_OUT}, or a number behind it where that is "
        "taken, if left out",
    )
    add_json_option(parser)
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from vidaccel.clips.fidelity import compare_files, fidelity_table, sheet_of

    check_writable(arguments.json)
    out = arguments.out or free_name(Path(DEFAULT_OUT), lambda name: [name, sheet_of(name)])
    result, written = compare_files(arguments.reference, arguments.clip, out)
    result["note"] = NOTE
    print_result(f"{fidelity_table(result)}\nnote: {NOTE}", arguments.json)
    print_written(written)
    write_json(result, arguments.json)
