"""The policies that come with vidaccel."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from vidaccel.plans.policy import CachePolicy


def shipped_policies() -> dict[str, Path]:
    """Return the files that come with vidaccel: <org>--<model>/<name>.json -> path, sorted."""
    return {
        f"{folder.name}/{file.name}": Path(str(file))
        for folder in sorted(files("vidaccel.policies").iterdir(), key=lambda entry: entry.name)
        if folder.is_dir()
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".json")
    }


@cache
def load_shipped() -> tuple[tuple[str, CachePolicy], ...]:
    """Return name and policy of every shipped file, measured ones first; read once a process."""
    found = [(name, CachePolicy.load(path)) for name, path in shipped_policies().items()]
    return tuple(sorted(found, key=lambda entry: (entry[1].provenance != "measured", entry[0])))
