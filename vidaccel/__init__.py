"""vidaccel makes an existing Diffusers video pipeline faster without training.

>>> import vidaccel
>>> pipe = vidaccel.accelerate(pipe)
>>> video = pipe(prompt).frames[0]
>>> print(vidaccel.report(pipe))
>>> vidaccel.restore(pipe)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidaccel.environment import vidaccel_version

# In a source checkout, policies/ and assets/ lie beside this package and not inside it as in an
# installed wheel; there this test is false and nothing happens.
_parent = Path(__file__).resolve().parent.parent
if (_parent / "pyproject.toml").is_file() and (_parent / "policies").is_dir():
    __path__.append(str(_parent))

__version__ = vidaccel_version()

if TYPE_CHECKING:
    from vidaccel.api import accelerate, recompute, report, restore
    from vidaccel.calibration.build import build_policy
    from vidaccel.calibration.threshold import suggest_threshold
    from vidaccel.dbcache import DBCache
    from vidaccel.errors import VidaccelError
    from vidaccel.hosts.registry import register_host
    from vidaccel.hosts.spec import BlockList, Head, HostSpec
    from vidaccel.plans.plan import Plan
    from vidaccel.plans.policy import CachePolicy
    from vidaccel.precision.calibrate import calibrate_precision
    from vidaccel.precision.settings import LowPrecision
    from vidaccel.svg2.settings import SVG2

# Each public name is imported when it is first used, so that `import vidaccel`, `vidaccel --help`
# and a mistyped option do not wait for torch.
_HOME = {
    "CachePolicy": "plans.policy",
    "build_policy": "calibration.build",
    "DBCache": "dbcache",
    "accelerate": "api",
    "recompute": "api",
    "report": "api",
    "restore": "api",
    "register_host": "hosts.registry",
    "BlockList": "hosts.spec",
    "Head": "hosts.spec",
    "HostSpec": "hosts.spec",
    "suggest_threshold": "calibration.threshold",
    "Plan": "plans.plan",
    "calibrate_precision": "precision.calibrate",
    "LowPrecision": "precision.settings",
    "SVG2": "svg2.settings",
    "VidaccelError": "errors",
}

__all__ = [
    "SVG2",
    "BlockList",
    "CachePolicy",
    "DBCache",
    "Head",
    "HostSpec",
    "LowPrecision",
    "Plan",
    "VidaccelError",
    "__version__",
    "accelerate",
    "build_policy",
    "calibrate_precision",
    "recompute",
    "register_host",
    "report",
    "restore",
    "suggest_threshold",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vidaccel' has no attribute {name!r}")
    return getattr(import_module(f"vidaccel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names too, which are not here before their first use."""
    return sorted({*globals(), *__all__})
