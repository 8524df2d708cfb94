"""The command line as a whole: help, exit codes, and what it costs to start."""

import json
import os
import subprocess
import sys

import pytest

from vidaccel.cli import bench
from vidaccel.cli.main import COMMANDS

NAMES = (
    "generate",
    "compare",
    "demo",
    "build-policy",
    "show",
    "policies",
    "suggest-threshold",
    "bench",
    "hosts",
    "env",
)
BENCHES = (
    "overhead",
    "soak",
    "quality",
    "parity",
    "attention",
    "search",
    "calibration",
    "kernels",
    "models",
    "codegen",
    "layer",
    "defaults",
    "precision",
    "gpu",
    "learning",
)
HEAVY = ("torch", "diffusers", "triton", "numpy", "pydantic", "networkx", "gradio", "PIL")


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in NAMES), *(["bench", name] for name in BENCHES)],
    ids=" ".join,
)
def test_every_command_has_help(command, run):
    code, stdout, _ = run(*command, "--help")
    assert code == 0 and stdout.startswith(" ".join(["usage: vidaccel", *command]))
    assert "(default: None)" not in stdout


def test_help_lists_every_command(run):
    assert len(COMMANDS) == len(NAMES) and len(bench.BENCHES) == len(BENCHES)
    shown = run("--help")[1]
    assert all(f"    {name}" in shown for name in NAMES)
    shown = run("bench", "--help")[1]
    assert all(f"    {name}" in shown for name in BENCHES)


def test_help_and_mistyped_options_wait_for_no_library():
    code = (
        "import json, sys\n"
        "from vidaccel.cli.main import main\n"
        "for arguments in (['generate', '--help'], ['bench', 'quality', '--size', 'large']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_ctrl_c_is_quiet(tmp_path, run, generate_by, small):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    generate_by(interrupt)
    code, _, stderr = run("generate", *small, "--out", tmp_path / "clip.mp4")
    assert code == 130 and "stopped" in stderr


def test_a_failure_that_nobody_foresaw_is_one_line(tmp_path, run, generate_by, monkeypatch, small):
    def fail(*_, **__):
        raise RuntimeError("out of memory\nTried to allocate much")

    generate_by(fail)
    arguments = ["generate", *small, "--out", tmp_path / "clip.mp4"]
    code, _, stderr = run(*arguments, "--quiet")
    assert code == 2 and stderr.count("\n") == 1
    assert stderr.startswith("vidaccel: RuntimeError: out of memory Tried to allocate much (")
    monkeypatch.setenv("VIDACCEL_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(*arguments, "--quiet")


def test_a_mistyped_option_is_one_line(run):
    for arguments in (["generate", "--sise", "1"], ["bench", "quality", "--size", "large"], []):
        code, stdout, stderr = run(*arguments)
        assert code == 2 and stderr.count("\n") == 1 and not stdout
        assert "--help" in stderr


@pytest.mark.parametrize("command", [["show", "vidaccel/tiny-wan"], ["hosts"], ["env", "--json"]])
def test_output_that_nobody_reads_is_no_traceback(command):
    reader, writer = os.pipe()
    os.close(reader)
    vidaccel = [sys.executable, "-m", "vidaccel", *command]
    done = subprocess.run(vidaccel, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_python_dash_m():
    shown = subprocess.run(
        [sys.executable, "-m", "vidaccel", "--version"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and shown.stdout.startswith("vidaccel ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--plan", "often"], "found 'often'"),
        (["bench", "attention", "--figure", "/proc/nowhere/a.png"], "cannot write"),
        (["bench", "attention", "--partial", "x", "--json", "/proc/nowhere/a"], "cannot write"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_older_spellings_of_options_are_taken(arguments, message, run):
    code, _, stderr = run(*arguments)
    assert code == 2 and message in stderr and "unrecognized" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--prompt", "a red circle"],
            "there is no option --prompt; did you mean --pr",
        ),
        (["generate", "--step=3", "x"], "there is no option --step; did you mean --steps?"),
        (["bench", "kernels", "--check"], "vidaccel bench kernels: there is no option --check"),
        (["show", "--qwertz", "7"], "vidaccel show: there is no option --qwertz (vidaccel show"),
        (["env", "one", "two"], "vidaccel env: there is no argument one"),
        (["--vers"], "vidaccel: "),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_options_are_written_out(arguments, message, run):
    code, out, stderr = run(*arguments)
    assert code == 2 and not out and stderr.count("\n") == 1 and message in stderr
