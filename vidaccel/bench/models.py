"""The gain of whole models, at the size they are used at and without their weights.

How long a step takes does not depend on what the weights are, so random ones tell the seconds of a
model that nobody has to download. They tell nothing of quality. Where the weights would decide what
is skipped, that is given instead: plans and block caches compute every third step, and the density
of sparse attention is measured and stands beside its seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from vidaccel.api import accelerate, restore
from vidaccel.bench.timing import wait_for_gpu
from vidaccel.clips.generate import Run, generate
from vidaccel.dbcache import DBCache
from vidaccel.engine.compat import full_precision_modules
from vidaccel.engine.stats import StepKind
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.plans.plan import Plan
from vidaccel.svg2.settings import SVG2


@dataclass(frozen=True)
class RealModel:
    """A Wan model and the clip it makes.

    Attributes:
        width, height, frames: size of the clip.
        transformer: entries of the transformer's config that differ from those of Wan 2.1 14B.
        vae: entries of the VAE's config that differ from those of Wan 2.1.
        text_tokens: length of a prompt.
        steps: number of steps that it is used with.
    """

    width: int
    height: int
    frames: int = 81
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 512
    steps: int = 50


MODELS = {
    "Wan2.1-T2V-1.3B 480p": RealModel(
        832, 480, transformer={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    ),
    "Wan2.1-T2V-14B 720p": RealModel(1280, 720),
}

# Every third step is computed, whatever the weights make of it.
_EVERY = 3
_CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=_EVERY - 1)


@dataclass(frozen=True)
class ModelRow:
    """One combination of what skips work.

    Attributes:
        steps_computed: number of computed steps.
        density: share of the scores that sparse calls computed; None without sparse attention.
        seconds: duration of the whole call.
        denoising_seconds: duration until the end of the last step.
        peak_bytes: most GPU memory; None on another device.
        speedup: plain seconds of the whole call over these.
        extrapolated_seconds, extrapolated_speedup: the same at the model's own number of steps;
            None where that was run.
    """

    steps_computed: int
    density: float | None
    seconds: float
    denoising_seconds: float
    peak_bytes: int | None
    speedup: float = 1.0
    extrapolated_seconds: float | None = None
    extrapolated_speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a result file keeps it: without an extrapolation that there is not."""
        kept = asdict(self)
        if self.extrapolated_seconds is None:
            del kept["extrapolated_seconds"], kept["extrapolated_speedup"]
        return kept


@dataclass(frozen=True)
class SpeedResult:
    """The result of `speed`.

    Attributes:
        settings: the model and the arguments of the run.
        methods: name of a combination -> its row.
        environment: hardware and versions.
    """

    settings: dict[str, Any]
    methods: dict[str, ModelRow]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        return asdict(self) | {"methods": {n: row.to_dict() for n, row in self.methods.items()}}


def speed(
    model: RealModel,
    *,
    steps: int | None = None,
    rounds: int = 1,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attention: SVG2 | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> SpeedResult:
    """Time a plain pipeline and each combination of what skips work, in one run.

    Args:
        model: one of MODELS, or another.
        steps: fewer than the model is used with, to be done sooner. The seconds at its own number
            are then an extrapolation, and named so.
        rounds: every combination is timed so often, in turn; the result has medians.
        device, dtype: place and type of the weights.
        attention: settings of sparse attention; its defaults if left out.
        log: takes a line of progress.

    Raises:
        BenchError: there is no GPU, or fewer than 6 steps are asked for.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BenchError(
            "bench models runs models of their real size on a CUDA GPU, and there is none here"
        )
    total = model.steps if steps is None else steps
    if total < 2 * _EVERY:
        raise BenchError(f"steps: found {total}, expected {2 * _EVERY} or more")
    sparse = attention or SVG2()
    pipe = pipeline_of_model(model, device, dtype)
    call = call_of_model(model, pipe, dtype) | {"num_inference_steps": total}
    # A few steps compile what has to be, and are not counted.
    for options in _combinations(2 * _EVERY, sparse).values():
        _timed(pipe, call | {"num_inference_steps": 2 * _EVERY}, options)
    combinations = _combinations(total, sparse)
    runs: dict[str, list[_TimedRun]] = {name: [] for name in combinations}
    for _ in range(rounds):
        for name, options in combinations.items():
            runs[name].append(_timed(pipe, call, options))
            log(f"{name}: {runs[name][-1].run.seconds:.1f} s")
    rows = {name: _row(runs[name], total) for name in combinations}
    settings = {
        **asdict(model),
        "steps_measured": total,
        "rounds": rounds,
        "dtype": str(dtype),
        "device": device,
        "attention": str(sparse),
        "weights": "random",
        "every": _EVERY,
    }
    return SpeedResult(settings, _against_plain(rows, model.steps / total), environment())


def _against_plain(rows: Mapping[str, ModelRow], times: float) -> dict[str, ModelRow]:
    """Add the speedups, and what `times` as many steps would take where that is more than one."""
    plain = rows["plain"]
    rows = {name: replace(row, speedup=plain.seconds / row.seconds) for name, row in rows.items()}
    if times <= 1:
        return rows
    seconds = {
        name: row.seconds + row.denoising_seconds * (times - 1) for name, row in rows.items()
    }
    return {
        name: replace(
            row,
            extrapolated_seconds=seconds[name],
            extrapolated_speedup=seconds["plain"] / seconds[name],
        )
        for name, row in rows.items()
    }


def speed_table(result: SpeedResult) -> str:
    """Return the result of `speed` for people."""
    settings = result.settings
    lines = [f"{'method':16s}  computed  density  seconds  speedup  peak GiB"]
    for name, row in result.methods.items():
        density = "dense" if row.density is None else f"{row.density:.0%}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}"
        lines.append(
            f"{name:16s}  {row.steps_computed:8d}  {density:>7s}  {row.seconds:7.1f}  "
            f"{row.speedup:6.2f}x  {peak:>8s}"
        )
    if settings["steps_measured"] < settings["steps"]:
        lines += [
            "",
            f"extrapolated from {settings['steps_measured']} to {settings['steps']} steps",
        ]
        lines += [
            f"{name:16s}  {row.extrapolated_seconds:7.1f} s  {row.extrapolated_speedup:6.2f}x"
            for name, row in result.methods.items()
        ]
    return "\n".join([*lines, "", "weights are random: seconds, not quality"])


def _combinations(steps: int, sparse: SVG2) -> dict[str, dict[str, Any] | None]:
    """Return name -> arguments of `accelerate`, or None for the plain pipeline."""
    plan = Plan.every(_EVERY, steps)
    return {
        "plain": None,
        "plan": {"policy": plan, "cache": None, "attention": None},
        "DBCache F1B0": {"policy": None, "cache": _CACHE, "attention": None},
        "SVG2": {"policy": None, "cache": None, "attention": sparse},
        "plan + DBCache": {"policy": plan, "cache": _CACHE, "attention": None},
        "plan + SVG2": {"policy": plan, "cache": None, "attention": sparse},
        "DBCache + SVG2": {"policy": None, "cache": _CACHE, "attention": sparse},
        "all three": {"policy": plan, "cache": _CACHE, "attention": sparse},
    }


@dataclass(frozen=True)
class _TimedRun:
    """One generation, and the most GPU memory that it took in bytes; None on another device."""

    run: Run
    peak_bytes: int | None


def _timed(pipe: Any, call: dict[str, Any], options: dict[str, Any] | None) -> _TimedRun:
    """Run a pipeline once with arguments of `accelerate`; None leaves it plain."""
    restore(pipe)
    if options is not None:
        accelerate(pipe, **options)
    on_gpu = pipe.transformer.device.type == "cuda"
    if on_gpu:
        wait_for_gpu()
        torch.cuda.reset_peak_memory_stats()
    run = generate(pipe, call, progress=False)
    restore(pipe)
    return _TimedRun(run, torch.cuda.max_memory_allocated() if on_gpu else None)


def _row(runs: Sequence[_TimedRun], steps: int) -> ModelRow:
    """Summarise the runs of one combination."""
    first = runs[0].run.report
    part = None if first is None else first["transformers"][0]
    attention = None if part is None else part["attention"]
    return ModelRow(
        steps_computed=steps if part is None else part["timeline"].count(StepKind.COMPUTED),
        density=None if attention is None else attention["density"],
        seconds=statistics.median(each.run.seconds for each in runs),
        denoising_seconds=statistics.median(each.run.denoising_seconds or 0.0 for each in runs),
        peak_bytes=max(
            (each.peak_bytes for each in runs if each.peak_bytes is not None), default=None
        ),
    )


def pipeline_of_model(model: RealModel, device: str, dtype: torch.dtype) -> Any:
    """Return the pipeline with random weights, made where they are used, and no text encoder."""
    import diffusers

    library: Any = diffusers  # whose classes have no types
    torch.manual_seed(0)
    with _made_on(device, dtype):
        transformer = library.WanTransformer3DModel(**model.transformer).eval()
    with _made_on(device, torch.float32):
        vae = library.AutoencoderKLWan(**model.vae).eval()
    # As loading does with the modules that the class wants in full precision.
    in_full_precision = full_precision_modules(type(transformer))
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in in_full_precision:
            module.float()
    scheduler = library.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
    return library.WanPipeline(transformer=transformer, **parts)


@contextmanager
def _made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors on this device and, if floating, of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def call_of_model(model: RealModel, pipe: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of the pipeline's call, with random embeddings in the place of a prompt."""
    width = pipe.transformer.config.text_dim
    device = pipe.transformer.device
    texts = torch.randn(2, 1, model.text_tokens, width, generator=torch.Generator().manual_seed(0))
    positive, negative = texts.to(device, dtype)
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "width": model.width,
        "height": model.height,
        "num_frames": model.frames,
        "guidance_scale": 5.0,
    }
