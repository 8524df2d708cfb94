"""The embedded pipeline behind a queue, and a running server of the page."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tiny.demo import until
from vidaccel.clips.load import load_pipeline
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Limits
from vidaccel.demo.worker import Worker


@pytest.fixture(scope="module")
def pipe():
    """The embedded pipeline."""
    return load_pipeline(device="cpu")


@pytest.fixture
def queue(pipe, tmp_path):
    """A queue over the embedded pipeline in which two jobs may wait."""
    queue = JobQueue(Worker(lambda: pipe, "tiny-wan"), RunStore(tmp_path / "runs"), Limits(), 2)
    yield queue
    queue.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of the server's runs; its log is beside it."""
    return tmp_path_factory.mktemp("demo") / "runs"


@pytest.fixture(scope="module")
def server(out):
    """The address of a running `vidaccel demo`."""
    pytest.importorskip("gradio", reason='the page needs gradio: pip install "vidaccel[demo]"')
    port = free_port()
    command = [sys.executable, "-m", "vidaccel", "demo", "--server-port", str(port)]
    command += ["--size", "48x48", "--frames", "5", "--steps", "8", "--queue-size", "1"]
    command += ["--device", "cpu", "--out", str(out)]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = out.parent / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Tests that were started in the background ignore Ctrl-C, and so would this process.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=30).close()
        except OSError:
            return False
        return True

    try:
        until(answers, poll=0.2)
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0  # Ctrl-C ends it without a complaint
        assert "vidaccel/demo/" not in log.read_text()  # no traceback
    finally:
        process.kill()
        process.wait()
