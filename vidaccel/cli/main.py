"""The command line: vidaccel COMMAND; --help lists them."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from vidaccel import __version__
from vidaccel.cli.bench import add_bench
from vidaccel.cli.compare import add_compare
from vidaccel.cli.demo import add_demo
from vidaccel.cli.env import add_env, add_hosts
from vidaccel.cli.generate import add_generate
from vidaccel.cli.policies import add_policies
from vidaccel.cli.policy import add_build_policy, add_show
from vidaccel.cli.threshold import add_suggest_threshold
from vidaccel.errors import VidaccelError

# Each adds one command. What it runs imports torch and the rest when it runs, and no sooner.
COMMANDS = (
    add_generate,
    add_compare,
    add_demo,
    add_build_policy,
    add_show,
    add_policies,
    add_suggest_threshold,
    add_bench,
    add_hosts,
    add_env,
)


# With this in the environment, a failure that is not the user's shows where it came from.
TRACEBACK = "VIDACCEL_TRACEBACK"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and of the command that was meant.

    Options have to be written out: an abbreviation would be read as another option without a word.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    # Its own type is that of two overloads.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and leave where something is not known: here it is known which command it is."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, re.findall(r"--[a-z-]+", self.format_help()), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            kind = "option" if name.startswith("-") else "argument"
            self.error(f"there is no {kind} {name}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with code 2."""
        self.exit(2, f"{self.prog}: {_on_one_line(message)} ({self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 after a failure, of which one line on stderr tells, 130 after Ctrl-C, or
        141 when nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = arguments.run
        run(arguments)
        sys.stdout.flush()
    except VidaccelError as error:
        return _failed(str(error))
    except BrokenPipeError:
        # What is still in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        print("vidaccel: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        kind = type(error).__name__
        return _failed(f"{kind}: {error} ({TRACEBACK}=1 shows where this came from)")
    return 0


def _failed(message: str) -> int:
    """Print a failure on one line, and return its exit code."""
    print(f"vidaccel: {_on_one_line(message)}", file=sys.stderr)
    return 2


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, which takes the arguments."""
    parser = _Parser(
        prog="vidaccel", description="Makes Diffusers video pipelines faster without training."
    )
    parser.add_argument("--version", action="version", version=f"vidaccel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
