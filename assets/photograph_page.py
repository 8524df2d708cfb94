"""Take the picture of the demo page: assets/demo-page.png.

    python assets/photograph_page.py [FILE]

The page is that of `vidaccel demo`, in headless Chromium and as a visitor finds it: with the first
of the examples that `render_demo.py` has made, so that no number depends on how busy this machine
is. Needs `pip install "vidaccel[demo,dev]"` and Chromium.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

FILE = Path(__file__).resolve().parent / "demo-page.png"
MOMENT = 0.5  # seconds into both clips
SHOWN = "['original', 'accelerated'].map(id => document.querySelector(`#${id} video`))"
EXAMPLES = "Array.from(document.querySelectorAll('#examples img'))"
PATIENCE = 300.0  # seconds


def main(file: Path) -> None:
    """Serve the page, and write a picture of it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "vidaccel", "demo", "--server-port", str(port)]
        server = subprocess.Popen([*command, "--device", "cpu", "--out", out])
        try:
            wait_for(f"http://127.0.0.1:{port}")
            photograph(f"http://127.0.0.1:{port}", file)
        finally:
            server.terminate()
            server.wait()


def wait_for(address: str) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return urllib.request.urlopen(address, timeout=30).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def photograph(address: str, file: Path) -> None:
    """Write a picture of the page at an address, with both clips at the same moment."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.wait_for_selector("#numbers .va-cards")
        page.locator("#examples").scroll_into_view_if_needed()  # its pictures are loaded then
        page.wait_for_function(f"{EXAMPLES}.length && {EXAMPLES}.every(i => i.naturalWidth)")
        page.wait_for_function(f"{SHOWN}.every(clip => clip?.readyState >= 2)")
        page.evaluate(f"{SHOWN}.forEach(clip => {{ clip.loop = false; clip.pause(); }})")
        page.evaluate(f"{SHOWN}.forEach(clip => {{ clip.currentTime = {MOMENT}; }})")
        page.wait_for_function(f"{SHOWN}.every(clip => !clip.seeking && clip.readyState >= 2)")
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FILE)
