"""Quality against speed: methods at many settings, on the same prompts and noise, in one run.

Every generation is compared with the plain one of its prompt, which is timed again and again
between the others. A killed run goes on from the shards in its work folder, and ends in the same
result but for the timings.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from vidaccel.api import engines_of, report
from vidaccel.bench.curves import Record, adherence_shares, is_plain, is_plan, key_of, points_of
from vidaccel.bench.methods import Variant
from vidaccel.clips import metrics
from vidaccel.clips.generate import adherence_of, generate, steps_of
from vidaccel.clips.video import Clip
from vidaccel.environment import environment
from vidaccel.errors import BenchError, MetricUnavailable
from vidaccel.files import write_text
from vidaccel.hosts.registry import find_transformers

PLAIN_EVERY = 12  # generations between two plain ones, which the speedups are taken from
_SESSION = time.time_ns()  # timings of one process are compared with each other alone
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}


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
) -> dict[str, Any]:
    """Run every variant on every prompt and compare it with the plain run.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left as it is.
        call: arguments of its call but the prompt.
        prompts: what the clips show; scene captions also tell how well a clip follows them.
        variants: of `vidaccel.bench.methods.variants`.
        seed: of the noise.
        clock: speedups come from "wall" seconds, or "cpu" seconds of this process: on a CPU that
            other programs use at the same time they say what an idle machine would do.
        workdir: folder of the shards, one per variant and prompt; None for none.
        lpips: of `metrics.load_lpips`; None leaves LPIPS out.
        progress: show a bar.

    Returns:
        "settings"; "plain" (seconds, adherence); "points", one per variant that ran: means over the
        prompts, the worst prompt, and all of them; "failed" (what other libraries raised);
        "environment".

    Raises:
        BenchError: the work folder belongs to another run, or a method left the pipeline changed.
    """
    if not prompts or not variants or clock not in CLOCKS:
        raise BenchError("a comparison needs a prompt, a method, and a clock that is wall or cpu")
    with TemporaryDirectory() as temporary, _BlockCount(pipe) as blocks:
        folder = Shards(temporary if workdir is None else workdir, _task(pipe, call, seed))
        total = len(prompts) * len(variants)
        with tqdm(total=total, unit="run", disable=not progress, smoothing=0.05) as bar:
            for prompt in prompts:
                run = _Prompt(pipe, {**call, "prompt": prompt}, seed, folder, blocks, lpips)
                bar.update(run.measure(variants, bar))
        records = [folder.of(prompt) for prompt in prompts]
    wanted = {key_of(variant.method, variant.setting) for variant in variants}
    points, failed = points_of(records, wanted, CLOCKS[clock])
    plain = [record for of_prompt in records for record in of_prompt if is_plain(record)]
    return {
        "settings": {
            **call,
            "prompts": list(prompts),
            "seed": seed,
            "clock": clock,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        "plain": {
            "seconds": median(record["seconds"] for record in plain),
            "cpu_seconds": median(record["cpu_seconds"] for record in plain),
            "blocks": plain[0]["blocks"],
            "adherence": adherence_shares(plain),
            "bit_equal_after_every_method": True,  # or BenchError
        },
        "points": points,
        "failed": failed,
        "environment": environment() | {"peers": _versions()},
    }


class _Prompt:
    """The generations of one prompt."""

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        seed: int,
        folder: "Shards",
        blocks: "_BlockCount",
        lpips: Any,
    ) -> None:
        self.pipe, self.call, self.seed = pipe, call, seed
        self.prompt: str = call["prompt"]
        self.folder, self.blocks, self.lpips = folder, blocks, lpips
        self.reference: Clip | None = None

    def measure(self, variants: Sequence[Variant], bar: Any) -> int:
        """Run what has no shard yet, in an order of its own, and return how many had one."""
        self._share(variants)
        known = self._measured()
        open_ = [v for v in variants if key_of(v.method, v.setting) not in known]
        random.Random(self.prompt).shuffle(open_)
        if open_:
            warm_up = {**self.call, "num_inference_steps": 2}
            generate(self.pipe, warm_up, seed=self.seed, progress=False)
        since: list[str] = []
        for position, variant in enumerate(open_):
            if position % PLAIN_EVERY == 0:
                self._plain(since)
                since = []
            bar.set_postfix_str(variant.method, refresh=False)
            if key_of(variant.method, variant.setting) in self._measured():
                bar.update()
                continue
            self._variant(variant)
            self._share(open_)
            since.append(variant.method)
            bar.update()
        if open_:
            self._plain(since)
        return len(variants) - len(open_)

    def _share(self, variants: Sequence[Variant]) -> None:
        """Two methods may find the same plan; it need not run twice."""
        records = self.folder.of(self.prompt)
        known = self._measured()
        plans = {key_of("plan", r["setting"]): r for r in records if is_plan(r["setting"])}
        for variant in variants:
            twin = plans.get(key_of("plan", variant.setting))
            if twin is not None and key_of(variant.method, variant.setting) not in known:
                self._keep(variant, {**twin, "method": variant.method})

    def _measured(self) -> set[str]:
        return {key_of(r["method"], r["setting"]) for r in self.folder.of(self.prompt)}

    def _keep(self, variant: Variant, record: Record) -> None:
        name = _name(key_of(variant.method, variant.setting))
        self.folder.add(self.prompt, name, record)

    def _plain(self, since: list[str]) -> None:
        """Time the plain pipeline again; raises BenchError if its clip is no longer the same."""
        frames, record = self._generation(self.call)
        stored = [r["digest"] for r in self.folder.of(self.prompt) if is_plain(r)]
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        if stored and digest != stored[0]:
            after = f"after {', '.join(sorted(set(since)))}" if since else "than when it started"
            raise BenchError(f"the plain clip of {self.prompt!r} is another one {after}")
        if self.reference is None:
            self.reference = frames
        record |= {"method": None, "setting": {}, "digest": digest}
        record["adherence"] = adherence_of(frames, self.prompt)
        self.folder.add(self.prompt, f"plain-{time.time_ns()}", record)

    def _variant(self, variant: Variant) -> None:
        call = self.call
        if variant.steps is not None:
            call = {**call, "num_inference_steps": variant.steps}
        head = {"method": variant.method, "setting": variant.setting}
        try:
            with variant.enabled(self.pipe):
                frames, record = self._generation(call)
                record |= _told(self.pipe)
        # Whatever a foreign cache raises on a model is a result; only our own errors end the run.
        except Exception as error:
            if not variant.foreign:
                raise
            reason = str(error).strip().partition("\n")[0]
            failed = {"failed": f"{type(error).__name__}: {reason}"}
            self._keep(variant, head | failed)
            return
        assert self.reference is not None
        record |= head | _metrics(self.reference, frames, self.lpips)
        record["adherence"] = adherence_of(frames, self.prompt)
        self._keep(variant, record)

    def _generation(self, call: dict[str, Any]) -> tuple[Clip, Record]:
        self.blocks.ran = 0
        at, cpu = time.time(), time.process_time()
        run = generate(self.pipe, call, seed=self.seed, progress=False)
        return run.frames, {
            "session": _SESSION,
            "at": at,
            "seconds": run.seconds,
            "cpu_seconds": time.process_time() - cpu,
            "denoising_seconds": run.denoising_seconds,
            "blocks": self.blocks.ran,
        }


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


class Shards:
    """What was measured so far, one small file per generation.

    Args:
        path: the folder; made if need be.
        task: what is measured.

    Raises:
        BenchError: the folder belongs to another task, or cannot be read or written.
    """

    def __init__(self, path: str | Path, task: Record) -> None:
        self.path = Path(path)
        self._known: dict[str, list[Record]] = {}
        manifest = self.path / "task.json"
        if manifest.exists():
            found = _read(manifest)
            differing = [key for key in task if found.get(key) != task[key]]
            if differing:
                raise BenchError(
                    f"{self.path} belongs to another run: its {', '.join(differing)} "
                    f"{'differs' if len(differing) == 1 else 'differ'}; use another work folder"
                )
        else:
            self._write(manifest, task)

    def of(self, prompt: str) -> list[Record]:
        """The records of one prompt."""
        if prompt not in self._known:
            files = sorted(self.path.glob(f"{_name(prompt)}-*.json"))
            self._known[prompt] = [_read(file) for file in files]
        return self._known[prompt]

    def add(self, prompt: str, name: str, record: Record) -> None:
        """Keep a record."""
        self.of(prompt).append(record)
        self._write(self.path / f"{_name(prompt)}-{name}.json", record)

    def _write(self, file: Path, data: Record) -> None:
        # An infinite PSNR is kept as the name that Python's JSON reads back.
        try:
            write_text(file, json.dumps(data, sort_keys=True) + "\n")
        except OSError as error:
            raise BenchError(
                f"cannot write {file}: {error.strerror}; what was measured before is kept, and "
                "the same command goes on from there"
            ) from error


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read {file} ({error}); remove it and run again") from error


def _task(pipe: Any, call: dict[str, Any], seed: int) -> Record:
    """What tells one run from another. The plain clips tell the weights."""
    models = {
        name: {k: str(v) for k, v in transformer.config.items() if not k.startswith("_")}
        for name, (transformer, _) in find_transformers(pipe).items()
    }
    task = {
        "seed": seed,
        "call": call,
        "steps": steps_of(pipe, call),
        "models": models,
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
        "versions": _versions(),
    }
    return json.loads(json.dumps(task, default=str))


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "diffusers", "cache-dit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _told(pipe: Any) -> Record:
    """What a report says of the last generation: share of steps computed, density of attention."""
    if not engines_of(pipe):
        return {}
    parts = report(pipe).transformers
    letters = "".join(part.timeline for part in parts)
    found: Record = {"steps_share": letters.count("C") / len(letters)}
    densities = [p.attention.density_with_dense for p in parts if p.attention is not None]
    if densities and None not in densities:
        found["density"] = fmean(density for density in densities if density is not None)
    return found


def _metrics(reference: Clip, clip: Clip, lpips: Any) -> Record:
    """What `metrics.summary` gives, without looking for LPIPS weights each time."""
    found: Record = {"psnr": metrics.psnr(reference, clip), "ssim": None, "lpips": None}
    with suppress(MetricUnavailable):
        found["ssim"] = metrics.ssim(reference, clip)
    if lpips is not None:
        found["lpips"] = metrics.lpips(reference, clip, model=lpips)
    return found | {"flicker": metrics.flicker(clip) - metrics.flicker(reference)}
