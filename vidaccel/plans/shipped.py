"""The policies that come with vidaccel."""

from functools import cache

from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.store import shipped_policies

__all__ = ["load_shipped", "shipped_policies"]


@cache
def load_shipped() -> tuple[tuple[str, CachePolicy], ...]:
    """Return name and policy of every shipped file, measured ones first; read once a process."""
    found = [(name, CachePolicy.load(path)) for name, path in shipped_policies().items()]
    return tuple(sorted(found, key=lambda entry: (entry[1].provenance != "measured", entry[0])))
