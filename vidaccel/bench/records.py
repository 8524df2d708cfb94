"""Records of single generations, as the shards of `vidaccel bench quality` keep them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vidaccel.errors import BenchError
from vidaccel.shards import ShardFolder

# JSON that tells one variant of a method from its others.
VariantSetting = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation: its times, and the work that was done.

    Attributes:
        session: the process that ran it; its generations alone are compared in time.
        at: start, in seconds since the epoch.
        seconds: duration of the whole call.
        cpu_seconds: CPU time of this process for it.
        denoising_seconds: duration until the last step ended; None where steps are not told.
        blocks: number of transformer blocks that ran.
    """

    session: int
    at: float
    seconds: float
    cpu_seconds: float
    denoising_seconds: float | None
    blocks: int


@dataclass(frozen=True, kw_only=True)
class PlainRecord(Generation):
    """One generation of the pipeline as it is.

    Attributes:
        digest: SHA-256 of the clip's pixels.
        adherence: parts of its scene caption -> shown or not; None without a caption.
    """

    digest: str
    adherence: dict[str, bool] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as its shard keeps it."""
        return {"method": None, "setting": {}, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class VariantRecord(Generation):
    """One generation of a variant, against the plain one.

    Attributes:
        method, setting: the variant.
        psnr, ssim, lpips: fidelity to the plain clip; None where it cannot be computed.
        vmaf, cvvdp: the same; None in shards of before, too.
        worst_frames: measure -> value of the worst frame; empty in shards of before.
        flicker: grey levels more than those of the plain clip.
        adherence: parts of its scene caption -> shown or not; None without a caption.
        steps_share: share of the steps that were computed; None where there is no report.
        density: share of the scores that attention computed; None without sparse attention.
    """

    method: str
    setting: VariantSetting
    psnr: float
    ssim: float | None
    lpips: float | None
    flicker: float
    adherence: dict[str, bool] | None
    steps_share: float | None = None
    density: float | None = None
    vmaf: float | None = None
    cvvdp: float | None = None
    worst_frames: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as its shard keeps it: without what was not told, or not measured."""
        optional = ("steps_share", "density", "vmaf", "cvvdp", "worst_frames")
        return {k: v for k, v in asdict(self).items() if k not in optional or v not in (None, {})}


@dataclass(frozen=True)
class FailedRecord:
    """A variant of another library that raised.

    Attributes:
        method, setting: the variant.
        failed: class and first line of what was raised.
    """

    method: str
    setting: VariantSetting
    failed: str

    @property
    def title(self) -> str:
        """The variant in one line."""
        return f"{self.method} {json.dumps(self.setting)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as its shard keeps it."""
        return asdict(self)


QualityRecord = PlainRecord | VariantRecord | FailedRecord


def record_of(data: Mapping[str, Any]) -> QualityRecord:
    """Read a record from the JSON of its shard; raises KeyError or TypeError for a damaged one."""
    if data["method"] is None:
        return PlainRecord(**{k: v for k, v in data.items() if k not in ("method", "setting")})
    return FailedRecord(**data) if "failed" in data else VariantRecord(**data)


def key_of(method: str, setting: VariantSetting) -> str:
    """Return what tells one variant from another, as text."""
    return json.dumps([method, setting], sort_keys=True)


def is_plan(setting: VariantSetting) -> bool:
    """Tell whether a setting is a plan alone: equal ones run the same, whoever found them."""
    return isinstance(setting.get("steps"), list) and set(setting) <= {"steps", "orders", "scales"}


class RecordFolder:
    """The records of a run by prompt, in one small file per generation.

    Args:
        path: the folder; made if need be.
        manifest: what tells this run from others.

    Raises:
        BenchError: the folder belongs to another run, or cannot be read or written.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._shards = ShardFolder(path, manifest, "run", BenchError)
        self._known: dict[str, list[QualityRecord]] = {}

    def records(self, prompt: str) -> list[QualityRecord]:
        """The records of one prompt."""
        if prompt not in self._known:
            names = self._shards.names(f"{digest_of(prompt)}-*")
            found = (self._shards.read(name, record_of) for name in names)
            self._known[prompt] = [record for record in found if record is not None]
        return self._known[prompt]

    def plain(self, prompt: str) -> list[PlainRecord]:
        """The records of the plain pipeline of one prompt."""
        return [record for record in self.records(prompt) if isinstance(record, PlainRecord)]

    def measured(self, prompt: str) -> dict[str, VariantRecord | FailedRecord]:
        """The records of the variants of one prompt, by `key_of` their method and setting."""
        return {
            key_of(record.method, record.setting): record
            for record in self.records(prompt)
            if not isinstance(record, PlainRecord)
        }

    def add(self, prompt: str, name: str, record: QualityRecord) -> None:
        """Keep a record in a file of that name."""
        self.records(prompt).append(record)
        self._shards.write(f"{digest_of(prompt)}-{name}", record.to_dict())


def digest_of(text: str) -> str:
    """Return a short name for a text, for names of files."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
