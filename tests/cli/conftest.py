"""The command line in this process."""

from collections.abc import Callable

import pytest

from vidaccel.cli.main import main

# A small clip of few steps.
SMALL = ("--size", "64x64", "--frames", "9", "--steps", "8")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that takes arguments and returns the exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def small() -> list[str]:
    """Options of a small clip of few steps."""
    return [*SMALL, "--device", "cpu"]
