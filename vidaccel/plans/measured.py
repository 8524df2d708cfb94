"""Clips of learned plans, each measured beside the plain one: a small file for each.

Comparisons that a user makes anyway leave one. Each is a file of its own, written whole, so that
several processes may add at once; the same prompt, seed and plan again takes the place of the one
before. Prompts are kept as hashes alone. What is damaged or newer is passed over.
"""

import statistics
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from vidaccel.files import write_text
from vidaccel.plans.plan import Plan
from vidaccel.plans.schema import Digest, Record, Steps, Validation

# The most that are kept of one policy; the oldest go first.
MOST_RECORDS = 50
# A file is a few hundred bytes.
_MAX_BYTES = 4096
# The PSNR that equal clips count as; theirs is infinite.
MOST_DECIBELS = 99.0


class MeasuredClip(Record):
    """One clip beside the plain one of its prompt and noise.

    Attributes:
        budget: computed steps.
        plan: hash of the plan.
        prompt: hash of what the clip shows.
        seed: seed of the noise.
        psnr: in dB.
        ssim: structural similarity; None where it cannot be computed.
        speedup: against the plain run.
    """

    budget: Steps
    plan: Digest
    prompt: Digest
    seed: Annotated[int, Field(ge=0)]
    psnr: float
    ssim: float | None = None
    speedup: Annotated[float, Field(gt=0)]

    @classmethod
    def of(
        cls, plan: Plan, prompt: str, seed: int, *, psnr: float, ssim: float | None, speedup: float
    ) -> "MeasuredClip":
        """Return the record of a clip of a plan."""
        return cls(
            budget=len(plan.steps),
            plan=digest_of(plan),
            prompt=_hash(prompt),
            seed=seed,
            psnr=min(psnr, MOST_DECIBELS),
            ssim=ssim,
            speedup=speedup,
        )


def digest_of(plan: Plan) -> str:
    """Return a hash of what a plan does."""
    return _hash(repr((plan.num_inference_steps, plan.steps, plan.orders, plan.scales)))


def add(place: Path, record: MeasuredClip) -> None:
    """Keep a record in a folder, in the place of an older one of the same clip.

    Raises:
        OSError: it cannot be written.
    """
    name = _hash(f"{record.plan} {record.prompt} {record.seed}")[:16]
    write_text(place / f"{name}.json", record.model_dump_json() + "\n")
    files = sorted(_files(place), key=_age, reverse=True)
    for file in files[MOST_RECORDS:]:
        with suppress(OSError):  # another process was faster
            file.unlink()


def read(place: Path) -> list[MeasuredClip]:
    """Return the records of a folder that can be read, newest first; none without a folder."""
    found = []
    for file in sorted(_files(place), key=_age, reverse=True)[:MOST_RECORDS]:
        with suppress(OSError, ValueError, ValidationError):
            with file.open("rb") as stream:
                raw = stream.read(_MAX_BYTES)
            found.append(MeasuredClip.model_validate_json(raw))
    return found


def forget(place: Path) -> None:
    """Delete the records of a folder, and the folder."""
    with suppress(OSError):
        for file in _files(place):
            file.unlink()
        place.rmdir()


def validation_of(records: Sequence[MeasuredClip]) -> tuple[Validation, ...]:
    """Return what the records of each budget come to, as a policy keeps it."""
    rows = []
    for budget in sorted({record.budget for record in records}):
        same = [record for record in records if record.budget == budget]
        ssim = [record.ssim for record in same if record.ssim is not None]
        row = Validation(
            budget=budget,
            candidate=f"learned plan, on {len(same)} clip{'s' * (len(same) > 1)}",
            kept=True,
            psnr=statistics.fmean(record.psnr for record in same),
            worst_psnr=min(record.psnr for record in same),
            ssim=statistics.fmean(ssim) if len(ssim) == len(same) else None,
            speedup=statistics.fmean(record.speedup for record in same),
        )
        rows.append(row)
    return tuple(rows)


def _files(place: Path) -> list[Path]:
    try:
        return [file for file in place.iterdir() if file.suffix == ".json" and file.name[0] != "."]
    except OSError:
        return []


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0.0


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
