"""Low precision in quality: every format, rotation and sequence against the plain clip, in one run.

Records are kept by clip, so that a run that was stopped goes on, and may be asked for more cases.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from vidaccel.api import report
from vidaccel.bench.precision_cases import GROUPS, PrecisionCase, calibration_file
from vidaccel.bench.records import digest_of
from vidaccel.clips import metrics
from vidaccel.clips.compare import adherence_of
from vidaccel.clips.generate import generate
from vidaccel.clips.video import Clip
from vidaccel.clips.vmaf import vmaf
from vidaccel.environment import environment
from vidaccel.errors import BenchError, MetricUnavailable
from vidaccel.precision.calibrate import calibrate_precision
from vidaccel.precision.settings import LowPrecision
from vidaccel.shards import ShardFolder


@dataclass(frozen=True, kw_only=True)
class PrecisionPoint:
    """A case at one number of steps: the means over its clips.

    Attributes:
        name, settings: the case.
        steps: denoising steps.
        psnr, ssim, vmaf: against the plain clip of the same prompt and noise; None where one cannot
            be computed, and where the case failed.
        psnr_of_prompts: in dB, of each prompt.
        psnr_of_worst_prompt: the least of them.
        shown: share of the parts of the captions that the clips show.
        shown_by_plain: the same of the plain clips.
        bytes_before, bytes_after: bytes of the linear layers of the blocks; None where not told.
        failed: class and first line of what was raised; empty when nothing was.
    """

    name: str
    settings: dict[str, Any]
    steps: int
    psnr: float | None = None
    ssim: float | None = None
    vmaf: float | None = None
    psnr_of_prompts: list[float] = field(default_factory=list)
    psnr_of_worst_prompt: float | None = None
    shown: float | None = None
    shown_by_plain: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    failed: str = ""


@dataclass(frozen=True)
class PrecisionResult:
    """The result of `precision`.

    Attributes:
        settings: arguments of the run.
        points: one per case and number of steps.
        environment: hardware and versions.
    """

    settings: dict[str, Any]
    points: list[PrecisionPoint]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts and numbers."""
        return asdict(self)


# Statistics over the noise levels need no more steps than these.
CALIBRATION_STEPS = 8


def calibrate_into(
    pipe: Any,
    call: dict[str, Any],
    prompts: Sequence[str],
    folder: Path,
    cases: Sequence[PrecisionCase],
    *,
    seed: int = 1000,
) -> None:
    """Make the calibrations of a folder that cases need and that are not there yet.

    Args:
        pipe, call: the pipeline and the arguments of its call, but for the prompt.
        prompts: texts that nothing is measured on.
        folder: where the files of `calibration_file` go.
        cases: those of `vidaccel.bench.precision_cases.cases`.
        seed: seed of the noise.
    """
    wanted = {
        case.acceleration["precision"].calibration
        for case in cases
        if case.acceleration and isinstance(case.acceleration.get("precision"), LowPrecision)
    }
    for group in GROUPS:
        path = calibration_file(folder, group)
        if path in wanted and not path.exists():
            calibrate_precision(
                pipe,
                prompts,
                path,
                group=group,
                rotations=("dart", "wush"),
                moments=True,
                seed=seed,
                **call | {"num_inference_steps": CALIBRATION_STEPS},
            )


def precision(
    pipe: Any,
    call: dict[str, Any],
    cases: Sequence[PrecisionCase],
    *,
    prompts: Sequence[str],
    steps: Sequence[int] = (20, 50),
    workdir: Path | None = None,
    progress: bool = True,
) -> PrecisionResult:
    """Measure every case on every prompt, each against the plain clip.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: arguments of its call, but for the prompt and the steps.
        cases: those of `vidaccel.bench.precision_cases`.
        prompts: each makes one clip, with its place in the list as the seed.
        steps: numbers of denoising steps.
        workdir: folder of the shards, from which a run that was stopped goes on; None for none.
        progress: show a bar.

    Raises:
        BenchError: there is no case, prompt or number of steps, or the work folder belongs to
            another run.
    """
    if not cases or not prompts or not steps:
        raise BenchError("bench precision needs a case, a prompt and a number of steps")
    with TemporaryDirectory() as temporary:
        task = {"call": call, "dtype": str(pipe.dtype), "device": str(pipe.device)}
        folder = Path(temporary) if workdir is None else workdir
        shards = ShardFolder(folder, task, "run", BenchError)
        measuring = _Measuring(pipe, call, shards)
        jobs = [
            (total, seed, prompt, case)
            for total in steps
            for seed, prompt in enumerate(prompts)
            for case in cases
        ]
        records: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for total, seed, prompt, case in tqdm(jobs, unit="clip", disable=not progress):
            record = measuring.record(case, total, seed, prompt)
            records.setdefault((case.name, total), []).append(record)
    return PrecisionResult(
        {
            **call,
            "prompts": list(prompts),
            "steps": list(steps),
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        [_point(case, total, records[case.name, total]) for total in steps for case in cases],
        environment(),
    )


class _Measuring:
    """Makes clips and compares them with the plain ones, which are made when they are needed."""

    def __init__(self, pipe: Any, call: dict[str, Any], shards: ShardFolder) -> None:
        self._pipe, self._call, self._shards = pipe, call, shards
        self._plain: dict[tuple[int, int, str], Clip] = {}

    def record(self, case: PrecisionCase, steps: int, seed: int, prompt: str) -> dict[str, Any]:
        """Return the record of a clip, from its shard or made now."""
        key = digest_of(json.dumps([case.name, case.settings, steps, seed, prompt], default=str))
        found: dict[str, Any] | None = self._shards.read(key)
        if found is not None:
            return found
        call = {**self._call, "num_inference_steps": steps, "prompt": prompt}
        where = steps, seed, prompt
        if where not in self._plain:
            self._plain[where] = generate(self._pipe, call, seed=seed, progress=False).frames
        try:
            with case.enabled(self._pipe):
                run = generate(self._pipe, call, seed=seed, progress=False)
                told = [] if case.foreign else report(self._pipe).to_dict()["transformers"]
        # Whatever another library raises here is a result; only our own errors end the run.
        except Exception as error:
            if case.foreign is None:
                raise
            reason = str(error).strip().partition("\n")[0]
            made: dict[str, Any] = {"failed": f"{type(error).__name__}: {reason}"}
        else:
            made = _compared(self._plain[where], run.frames, prompt)
            parts = [part["precision"] for part in told if part["precision"]]
            if parts:
                made["bytes"] = [
                    sum(p[name] for p in parts) for name in ("bytes_before", "bytes_after")
                ]
        self._shards.write(key, made)
        return made


def _compared(plain: Clip, clip: Clip, prompt: str) -> dict[str, Any]:
    """Return the numbers of a clip against the plain one."""
    found: dict[str, Any] = {"psnr": metrics.psnr(plain, clip)}
    for name, metric in (("ssim", metrics.ssim), ("vmaf", vmaf)):
        with suppress(MetricUnavailable):
            found[name] = metric(plain, clip)
    for name, frames in (("shown", clip), ("shown_by_plain", plain)):
        adherence = adherence_of(frames, prompt)
        if adherence is not None:
            found[name] = fmean(adherence.values())
    return found


def _point(case: PrecisionCase, steps: int, records: Sequence[dict[str, Any]]) -> PrecisionPoint:
    """Return the means over the clips of a case."""
    failed = next((record["failed"] for record in records if "failed" in record), "")
    if failed:
        return PrecisionPoint(name=case.name, settings=case.settings, steps=steps, failed=failed)

    def mean(name: str) -> float | None:
        values = [record[name] for record in records if name in record]
        return fmean(values) if values else None

    each = [record["psnr"] for record in records]
    before, after = records[0].get("bytes", (None, None))
    return PrecisionPoint(
        name=case.name,
        settings=case.settings,
        steps=steps,
        psnr=mean("psnr"),
        ssim=mean("ssim"),
        vmaf=mean("vmaf"),
        psnr_of_prompts=each,
        psnr_of_worst_prompt=min(each),
        shown=mean("shown"),
        shown_by_plain=mean("shown_by_plain"),
        bytes_before=before,
        bytes_after=after,
    )


def precision_table(result: PrecisionResult) -> str:
    """Return the result of `precision` for people, the best first."""
    width = max(len(point.name) for point in result.points)
    lines = [f"{'case':{width}s}  steps   PSNR  worst   SSIM   VMAF  shown   MiB"]

    def cell(value: float | None, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>5s}"

    for point in sorted(result.points, key=lambda p: (p.steps, -(p.psnr or -math.inf))):
        start = f"{point.name:{width}s}  {point.steps:5d}"
        if point.failed:
            lines.append(f"{start}  failed: {point.failed}")
            continue
        size = None if point.bytes_after is None else point.bytes_after / 2**20
        cells = (
            cell(point.psnr, ".2f"),
            cell(point.psnr_of_worst_prompt, ".2f"),
            cell(point.ssim, ".3f"),
            cell(point.vmaf, ".1f"),
            cell(point.shown, ".0%"),
            cell(size, ".2f"),
        )
        lines.append("  ".join([start, *cells]))
    return "\n".join(lines)
