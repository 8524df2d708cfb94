"""The server of the page: what it gives to whom, asked without a browser."""

import json
import urllib.error
import urllib.request
from pathlib import Path


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_the_page_comes_with_its_styles_and_script(server):
    page, config = get(server)[1].decode(), get(f"{server}/config")[1].decode()
    assert "vidaccelOwner" in page and ".va-strip" in config


def test_no_other_file_of_the_server_can_be_read(server, out):
    secret = out.parent / "secret.txt"
    secret.write_text("the secret")
    repository = Path(__file__).resolve().parents[2]
    for path in (
        "/etc/passwd",
        secret,
        f"{out}/../secret.txt",
        f"{out}/..%2fsecret.txt",
        "%2e%2e/%2e%2e/etc/passwd",
        repository / "pyproject.toml",
        "pyproject.toml",
        repository / "vidaccel" / "demo" / "page.py",
        out.parent / "server.log",
    ):
        status, body = get(f"{server}/gradio_api/file={path}")
        assert status in (403, 404) and b"secret" not in body and b"root:" not in body, path


def test_a_file_that_was_not_uploaded_is_not_taken_for_one(server):
    """Ask the server directly, past the controls of the page."""
    config = json.loads(get(f"{server}/config")[1])
    files = {c["id"] for c in config["components"] if c["type"] in ("file", "uploadbutton")}
    events = [e for e in config["dependencies"] if files & set(e["inputs"])]
    assert len(events) >= 2
    for event in events:
        body = {
            "fn_index": event["id"],
            "session_hash": "abcdef",
            "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        }
        request = urllib.request.Request(
            f"{server}/gradio_api/queue/join",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=120).close()
        with urllib.request.urlopen(
            f"{server}/gradio_api/queue/data?session_hash=abcdef", timeout=120
        ) as stream:
            answer = stream.read().decode()
        assert '"success":false' in answer.replace(" ", "") and "root:" not in answer


def test_it_listens_to_this_machine_alone(server):
    port = int(server.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if local.endswith(f":{port:04X}") and state == "0A":
            assert local.startswith("0100007F"), local
