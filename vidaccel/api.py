"""The three verbs: accelerate, restore, report."""

from functools import partial
from typing import Any, TypeVar

from vidaccel.engine.component_watch import unwatch_components, watch_components
from vidaccel.engine.engine import Engine, engine_of
from vidaccel.engine.loop_watch import unwatch_loops
from vidaccel.engine.report import Report, TransformerReport
from vidaccel.errors import UnsupportedPipelineError, VidaccelError
from vidaccel.hosts.registry import find_transformers, has_denoiser, rows_among
from vidaccel.learning.learner import Learner, Lessons
from vidaccel.precision.change import PrecisionChange, precision_report
from vidaccel.precision.settings import Precision
from vidaccel.resolve import Attention, Cache, Policy, Preset, Resolver, attention_of

Pipeline = TypeVar("Pipeline")

_NOT_ACCELERATED = "this pipeline is not accelerated: call vidaccel.accelerate(pipe)"


def accelerate(
    pipe: Pipeline,
    *,
    policy: Policy | Resolver = "auto",
    cache: Cache = "auto",
    attention: Attention = "auto",
    precision: Precision = None,
    preset: Preset = "balanced",
    speedup: float | None = None,
    max_error: float | None = None,
    psnr: float | None = None,
    allow_transfer: bool = False,
) -> Pipeline:
    """Make a Diffusers video pipeline skip denoising steps whose result it can reuse.

    On a computed step the transformer runs as always and the residual of its whole block stack is
    kept; on a reused step only its embedding and its head run, around that residual (step caching
    as in LeMiCa, NeurIPS 2025, section 3). The pipeline stays what it was: same class, same call,
    same state dict. The acceleration belongs to the transformer: a pipeline that shares it (for
    example through `from_pipe`) is accelerated too. Calling it again replaces the first.

    Args:
        pipe: a Diffusers pipeline whose transformer is in the table of supported ones. With two
            transformers (Wan 2.2), one plan runs over the steps of both.
        policy: which steps are computed. "auto": the best that is known of the run, otherwise a
            generic schedule (see `vidaccel.automatic`), and every step in runs of fewer than 8;
            "learn": a policy that was measured or learned for such runs; where there is none, the
            next one runs whole and is learned from, for those after it, in later processes too;
            None: every step; "every N"; a list of step indices that starts with 0; a `Plan`; or a
            policy, as a `CachePolicy`, a file or a hub id. It is held against the run at the first
            call of each generation, before any block runs.
        cache: the block cache, which probes a few blocks of a step and decides by their change. A
            `DBCache` decides alone with policy=None, and with policy="auto" on a model of which
            nothing is known; beside a plan it can only have more steps computed. None and "auto":
            none.
        attention: how the self-attention of the blocks that run is made sparse: an `SVG2`; "auto":
            `SVG2()` on a GPU, where sequences are long enough to gain; None: not at all.
        precision: the numbers that the linear layers of the blocks compute with: "int8", "int4", or
            a `LowPrecision`; None: those that they have. Weights come back with `restore`.
        preset: "quality", "balanced" or "fast": every 2nd, 3rd or 5th step of policy="auto", or
            the plan of a policy that is as fast as that.
        speedup, max_error, psnr: in the place of the preset, the plan that computes so many times
            fewer steps; that has no segment of a larger error; or that comes so close to the plain
            clip by prediction, in dB. The last two need a policy that was measured or learned.
        allow_transfer: let a given policy run with another number of steps, scheduler or noise
            grid than it was measured with, by carrying its errors over to the new noise levels; a
            report marks it. Without it such a run is refused.

    Returns:
        The same `pipe`.

    Raises:
        UnsupportedPipelineError: no supported transformer; one that is compiled as a whole, has a
            Diffusers cache enabled or runs in tensor parallel; a scheduler that calls the model
            more than once per step. The pipeline is unchanged then.
        PlanError: `policy`, `cache` or `preset` is none of the above, or the block cache asks for
            more blocks than the transformer has.
        PolicyError: the policy file is malformed.
        AttentionError: `attention` is none of the above, or the attention of this model cannot be
            made sparse.
        PrecisionError: `precision` is none of the above, or this model cannot be in it, is
            quantised already, or is running.
    """
    found = find_transformers(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} has no scheduler")
    if getattr(scheduler, "order", 1) != 1:
        raise UnsupportedPipelineError(
            f"{type(scheduler).__name__} calls the model {scheduler.order} times per step; use a "
            "first-order or multistep scheduler, such as UniPCMultistepScheduler"
        )
    if isinstance(policy, Resolver):
        resolver = policy
    else:
        wish = {"speedup": speedup, "max_error": max_error, "psnr": psnr}
        resolver = Resolver(policy, cache, preset, allow_transfer=allow_transfer, wish=wish)
    change = PrecisionChange(pipe, found, precision)
    engines, lessons = [], Lessons()
    for transformer, host in found.values():
        resolver.check(transformer, host)
        engine = Engine(transformer, host, resolver, attention_of(attention, transformer, host))
        if resolver.learns:
            engine.observer = Learner(engine, lessons, resolver.cannot_learn)
        engines.append(engine)
    change.make()
    for engine in engines:
        previous = engine_of(engine.transformer)
        if previous is not None:
            previous.detach()
            for other in previous.trajectories.pipelines:
                engine.trajectories.serve(other)
        engine.trajectories.serve(pipe)
        engine.attach()
    options = {"policy": resolver, "attention": attention, "precision": precision}
    watch_components(pipe, partial(_follow_components, options))
    return pipe


def _follow_components(options: dict[str, Any], pipe: Any, before: dict[str, Any]) -> None:
    """Accelerate the transformers that a modular pipeline has now, and leave those it had."""
    if has_denoiser(pipe):
        accelerate(pipe, **options)
    kept = {id(module) for module, _ in rows_among(pipe.components).values()}
    for name, (transformer, host) in rows_among(before).items():
        engine = engine_of(transformer)
        if engine is None or id(transformer) in kept:
            continue
        others = (other for other in engine.trajectories.pipelines if other is not pipe)
        if not any(m is transformer for o in others for m, _ in rows_among(o.components).values()):
            PrecisionChange(pipe, {name: (transformer, host)}, None).make()
            engine.detach()


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `accelerate` exactly: the same output bits, attributes, hooks and saved files as before.

    A pipeline that is not accelerated comes back unchanged.

    Raises:
        UnsupportedPipelineError: `pipe` is not a pipeline that `accelerate` takes.
        PrecisionError: its weights were dropped (`LowPrecision(keep_weights="drop")`), or it is
            running in low precision. Nothing is changed.
    """
    PrecisionChange(pipe, find_transformers(pipe), None).make()
    for engine in engines_of(pipe).values():
        engine.detach()
    unwatch_components(pipe)
    unwatch_loops([pipe])  # where another transformer is in the place of the accelerated one
    return pipe


def recompute(pipe: Any) -> None:
    """Have the next step of a running generation computed, in every branch.

    For callbacks that change in the middle of a run what no call shows. Another prompt, other
    inputs and other adapters are noticed without it.

    Raises:
        VidaccelError: the pipeline is not accelerated.
    """
    engines = engines_of(pipe)
    if not engines:
        raise VidaccelError(_NOT_ACCELERATED)
    for engine in engines.values():
        engine.recompute()


def report(pipe: Any) -> Report:
    """Tell what was computed and reused in `pipe` since it was accelerated.

    Returns:
        A `Report`: `str()` is a table for people, `.to_dict()` is for programs.

    Raises:
        VidaccelError: the pipeline is not accelerated.
    """
    engines = engines_of(pipe)
    if not engines:
        raise VidaccelError(_NOT_ACCELERATED)
    return Report(
        type(pipe).__name__,
        tuple(
            TransformerReport.of(
                name,
                type(engine.transformer).__name__,
                engine.description,
                engine.stats,
                engine.bytes_held,
                _threshold(engine),
                engine.attention.report(),
                notes=engine.notes,
                precision=precision_report(engine.transformer),
            )
            for name, engine in engines.items()
        ),
    )


def engines_of(pipe: Any) -> dict[str, Engine]:
    """The engines at work in `pipe`, by component name; empty when it is not accelerated."""
    return {
        name: engine
        for name, (transformer, _) in find_transformers(pipe).items()
        if (engine := engine_of(transformer)) is not None
    }


def _threshold(engine: Engine) -> float | None:
    """The threshold of the block cache in the last generation; None without one."""
    cache = None if engine.generation is None else engine.generation.cache
    return None if cache is None else cache.threshold
