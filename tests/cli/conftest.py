"""The command line in this process."""

from collections.abc import Callable

import pytest

from vidaccel.cli.main import main
from vidaccel.clips import compare, generate

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
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loading of a model's weights fail the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)


@pytest.fixture
def generate_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """A function that puts another one in the place of `clips.generate.generate`, everywhere."""

    def replace(function: Callable[..., object]) -> None:
        for module in (generate, compare):
            monkeypatch.setattr(module, "generate", function)

    return replace


@pytest.fixture
def tiny() -> list[str]:
    """Options of the smallest clip, in two steps, too few to reuse one."""
    return ["--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture
def small() -> list[str]:
    """Options of a small clip of few steps."""
    return [*SMALL, "--device", "cpu"]
