"""What may import what, and rules of the house that the source itself shows.

Everything here reads the source and imports none of it. A rule that is broken is told with the
module and the line.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

ROOT = Path(__file__).parents[1]

# A module imports from its own room and from those below it here. The package itself is the room
# of the public names.
ROOMS = (
    "__main__",
    "cli",
    "bench",
    "demo",
    "calibration",
    "clips",
    "vidaccel",
    "api",
    "resolve",
    "automatic",
    "learning",
    "precision",
    "svg2",
    "engine",
    "dbcache",
    "lemica",
    "plans",
    "hosts",
    "environment",
    "shards",
    "files",
    "kernels",
    "errors",
)
# Old import paths that stay; they stand with the public names.
DOORS = {"policy": "vidaccel"}
WITHOUT = {"lemica": ("torch", "diffusers"), "kernels": ("diffusers",)}
# Where a library is called otherwise than what is installed.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pycvvdp": "cvvdp",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
# Looked for, and used where somebody has installed it.
UNDECLARED = ("flashinfer",)
MOST_LINES = 400
ROWS = ("vidaccel.hosts.video_models", "vidaccel.hosts.image_models")
# Underscored all the same: named tuples promise theirs, torch its modules, and cache-dit tells the
# steps that it has reused under no other name.
PUBLIC = {"_asdict", "_fields", "_make", "_replace", "_modules", "_orig_mod"}
PUBLIC |= {"_cached_steps", "_cfg_cached_steps"}
COMPAT = "vidaccel.engine.compat"


class Import(NamedTuple):
    """A module that another one imports, by its full name, and the line where it does."""

    name: str
    line: int


class Module(NamedTuple):
    """A source file, by the name it is imported by."""

    name: str
    path: Path
    tree: ast.Module

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


@cache
def sources() -> dict[str, Module]:
    """The modules of the package by name; kernels/ is imported as vidaccel.kernels."""
    paths = {
        path: path.relative_to(ROOT).with_suffix("")
        for path in sorted((ROOT / "vidaccel").rglob("*.py"))
    }
    paths |= {
        path: Path("vidaccel", "kernels", path.stem)
        for path in sorted((ROOT / "kernels").glob("*.py"))
    }
    found = {}
    for path, place in paths.items():
        parts = place.parts[:-1] if place.name == "__init__" else place.parts
        name = ".".join(parts)
        found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


def room_of(name: str) -> str:
    """The room of a module; that of the public names for the package itself."""
    room = name.split(".")[1] if "." in name else name
    return DOORS.get(room, room)


def imports_of(module: Module) -> Iterator[Import]:
    """Every import of a module, in functions too.

    The package itself names its public objects to type checkers alone, and imports each when it is
    used.
    """
    skipped: set[ast.AST] = set()
    if module.name == "vidaccel":
        for node in ast.walk(module.tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped.update(ast.walk(node))
    for node in ast.walk(module.tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                above = module.name.split(".")[: -node.level or None]
                package = ".".join([*above, *([package] if package else [])])
            for alias in node.names:
                inner = f"{package}.{alias.name}"
                yield Import(inner if inner in sources() else package, node.lineno)


def inside(module: Module) -> Iterator[Import]:
    """The imports of a module that are modules of the package."""
    return (found for found in imports_of(module) if found.name in sources())


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


@cache
def own_names() -> frozenset[str]:
    """Underscored names that the package itself defines, attributes among them."""
    names: set[str] = set()
    for module in sources().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            ):
                names.add(node.attr)
    return frozenset(name for name in names if name.startswith("_"))


def foreign(name: str) -> bool:
    """A private name of another library."""
    return (
        re.fullmatch(r"_[a-z]\w*", name) is not None
        and name not in PUBLIC
        and name not in own_names()
    )


def private_uses(module: Module) -> Iterator[tuple[int, str]]:
    """Private names of other libraries: attributes, imports, and strings given to getattr."""
    accessors = {"getattr", "hasattr", "setattr", "delattr"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and foreign(node.attr):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("vidaccel"):
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield node.lineno, f"from {node.module} import {alias.name}"
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and ast.unparse(node.func).rpartition(".")[2] in accessors
        ):
            for value in node.args:
                if isinstance(value, ast.Constant) and foreign(str(value.value)):
                    yield node.lineno, ast.unparse(node)


def none_of(found: list[str], rule: str) -> None:
    """Fail with every place where a rule is broken."""
    if found:
        pytest.fail(f"{rule}:\n" + "\n".join(sorted(set(found))), pytrace=False)


def test_every_module_is_in_a_room_of_the_list():
    strangers = [module for module in sources().values() if room_of(module.name) not in ROOMS]
    none_of([module.at(1) for module in strangers], "no room of the list holds")


def test_imports_point_down_the_list_of_rooms():
    rank = {room: position for position, room in enumerate(ROOMS)}
    none_of(
        [
            f"{module.at(found.line)}: {room_of(module.name)} imports {found.name}"
            for module in sources().values()
            for found in inside(module)
            if rank[room_of(found.name)] < rank[room_of(module.name)]
        ],
        "a room imports from one above it",
    )


def test_no_modules_import_each_other_in_a_circle():
    lines = {
        (module.name, found.name): module.at(found.line)
        for module in sources().values()
        for found in inside(module)
    }
    graph = networkx.DiGraph(lines)
    circles = [
        part
        for part in networkx.strongly_connected_components(graph)
        if len(part) > 1 or any((name, name) in lines for name in part)
    ]
    none_of(
        [
            f"{place}: {start} imports {end}"
            for circle in circles
            for (start, end), place in lines.items()
            if {start, end} <= circle
        ],
        "modules import each other in a circle",
    )


def test_search_and_kernels_stand_without_the_libraries_above_them():
    none_of(
        [
            f"{module.at(found.line)}: {found.name}"
            for module in sources().values()
            for found in imports_of(module)
            if found.name.split(".")[0] in WITHOUT.get(room_of(module.name), ())
        ],
        "a room imports a library that it does without",
    )


def test_imported_libraries_are_declared():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    declared = {
        re.split(r"[^\w-]", text)[0].lower() for requirements in lists for text in requirements
    }
    none_of(
        [
            f"{module.at(found.line)}: {found.name}"
            for module in sources().values()
            for found in imports_of(module)
            if (library := found.name.split(".")[0]) not in sys.stdlib_module_names
            if library not in ("vidaccel", *UNDECLARED)
            if DISTRIBUTIONS.get(library, library.replace("_", "-")) not in declared
        ],
        "pyproject.toml does not declare",
    )


def test_modules_are_short():
    none_of(
        [
            f"{module.path.relative_to(ROOT)}: {lines} lines"
            for module in sources().values()
            if room_of(module.name) != "kernels" and module.name not in ROWS
            if (lines := len(module.path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
        ],
        f"a module has over {MOST_LINES} lines",
    )


def test_private_names_of_libraries_are_used_in_one_module():
    none_of(
        [
            f"{module.at(line)}: {use}"
            for module in sources().values()
            if module.name != COMPAT
            for line, use in private_uses(module)
        ],
        f"a private name of another library is used outside {COMPAT}",
    )


def indirect(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines of docstrings that begin with a question word, or say of whom instead of what."""
    question = re.compile(r"(What|Whether|How)\b.*")
    of_attribute = re.compile(r"^ +[\w, ]+: of\b.*", re.MULTILINE)
    for line, text in docstrings(tree):
        if found := question.match(text) or of_attribute.search(text):
            yield line + text[: found.start()].count("\n"), found[0].strip()


def test_docstrings_say_what_a_thing_does_or_is():
    none_of(
        [
            f"{module.at(line)}: {said}"
            for module in sources().values()
            for line, said in indirect(module.tree)
        ],
        "a docstring begins with a question word, or describes an attribute as '…: of …'",
    )


def module_lines() -> list[str]:
    """The list of modules in CONTRIBUTING.md as it has to be: a line each, rooms from the top."""
    rank = {room: position for position, room in enumerate(ROOMS)}
    found = sorted(sources().values(), key=lambda m: (rank[room_of(m.name)], m.name))
    lines = []
    for module in found:
        said = (ast.get_docstring(module.tree) or "").partition("\n\n")[0]
        lines.append(f"- `{module.path.relative_to(ROOT)}`: {' '.join(said.split())}")
    return lines


def test_the_list_of_modules_is_that_of_the_modules():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `(?:vidaccel|kernels)/.*", text, re.MULTILINE)
    wanted = module_lines()
    missing = [f"add:    {line}" for line in wanted if line not in listed]
    wrong = [f"remove: {line}" for line in listed if line not in wanted]
    assert not missing + wrong, "CONTRIBUTING.md:\n" + "\n".join(missing + wrong)
    assert listed == wanted, "the list of modules in CONTRIBUTING.md is in another order"


def defined() -> set[str]:
    """Names that the modules define: functions, classes, methods as Class.method, attributes."""
    names = set()
    for module in sources().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                members = [m for m in ast.walk(node) if isinstance(m, ast.FunctionDef)]
                names |= {f"{node.name}.{member.name}" for member in members}
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def test_the_walks_pass_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = text[text.index("## Two walks") :]
    quoted = set(re.findall(r"`([\w./]+)`", walks))
    paths = {word for word in quoted if word.endswith(".py")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vidaccel").rglob("*.py")}
    package |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")}
    lost = [path for path in paths if not any(f"/{name}".endswith(f"/{path}") for name in package)]
    other = {"allow_transfer", "pipe"}
    lost += [word for word in quoted - paths - other if word not in defined()]
    assert not lost, f"the walks in CONTRIBUTING.md pass what is not there: {', '.join(lost)}"


def test_a_test_lies_where_its_module_does():
    """Of tests/integration, which cross rooms, and of this one nothing is asked."""
    strangers = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests")
        name = ".".join(("vidaccel", *place.parts[:-1], place.stem.removeprefix("test_")))
        if place.parts[0] != "integration" and path != Path(__file__) and name not in sources():
            strangers.append(f"{path.relative_to(ROOT)}: no module {name}")
    none_of(strangers, "a test is of no module")


def test_no_test_imports_another():
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [
                f"{module.at(node.lineno)}: {name}"
                for name in names
                if name.startswith("tests.")
                or any(part == "conftest" or part.startswith("test_") for part in name.split("."))
            ]
    none_of(found, "a test imports another; what both need belongs to tests/tiny or a conftest")
