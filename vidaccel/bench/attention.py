"""Measure what sparse attention costs in quality: PSNR against density, and recall by layer."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.bench.records import digest_of
from vidaccel.bench.sparse_methods import BASE, CHANGES, SPARSE_METHODS, SparseMethod
from vidaccel.clips.generate import generate
from vidaccel.clips.metrics import psnr
from vidaccel.clips.video import Clip
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.shards import ShardFolder
from vidaccel.svg2.settings import SVG2

PROMPTS = (
    "a magenta striped square moving down on a charcoal checkered background",
    "a red dotted circle moving right on a navy striped background",
)


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """One clip against the dense one of its prompt, as its shard keeps it.

    Attributes:
        psnr: in dB, against the dense clip.
        psnr_without_int8: in dB, against the clip of the same settings with full scores; None
            where scores are not in 8 bits.
        density: share of the scores that the sparse calls computed; None where no call was sparse.
        density_with_dense: the same over all calls.
        recall: share of the attention mass that the sparse calls kept; None where not measured.
        empty_query_clusters, empty_key_clusters: share of the clusters without a token.
        density_of_layers, recall_of_layers: the same by layer.
    """

    psnr: float
    psnr_without_int8: float | None = None
    density: float | None
    density_with_dense: float | None
    recall: float | None
    empty_query_clusters: float | None
    empty_key_clusters: float | None
    density_of_layers: list[float]
    recall_of_layers: list[float | None]


@dataclass(frozen=True, kw_only=True)
class AttentionPoint(ClipRecord):
    """A method at one top_p: the means over its clips.

    Attributes:
        method: the name of the method, or of the change of settings.
        settings: fields of SVG2.
        psnr_of_prompts: in dB, of each prompt.
        psnr_of_worst_prompt: the least of them.
    """

    method: str
    settings: dict[str, Any]
    psnr_of_prompts: list[float]
    psnr_of_worst_prompt: float


@dataclass(frozen=True)
class AttentionResult:
    """The result of `attention`.

    Attributes:
        settings: arguments of the run.
        points: one per method and top_p, then one per change of the settings.
        environment: hardware and versions.
    """

    settings: dict[str, Any]
    points: list[AttentionPoint]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AttentionResult":
        """Read a result from the JSON of its file; raises KeyError or TypeError for another one."""
        points = [AttentionPoint(**point) for point in data["points"]]
        return cls(data["settings"], points, data["environment"])


def attention(
    pipe: Any,
    call: dict[str, Any],
    *,
    prompts: Sequence[str] = PROMPTS,
    top_ps: Sequence[float] = (0.5, 0.7, 0.9),
    methods: Sequence[str] | None = None,
    changes_at: float | None = 0.7,
    workdir: Path | None = None,
    progress: bool = True,
) -> AttentionResult:
    """Measure PSNR against the dense clip for each method and top_p.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: arguments of its call, but for the prompt.
        prompts: each makes one clip, with its place in the list as the seed.
        top_ps: values of top_p at which every method is measured.
        methods: names of SPARSE_METHODS; all of them if left out.
        changes_at: top_p at which single changes of the settings are measured, on the first
            prompt only; None measures none.
        workdir: folder of the shards, one per clip, from which a run that was stopped goes on;
            None for none. A file of an earlier version is read, and its folder put beside it.
        progress: show a bar.

    Raises:
        BenchError: there is no prompt, no top_p or no method of that name, or the work folder
            belongs to another run.
    """
    if not prompts or not top_ps:
        raise BenchError("bench attention needs at least one prompt and one top_p")
    chosen = _chosen_methods(methods, top_ps)
    changed = [] if changes_at is None else _changes(changes_at)
    clips = [(seed, *method) for seed in range(len(prompts)) for method in chosen]
    clips += [(0, *method) for method in changed]
    found: dict[tuple[str, SVG2], list[ClipRecord]] = {}
    with TemporaryDirectory() as temporary:
        shards = _Shards(Path(temporary) if workdir is None else workdir, pipe, call)
        measuring = _Measuring(pipe, call, prompts)
        for seed, name, method in tqdm(clips, unit="clip", disable=not progress):
            key = f"{prompts[seed]}: {name}: {json.dumps(asdict(method.svg2))}"
            record = shards.read(key)
            if record is None:
                record = measuring.measure(seed, method)
                shards.write(key, record)
            found.setdefault((name, method.svg2), []).append(record)
    restore(pipe)
    return AttentionResult(
        {
            **call,
            "prompts": list(prompts),
            "changes_at": changes_at,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        [_point(name, method.svg2, found[name, method.svg2]) for name, method in chosen + changed],
        environment(),
    )


NamedMethod = tuple[str, SparseMethod]


def _chosen_methods(methods: Sequence[str] | None, top_ps: Sequence[float]) -> list[NamedMethod]:
    """Return the named methods, or all, at each top_p; raises BenchError for unknown names."""
    chosen = tuple(SPARSE_METHODS) if methods is None else tuple(dict.fromkeys(methods))
    if not chosen or (unknown := [name for name in chosen if name not in SPARSE_METHODS]):
        wrong = f"there is no method {unknown[0]!r}" if chosen else "there is no method"
        raise BenchError(f"{wrong}; known are {'; '.join(SPARSE_METHODS)}")
    return [
        (name, replace(method, svg2=replace(method.svg2, top_p=top_p, recall_rows=32)))
        for name, method in ((name, SPARSE_METHODS[name]) for name in chosen)
        for top_p in top_ps
    ]


def _changes(top_p: float) -> list[NamedMethod]:
    """Return the single changes of the settings."""
    return [
        (name, SparseMethod(replace(BASE, top_p=top_p, **change)))
        for name, change in CHANGES.items()
    ]


class _Shards:
    """The records of the clips that were measured so far.

    Args:
        path: the folder; or the single file that earlier versions kept, which is read.
        pipe, call: what tells this run from others.

    Raises:
        BenchError: the folder belongs to another run, or cannot be read or written.
    """

    def __init__(self, path: Path, pipe: Any, call: Mapping[str, Any]) -> None:
        self._earlier: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self._earlier = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise BenchError(
                    f"cannot read {path} ({error}); remove it and run again"
                ) from error
            path = path.with_name(f"{path.name}.shards")
        task = {"call": call, "dtype": str(pipe.dtype), "device": str(pipe.device)}
        self._folder = ShardFolder(path, task, "run", BenchError)

    def read(self, key: str) -> ClipRecord | None:
        """Return the record of a clip, or None when it is still to be made."""
        if key in self._earlier:
            return ClipRecord(**self._earlier[key])
        record: ClipRecord | None = self._folder.read(
            digest_of(key), lambda data: ClipRecord(**data)
        )
        return record

    def write(self, key: str, record: ClipRecord) -> None:
        """Keep the record of a clip."""
        self._folder.write(digest_of(key), asdict(record))


class _Measuring:
    """Makes clips and compares them with the dense ones, which are made when they are needed."""

    def __init__(self, pipe: Any, call: dict[str, Any], prompts: Sequence[str]) -> None:
        self._pipe, self._call, self._prompts = pipe, call, prompts
        self._dense: dict[tuple[int, bool], Clip] = {}

    def measure(self, seed: int, method: SparseMethod) -> ClipRecord:
        """Make one clip of one prompt and compare it."""
        if (seed, method.planned) not in self._dense:
            self._dense[seed, method.planned], _ = self._clip(seed, None, method)
        dense = self._dense[seed, method.planned]
        full: Clip | None = None
        if method.svg2.int8_qk:
            unrounded = replace(method.svg2, int8_qk=False, recall_rows=0)
            full, _ = self._clip(seed, unrounded, method)
        clip, sparse = self._clip(seed, method.svg2, method)
        shown = sparse.report()
        layers = shown.layers.values()
        return ClipRecord(
            psnr=psnr(dense, clip),
            psnr_without_int8=None if full is None else psnr(full, clip),
            density=shown.density,
            density_with_dense=shown.density_with_dense,
            recall=shown.recall,
            empty_query_clusters=shown.empty_query_clusters,
            empty_key_clusters=shown.empty_key_clusters,
            density_of_layers=[layer["density"] for layer in layers],
            recall_of_layers=[layer["recall"] for layer in layers],
        )

    def _clip(self, seed: int, svg2: SVG2 | None, method: SparseMethod) -> tuple[Clip, Any]:
        """Make a clip; return it and what made its attention sparse. `svg2` None: dense."""
        steps = int(self._call["num_inference_steps"])
        # Some computed steps in a row, which no cache keeps, and some that are used again.
        computed = [s for s in range(steps) if s < steps // 2 or s % 2 == 0]
        policy = computed if method.planned else None
        accelerate(self._pipe, policy=policy, cache=None, attention=svg2)
        sparse: Any = next(iter(engines_of(self._pipe).values())).attention
        if svg2 is not None:
            sparse.method = method.attend
        call = {**self._call, "prompt": self._prompts[seed]}
        return generate(self._pipe, call, seed=seed, progress=False).frames, sparse


def _point(name: str, svg2: SVG2, clips: Sequence[ClipRecord]) -> AttentionPoint:
    """Return the means over the prompts, each prompt's PSNR, and the worst one."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values, strict=True)]
        return None if values[0] is None else statistics.fmean(values)

    means = {
        each.name: mean([getattr(clip, each.name) for clip in clips]) for each in fields(ClipRecord)
    }
    each_psnr = [clip.psnr for clip in clips]
    return AttentionPoint(
        **means,
        method=name,
        settings=asdict(svg2),
        psnr_of_prompts=each_psnr,
        psnr_of_worst_prompt=min(each_psnr),
    )


def attention_table(result: AttentionResult) -> str:
    """Return the result of `attention` for people."""
    lines = [f"{'method':32s}  top_p  density  recall   PSNR  worst  prompts"]
    for point in result.points:
        density, recall = ("-" if x is None else f"{x:.1%}" for x in (point.density, point.recall))
        lines.append(
            f"{point.method:32s}  {point.settings['top_p']:5.2f}  {density:>7s}  "
            f"{recall:>6s}  {point.psnr:5.2f}  {point.psnr_of_worst_prompt:5.2f}  "
            f"{len(point.psnr_of_prompts):7d}"
        )
    return "\n".join(lines)
