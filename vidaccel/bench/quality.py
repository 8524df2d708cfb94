"""Quality against speed: methods at many settings, on the same prompts and noise, in one run.

Every generation is compared with the plain one of its prompt, which is timed again and again
between the others. A killed run goes on from the shards in its work folder, and ends in the same
result but for the timings.
"""

import hashlib
import random
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from vidaccel.api import engines_of, report
from vidaccel.bench.curves import QualityResult, plain_summary, points_of
from vidaccel.bench.records import (
    FailedRecord,
    Generation,
    PlainRecord,
    RecordFolder,
    VariantRecord,
    digest_of,
    is_plan,
    key_of,
)
from vidaccel.bench.variants import Variant
from vidaccel.clips.compare import adherence_of
from vidaccel.clips.fidelity import MEASURES, summary
from vidaccel.clips.generate import generate
from vidaccel.clips.load import steps_of
from vidaccel.clips.measurement import learned_plan
from vidaccel.clips.video import Clip
from vidaccel.engine.stats import StepKind
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.hosts.registry import config_of, find_transformers

PLAIN_EVERY = 12  # generations between two plain ones, which the speedups are taken from
CLOCKS = ("wall", "cpu")
_SESSION = time.time_ns()  # timings of one process are compared with each other alone


def quality(
    pipe: Any,
    call: dict[str, Any],
    prompts: Sequence[str],
    variants: Sequence[Variant],
    *,
    seed: int = 0,
    clock: str = "wall",
    workdir: Path | None = None,
    lpips: Any = None,
    progress: bool = True,
) -> QualityResult:
    """Run every variant on every prompt and compare it with the plain run.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left as it is.
        call: arguments of its call but the prompt.
        prompts: texts for the clips; scene captions also tell how well a clip follows them.
        variants: those of `vidaccel.bench.methods.variants`.
        seed: seed of the noise.
        clock: speedups come from "wall" seconds, or "cpu" seconds of this process: on a CPU that
            other programs use at the same time they say what an idle machine would do.
        workdir: folder of the shards, one per variant and prompt; None for none.
        lpips: the network of `metrics.load_lpips`; None leaves LPIPS out.
        progress: show a bar.

    Raises:
        BenchError: the work folder belongs to another run, or a method left the pipeline changed.
    """
    if not prompts or not variants or clock not in CLOCKS:
        raise BenchError("a comparison needs a prompt, a method, and a clock that is wall or cpu")
    with TemporaryDirectory() as temporary, _BlockCount(pipe) as blocks:
        path = Path(temporary) if workdir is None else workdir
        folder = RecordFolder(path, _manifest(pipe, call, seed))
        total = len(prompts) * len(variants)
        with tqdm(total=total, unit="run", disable=not progress, smoothing=0.05) as bar:
            for prompt in prompts:
                of_prompt = _PromptRuns(
                    pipe, {**call, "prompt": prompt}, seed, folder, blocks, lpips
                )
                bar.update(of_prompt.measure(variants, bar))
        records = [folder.records(prompt) for prompt in prompts]
    wanted = {key_of(variant.method, variant.setting) for variant in variants}
    points, failed = points_of(records, wanted, clock)
    settings = {
        **call,
        "prompts": list(prompts),
        "seed": seed,
        "clock": clock,
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
    }
    hardware = environment() | {"peers": _versions()}
    return QualityResult(settings, plain_summary(records), points, failed, hardware)


class _PromptRuns:
    """The generations of one prompt."""

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        seed: int,
        folder: RecordFolder,
        blocks: "_BlockCount",
        lpips: Any,
    ) -> None:
        self.pipe, self.call, self.seed = pipe, call, seed
        self.prompt: str = call["prompt"]
        self.folder, self.blocks, self.lpips = folder, blocks, lpips
        self.leave_out = ("lpips",) if lpips is None else ()
        self.reference: Clip | None = None

    def measure(self, variants: Sequence[Variant], bar: Any) -> int:
        """Run what has no shard yet, in an order of its own, and return how many had one."""
        self._share(variants)
        measured = self.folder.measured(self.prompt)
        missing = [v for v in variants if key_of(v.method, v.setting) not in measured]
        random.Random(self.prompt).shuffle(missing)
        if missing:
            warm_up = {**self.call, "num_inference_steps": 2}
            generate(self.pipe, warm_up, seed=self.seed, progress=False)
        since: list[str] = []
        for position, variant in enumerate(missing):
            if position % PLAIN_EVERY == 0:
                self._run_plain(since)
                since = []
            bar.set_postfix_str(variant.method, refresh=False)
            if key_of(variant.method, variant.setting) in self.folder.measured(self.prompt):
                bar.update()
                continue
            self._run_variant(variant)
            self._share(missing)
            since.append(variant.method)
            bar.update()
        if missing:
            self._run_plain(since)
        return len(variants) - len(missing)

    def _share(self, variants: Sequence[Variant]) -> None:
        """Copy the record of a plan that another method found too; it need not run twice."""
        measured = self.folder.measured(self.prompt)
        plans = {
            key_of("plan", record.setting): record
            for record in measured.values()
            if is_plan(record.setting)
        }
        for variant in variants:
            twin = plans.get(key_of("plan", variant.setting))
            if twin is not None and key_of(variant.method, variant.setting) not in measured:
                self._keep(variant, replace(twin, method=variant.method))

    def _keep(self, variant: Variant, record: VariantRecord | FailedRecord) -> None:
        name = digest_of(key_of(variant.method, variant.setting))
        self.folder.add(self.prompt, name, record)

    def _run_plain(self, since: Sequence[str]) -> None:
        """Time the plain pipeline again; raises BenchError if its clip is no longer the same."""
        frames, generation = self._generate(self.call)
        stored = self.folder.plain(self.prompt)
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        if stored and digest != stored[0].digest:
            after = f"after {', '.join(sorted(set(since)))}" if since else "than when it started"
            raise BenchError(f"the plain clip of {self.prompt!r} is another one {after}")
        if self.reference is None:
            self.reference = frames
        adherence = adherence_of(frames, self.prompt)
        record = PlainRecord(**vars(generation), digest=digest, adherence=adherence)
        self.folder.add(self.prompt, f"plain-{time.time_ns()}", record)

    def _run_variant(self, variant: Variant) -> None:
        """Run a variant and keep its record; that of its failure if it is another library's."""
        call = self.call
        if variant.steps is not None:
            call = {**call, "num_inference_steps": variant.steps}
        try:
            with variant.enabled(self.pipe):
                frames, generation = self._generate(call)
                steps_share, density = _reported_shares(self.pipe)
                ran = None if variant.foreign else learned_plan(self.pipe)
        # Whatever a foreign cache raises on a model is a result; only our own errors end the run.
        except Exception as error:
            if not variant.foreign:
                raise
            reason = str(error).strip().partition("\n")[0]
            failed = f"{type(error).__name__}: {reason}"
            self._keep(variant, FailedRecord(variant.method, variant.setting, failed))
            return
        assert self.reference is not None
        found = summary(self.reference, frames, lpips_model=self.lpips, leave_out=self.leave_out)
        record = VariantRecord(
            **vars(generation),
            method=variant.method,
            setting=variant.setting,
            **{name: found[name] for name in (*MEASURES, "flicker")},
            worst_frames={name: worst["value"] for name, worst in found["worst"].items()},
            adherence=adherence_of(frames, self.prompt),
            steps_share=steps_share,
            density=density,
        )
        self._keep(variant, record)
        if ran is not None:
            speedup = self.folder.plain(self.prompt)[-1].seconds / generation.seconds
            psnr, ssim = record.psnr, record.ssim
            for note in ran.add(self.call, self.seed, psnr=psnr, ssim=ssim, speedup=speedup):
                warnings.warn(note, stacklevel=2)

    def _generate(self, call: dict[str, Any]) -> tuple[Clip, Generation]:
        self.blocks.ran = 0
        at, cpu = time.time(), time.process_time()
        run = generate(self.pipe, call, seed=self.seed, progress=False)
        return run.frames, Generation(
            session=_SESSION,
            at=at,
            seconds=run.seconds,
            cpu_seconds=time.process_time() - cpu,
            denoising_seconds=run.denoising_seconds,
            blocks=self.blocks.ran,
        )


class _BlockCount:
    """Counts the blocks that really run, however a method skips them.

    The last linear layer of every block is watched: caches wrap the blocks themselves, or their
    attention and feed-forward parts.
    """

    def __init__(self, pipe: Any) -> None:
        self.ran = 0
        self._handles: list[Any] = []
        for transformer, host in find_transformers(pipe).values():
            for blocks in host.blocks:
                for block in getattr(transformer, blocks.name):
                    *_, last = (m for m in block.modules() if isinstance(m, nn.Linear))
                    self._handles.append(last.register_forward_pre_hook(self._count))

    def _count(self, module: nn.Module, args: Any) -> None:
        self.ran += 1

    def __enter__(self) -> "_BlockCount":
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def _manifest(pipe: Any, call: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return what tells one run from another. The plain clips tell the weights."""
    models = {
        name: {key: str(value) for key, value in config_of(transformer).items()}
        for name, (transformer, _) in find_transformers(pipe).items()
    }
    return {
        "seed": seed,
        "call": call,
        "steps": steps_of(pipe, call),
        "models": models,
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that are compared."""
    found = {}
    for package in ("torch", "diffusers", "cache-dit"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _reported_shares(pipe: Any) -> tuple[float | None, float | None]:
    """Return the shares of steps and of scores that the last generation computed.

    None without a report, and without sparse attention.
    """
    if not engines_of(pipe):
        return None, None
    parts = report(pipe).transformers
    timeline = "".join(part.timeline for part in parts)
    steps_share = timeline.count(StepKind.COMPUTED) / len(timeline)
    found = [part.attention.density_with_dense for part in parts if part.attention is not None]
    densities = [density for density in found if density is not None]
    complete = densities and len(densities) == len(found)
    return steps_share, fmean(densities) if complete else None
