"""`vidaccel demo`, as far as its page is not served."""

import socket

import pytest


def test_a_port_that_is_taken(tmp_path, run):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, stderr = run("demo", "--device", "cpu", "--out", tmp_path, "--server-port", port)
    assert code == 2 and "cannot serve the page" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no model_index.json"),
        (["--steps", "500"], "500 steps: this page takes 100 at most"),
        (["--size", "500x500"], "more pixels than 128x128"),
        (["--out", "/proc/nowhere"], "cannot write"),
    ],
)
def test_a_demo_that_cannot_be_served(arguments, message, tmp_path, run, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("demo", *arguments)
    assert code == 2 and message in stderr and "Traceback" not in stderr
