"""The settings of one run. Untrusted: they come from a browser or an uploaded file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from vidaccel.clips.video import read_comment
from vidaccel.dbcache import DBCache
from vidaccel.errors import SettingsError
from vidaccel.plans.plan import PRESETS
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.schema import MAX_STEPS, Pixels, Record, Steps, Text
from vidaccel.precision.settings import PRESETS as PRECISION_PRESETS
from vidaccel.resolve import Resolver, policy_from_text
from vidaccel.svg2.settings import SVG2

MAX_BYTES = 4 * 2**20  # of a settings file
MAX_SEED = 2**32 - 1

OFF, CUSTOM = "off", "custom"
ACCELERATIONS = (OFF, *PRESETS, CUSTOM)
PRECISIONS = (OFF, *PRECISION_PRESETS)


class BlockCache(Record):
    """The settings of a `vidaccel.DBCache` that the page offers; see there."""

    threshold: Annotated[float, Field(ge=0, le=10)] | None = None
    probe_blocks: Annotated[int, Field(ge=0, le=64)] = 1
    corrector_blocks: Annotated[int, Field(ge=0, le=64)] = 0
    warmup_steps: Annotated[int, Field(ge=0, le=1000)] = 4
    max_consecutive: Annotated[int, Field(ge=0, le=1000)] | None = 3
    forecast_order: Annotated[int, Field(ge=0, le=2)] = 0


class Sparse(Record):
    """The settings of a `vidaccel.SVG2` that the page offers; see there. None for its own."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    dense_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = None


class Settings(Record):
    """The settings of one run.

    Attributes:
        prompt, negative_prompt, seed: what to show.
        steps, guidance, width, height, frames: None for the pipeline's own default.
        fps: frames per second of the files.
        acceleration: "off", a preset of `accelerate`, or "custom" for the fields below.
        compare: also run without acceleration.
        policy: "auto", "all", "every N", a list such as 0,1,5, or the text of a policy file. No
            path and no hub id: nothing of the server can be named.
        cache: the block cache; None for none.
        attention: "auto" as `accelerate` has it, "off", or "svg2" for the field below.
        svg2: the settings of sparse attention.
        precision: "off", or a preset of low precision.
    """

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    steps: Steps | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    fps: Annotated[int, Field(ge=1, le=120)] = 16
    acceleration: Literal["off", "quality", "balanced", "fast", "custom"] = "balanced"
    compare: bool = True
    policy: Annotated[str, StringConstraints(min_length=1, max_length=2**20)] = "auto"
    cache: BlockCache | None = None
    attention: Literal["off", "auto", "svg2"] = "auto"
    svg2: Sparse = Sparse()
    precision: Literal["off", "int8", "int4"] = "off"

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Settings":
        """Return settings with these fields; raises SettingsError naming the first wrong one."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = " ".join(str(part) for part in first["loc"]).replace("_", " ")
            raise SettingsError(f"{where}: {_lower(first['msg'])}") from error

    @classmethod
    def from_json(cls, raw: bytes | str) -> "Settings":
        """Read settings from the text of a run's JSON file.

        Raises:
            SettingsError: it holds none, or a field is wrong.
        """
        try:
            data = json.loads(raw)
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            raise SettingsError("this file holds no settings: it is not JSON") from error
        if isinstance(data, dict) and isinstance(data.get("settings"), dict):
            data = data["settings"]
        if not isinstance(data, dict) or "prompt" not in data:
            raise SettingsError("this file holds no settings: it names no prompt")
        return cls.of(data)

    @classmethod
    def from_file(cls, path: Path) -> "Settings":
        """Read settings from a clip or a JSON file that a run has left.

        Raises:
            SettingsError: it holds none.
            VideoError: it is a damaged clip.
        """
        if path.suffix.lower() == ".mp4":
            return cls.from_json(read_comment(path))
        try:
            with path.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise SettingsError(f"cannot read {path.name}: {error.strerror}") from error
        if len(raw) > MAX_BYTES:
            raise SettingsError(f"{path.name} is larger than {MAX_BYTES // 2**20} MiB")
        return cls.from_json(raw)

    def to_json(self) -> str:
        """Return one line of JSON, which `from_json` takes."""
        return self.model_dump_json(exclude_defaults=False)

    def call(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call; None leaves one to the pipeline."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }

    def original(self) -> "Settings":
        """Return the same without acceleration: equal where the originals are the same clip."""
        plain: dict[str, Any] = {"acceleration": OFF, "policy": "auto", "cache": None, "fps": 1}
        plain |= {"attention": "auto", "svg2": Sparse(), "precision": OFF, "compare": False}
        return self.model_copy(update=plain)

    def acceleration_arguments(self) -> dict[str, Any]:
        """Return the arguments of `accelerate`; where acceleration is "off", it is not called.

        Raises:
            PlanError, PolicyError: the policy is none.
        """
        if self.acceleration != "custom":
            preset = "balanced" if self.acceleration == "off" else self.acceleration
            return {"policy": Resolver("auto", "auto", preset), "attention": "auto"}
        policy = policy_of_text(self.policy)
        cache = None if self.cache is None else DBCache(**self.cache.model_dump())
        precision = None if self.precision == OFF else self.precision
        arguments = {"policy": Resolver(policy, cache), "attention": self._attention()}
        return arguments | {"precision": precision}

    def _attention(self) -> SVG2 | str | None:
        """Return what `accelerate(attention=...)` takes for custom acceleration."""
        if self.attention == "svg2":
            return SVG2(**self.svg2.model_dump(exclude_none=True))
        return None if self.attention == "off" else self.attention


def policy_of_text(text: str) -> Any:
    """Return the policy that a user has typed or uploaded, as `accelerate(policy=...)` takes it.

    Raises:
        PlanError, PolicyError: it is none of those that `Settings.policy` lists.
    """
    text = text.strip()
    if text.startswith("{"):
        return CachePolicy.from_json(text)
    return policy_from_text(text, files=False)


def with_one_plan(policy: CachePolicy, budget: int) -> CachePolicy:
    """Return the policy with the plan of one budget alone, which every preset then gives.

    The evidence is left out; the fields by which it is held against a run stay.
    """
    plans = {str(budget): policy.plans[str(budget)]}
    evidence: dict[str, Any] = {"edges": (), "validation": None, "prompts": ()}
    return policy.model_copy(update={"plans": plans, **evidence})


@dataclass(frozen=True)
class Limits:
    """The largest run that a page takes.

    Attributes:
        width, height: their product bounds that of a run, so portrait is as good as landscape.
        frames, steps: the largest numbers of one run.
    """

    width: int = 1280
    height: int = 720
    frames: int = 129
    steps: int = 100

    def check(self, settings: Settings) -> None:
        """Raise SettingsError that names what is too large."""
        width, height = settings.width, settings.height
        if (width is None) != (height is None):
            raise SettingsError("a size has a width and a height")
        if width is not None and height is not None and width * height > self.width * self.height:
            raise SettingsError(
                f"{width}x{height} has more pixels than {self.width}x{self.height}, the largest "
                "size that this page takes"
            )
        for name, limit in (("frames", self.frames), ("steps", self.steps)):
            value = getattr(settings, name)
            if value is not None and value > limit:
                raise SettingsError(f"{value} {name}: this page takes {limit} at most")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
