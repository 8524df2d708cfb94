"""The pictures in assets/: each has something that makes it, and figures follow their numbers."""

import importlib.util
import re
from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_figures", ASSETS / "draw_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_pictures_makes_every_picture(script):
    makefile = (ASSETS.parent / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^pictures:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE).group(1)
    made = {f"{name}.png" for name in script.FIGURES}
    made |= {Path(name).name for name in re.findall(r"assets/\S+\.png", recipe)}
    assert "assets/draw_figures.py" in recipe and "assets/photograph_page.py" in recipe
    assert {path.name for path in ASSETS.glob("*.png")} == made | {"demo-page.png"}


def test_figures_are_drawn_from_their_numbers(script, tmp_path):
    script.main(tmp_path)
    for name in script.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
