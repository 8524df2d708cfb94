"""The command line: vidaccel COMMAND; --help lists them."""

import argparse
import sys
from collections.abc import Callable, Sequence

from vidaccel import __version__
from vidaccel.cli.bench import add_bench
from vidaccel.cli.compare import add_compare
from vidaccel.cli.demo import add_demo
from vidaccel.cli.env import add_env, add_hosts
from vidaccel.cli.generate import add_generate
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
    add_suggest_threshold,
    add_bench,
    add_hosts,
    add_env,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 for bad input, or 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except VidaccelError as error:
        print(f"vidaccel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vidaccel: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, which takes the arguments."""
    parser = argparse.ArgumentParser(
        prog="vidaccel", description="Makes Diffusers video pipelines faster without training."
    )
    parser.add_argument("--version", action="version", version=f"vidaccel {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
