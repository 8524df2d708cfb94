"""The command `vidaccel compare`: how two clips differ."""

import argparse
from pathlib import Path
from typing import Any

from vidaccel.cli.options import add_command, add_json_option
from vidaccel.cli.output import check_writable, print_result, print_written, write_json


def add_compare(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "compare", "measure and draw how two clips differ")
    parser.add_argument("reference", type=Path, help="the plain clip")
    parser.add_argument("clip", type=Path, help="the other one, of the same size and length")
    parser.add_argument(
        "--out", type=Path, default=Path("out/compare.mp4"), help="both beside each other, .mp4"
    )
    add_json_option(parser)
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from vidaccel.clips.fidelity import compare_files, fidelity_table

    check_writable(arguments.json)
    result, written = compare_files(arguments.reference, arguments.clip, arguments.out)
    print_result(fidelity_table(result), arguments.json)
    print_written(written)
    write_json(result, arguments.json)
