"""What the Markdown pages say, against the repository: links, commands, make targets, lists."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from vidaccel.cli.main import _parser

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("policies", "kernels", "vidaccel", "examples", "assets", "tests")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands_of(page: Path) -> Iterator[list[str]]:
    """The lines of its shell blocks as words, continued lines joined, comments left out."""
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def test_every_link_leads_somewhere(page):
    for target in LINK.findall(prose_of(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert ROOT in found.parents, target
        assert not anchor or anchor in anchors_of(found), target


def test_every_command_is_one(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_of(page):
        program = Path(words[0]).name
        if program == "vidaccel":
            _parser().parse_args(words[1:])
        elif program == "make":
            assert set(words[1:]) <= targets, words
        elif program in ("python", "torchrun"):
            scripts = [word for word in words if word.endswith(".py")]
            assert all((ROOT / script).is_file() for script in scripts), words


def test_every_program_is_python(page):
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(block)


def test_the_front_page_is_short_and_says_what_was_not_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    first_screen = " ".join(text[: text.index("## Try it")].split())
    assert "two idle CPU cores" in first_screen and "does on a GPU stands" in first_screen
    assert "quality was measured on the embedded model alone" in " ".join(text.split())


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("assets/results/README.md", "*.json"),
        ("examples/README.md", "*.py"),
        ("kernels/README.md", "*.py"),
    ],
)
def test_a_page_names_every_file_of_its_folder(page, files):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in (ROOT / page).parent.glob(files):
        assert path.name in text


def test_the_table_of_generated_code_is_that_of_the_file():
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "assets" / "results" / "codegen.json").read_text())
    assert found["problems"] == [] and {row["spills"] for row in found["rows"]} == {0}
    for row in found["rows"]:
        name = {"attend": "", "attend_hopper": ", `_attend_on_hopper`"}.get(row["kernel"])
        if name is not None and (row["head_dim"], row["dtype"]) == (128, "bf16"):
            name = ", `_attend`" if row["chip"] == 90 and not name else name
            tile, cycles = row["constants"], row["predicted"]
            names = ("tensor_cycles", "issue_cycles", "exponent_cycles")
            cells = [
                f"sm_{row['chip']}{name}",
                f"{tile['BLOCK_M']} x {tile['BLOCK_N']}",
                str(row["registers"]),
                f"{row['shared_bytes'] / 1000:.0f} KB",
                ", ".join(f"{cycles[name]:.0f}" for name in names),
            ]
            assert f"| {' | '.join(cells)} |" in text
