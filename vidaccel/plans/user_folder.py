"""The policies that a user's own runs have left: a folder of files, one for each kind of run.

`VIDACCEL_HOME` names the folder; without it, it is the platform's folder for caches. Several
processes may write at once: a file is replaced whole. What is damaged, newer or not ours is left
alone and told of, once.
"""

import os
import re
import warnings
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from platformdirs import user_cache_path

from vidaccel.errors import PolicyError
from vidaccel.plans import measured
from vidaccel.plans.measured import MeasuredClip
from vidaccel.plans.plan import RunSettings
from vidaccel.plans.policy import CachePolicy

# The most files that are kept; the oldest learned ones go first.
MOST_FILES = 200
# The most of another number of steps that are looked at for a run.
MOST_OTHERS = 4

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_told: set[str] = set()


def folder() -> Path:
    """Return the folder, which need not exist."""
    home = os.environ.get("VIDACCEL_HOME")
    return (Path(home).expanduser() if home else user_cache_path("vidaccel")) / "policies"


def files() -> list[Path]:
    """Return the policy files of the folder, sorted; none where it cannot be read."""
    try:
        return sorted(
            entry
            for entry in folder().iterdir()
            if entry.suffix == ".json" and not entry.name.startswith(".") and entry.is_file()
        )
    except OSError:
        return []


def policies(run: RunSettings) -> list[tuple[str, CachePolicy]]:
    """Return the policies of the folder that may be of the model of a run, newest first.

    All of its number of steps, and the newest of others, which can be carried over: a file takes a
    moment to read. What cannot be read is left out, with a warning, the first time.
    """
    start = f"{_safe(str(run.transformer))}-"
    alike, others = [], []
    for file in sorted(files(), key=_age, reverse=True):
        if file.name.startswith(f"{start}{run.num_inference_steps}-steps-"):
            alike.append(file)
        elif file.name.startswith(start):
            others.append(file)
    found = []
    for file in [*alike, *others[:MOST_OTHERS]]:
        try:
            state = file.stat()
            policy = _load(str(file), state.st_mtime_ns, state.st_size)
            found.append((state.st_mtime_ns, file.name, policy))
        except (OSError, PolicyError) as error:
            _tell(file, str(error))
    return [(name, policy) for _, name, policy in sorted(found, key=lambda e: e[:2], reverse=True)]


def save(policy: CachePolicy) -> Path:
    """Keep a policy, in the place of an older one of the same kind of run.

    Raises:
        PolicyError: the folder cannot be written.
    """
    place = folder()
    file = place / name_of(policy)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyError(f"cannot write policy {file}: {error.strerror}") from error
    policy.save(file)
    _drop_old(keep=file)
    return file


def delete(file: Path) -> None:
    """Delete a file of the folder; raises PolicyError where it cannot be."""
    try:
        file.unlink()
    except OSError as error:
        raise PolicyError(f"cannot delete policy {file}: {error.strerror}") from error
    measured.forget(_records_of(file.stem))


def add_measured(policy: CachePolicy, record: MeasuredClip) -> None:
    """Keep what a clip of one of a policy's plans was like beside the plain one.

    Raises:
        PolicyError: the folder cannot be written.
    """
    place = _records_of(Path(name_of(policy)).stem)
    try:
        measured.add(place, record)
    except OSError as error:
        raise PolicyError(f"cannot write to {place}: {error.strerror}") from error


def measured_clips(policy: CachePolicy) -> list[MeasuredClip]:
    """Return the clips that were measured of the plans that a policy has now, newest first."""
    total = policy.num_inference_steps
    plans = {b: measured.digest_of(policy.plans[str(b)].to_plan(total)) for b in policy.budgets()}
    records = measured.read(_records_of(Path(name_of(policy)).stem))
    return [record for record in records if plans.get(record.budget) == record.plan]


def with_measured(policy: CachePolicy) -> CachePolicy:
    """Return a policy with what was measured of its plans as its validation, where anything was.

    What it predicts stays: captions differ more from each other than a prediction is off, and
    moving it by what others gave made it worse on the embedded model's first version.
    """
    records = measured_clips(policy)
    if not records:
        return policy
    return policy.model_copy(update={"validation": measured.validation_of(records)})


def _records_of(stem: str) -> Path:
    """Return the folder of the records of a policy file."""
    return folder() / "measured" / stem


def name_of(policy: CachePolicy) -> str:
    """Return the name of the file of a kind of run: what it is of, and a hash of all of it."""
    kind = (
        policy.model.id,
        policy.model.config_hash,
        policy.model.pipeline,
        policy.model.precision,
        policy.num_inference_steps,
        policy.scheduler.name,
        [f"{sigma:.5g}" for sigma in policy.scheduler.sigmas or ()],
        policy.guidance.scale,
        policy.latents or (policy.width, policy.height, policy.frames),
        policy.adapters,
    )
    digest = sha256(repr(kind).encode()).hexdigest()[:12]
    return f"{_safe(policy.model.transformer)}-{policy.num_inference_steps}-steps-{digest}.json"


@lru_cache(maxsize=MOST_FILES)
def _load(file: str, changed: int, size: int) -> CachePolicy:
    """Read a file once for as long as it does not change."""
    return CachePolicy.load(file)


def _drop_old(keep: Path) -> None:
    """Delete the learned policies that were used least recently, where there are too many."""
    found = files()
    if len(found) <= MOST_FILES:
        return
    oldest = sorted((file for file in found if file != keep), key=_age)
    for file in oldest[: len(found) - MOST_FILES]:
        try:
            if CachePolicy.load(file).provenance == "learned":
                delete(file)
        except (OSError, PolicyError):  # not ours to delete, or gone already
            continue


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _safe(text: str) -> str:
    return _UNSAFE.sub("-", text)


def _tell(file: Path, reason: str) -> None:
    if str(file) not in _told:
        _told.add(str(file))
        warnings.warn(f"left out of the learned policies: {reason}", stacklevel=2)
