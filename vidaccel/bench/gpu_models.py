"""The part "models": steps of whole models with random weights, and what the host does in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from vidaccel.api import accelerate, report, restore
from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.models import MODELS, RealModel, call_of_model, pipeline_of_model
from vidaccel.clips.generate import latents_of
from vidaccel.plans.plan import Plan
from vidaccel.svg2.settings import SVG2

_WAN, _SMALL = "Wan2.1-T2V-14B 720p", "Wan2.1-T2V-1.3B 480p"
_LAYERS = 2  # where a few stand for all: they are alike
_STEPS = 6
_SKIPPED = 2  # steps: the first ones compile, and cluster from scratch

# Computes every step sparsely, so that a few steps tell what a sparse one takes. Attention of
# random weights is nearly even: with this share of it the density is about 30 %.
_SPARSE = SVG2(top_p=0.3, dense_steps=0, dense_layers=0)
_TINY = RealModel(
    64,
    64,
    frames=5,
    transformer={
        "num_attention_heads": 1,
        "attention_head_dim": 64,
        "ffn_dim": 64,
        "num_layers": 2,
        "text_dim": 32,
        "freq_dim": 32,
    },
    vae={"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    text_tokens=8,
)


def items(sizes: Sizes) -> list[Item]:
    """List them: the small model, what the host does, layers of the large model, all of it."""
    plan = {"policy": Plan.every(3, _STEPS), "attention": None}
    sparse = {"policy": None, "attention": _of(sizes)}
    int8 = {"policy": None, "attention": None, "precision": "int8"}
    every = {**plan, "attention": _of(sizes), "precision": "int8"}
    variants: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "SVG2": sparse,
        "int8": int8,
        "SVG2 + int8": sparse | int8 | {"attention": _of(sizes)},
        "plan": plan,
        "plan + SVG2 + int8": every,
    }
    small = sizes.of(MODELS[_SMALL], _TINY)

    def of_small(name: str) -> Item:
        run = partial(_steps, sizes, small, variants[name])
        return Item(f"{_SMALL}, {name}", run, 12, 16, name != "plan + SVG2 + int8")

    listed = [
        of_small("plain"),
        of_small("plan + SVG2 + int8"),
        Item(f"{_SMALL}, gate of auto", partial(_gate, sizes, small), 12, 16),
        Item(f"{_SMALL}, host", partial(_host, sizes, _few_layers(small), sparse), 15, 16),
        Item(f"{_SMALL}, idle", partial(_idle, sizes, small), 25, 16),
    ]
    for name in ("plain", "SVG2", "int8", "SVG2 + int8"):
        run = partial(_steps, sizes, _few_layers(sizes.of(MODELS[_WAN], _TINY)), variants[name])
        repeats = name != "plain"
        listed.append(Item(f"{_LAYERS} layers of {_WAN}, {name}", run, 10, 20, repeats))
    listed += [of_small(name) for name in ("SVG2", "int8", "SVG2 + int8", "plan")]
    for name in ("SVG2", "plain"):
        run = partial(_steps, sizes, small, variants[name], compiled=True)
        listed.append(Item(f"{_SMALL}, {name}, compiled", run, 60, 16, name == "plain"))
    large = sizes.of(MODELS[_WAN], _TINY)
    for name in ("SVG2", "plain"):
        run = partial(_steps, sizes, large, variants[name], steps=3)
        listed.append(Item(f"{_WAN}, {name}", run, 120, 60, repeats=True))
    return listed


def _of(sizes: Sizes) -> SVG2:
    """Return the settings of sparse attention."""
    if not sizes.dry:
        return _SPARSE
    return replace(_SPARSE, min_tokens=0, query_clusters=2, key_clusters=3, init_iters=1)


def _few_layers(model: RealModel) -> RealModel:
    """Return a model with few of its layers."""
    return replace(model, transformer={**model.transformer, "num_layers": _LAYERS})


def _made(sizes: Sizes, model: RealModel, steps: int) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline with random weights, and a call of so many steps."""
    device, dtype = sizes.device.name, sizes.dtype
    pipe = pipeline_of_model(model, device, dtype)
    return pipe, call_of_model(model, pipe, dtype) | {"num_inference_steps": steps}


def _steps(
    sizes: Sizes,
    model: RealModel,
    options: Mapping[str, Any] | None,
    *,
    compiled: bool = False,
    steps: int = _STEPS,
) -> dict[str, Any]:
    """Time the steps of a model, plain (None) or accelerated."""
    pipe, call = _made(sizes, model, steps)
    if options is not None:
        accelerate(pipe, **options)
    if compiled:
        # The dry run needs no compiler of C++.
        backend = sizes.of({}, {"backend": "eager"})
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **backend)
    found: list[float] = []
    peak = sizes.device.peak_bytes(lambda: found.extend(_seconds_of_steps(sizes, pipe, call)))
    told = None if options is None else report(pipe).to_dict()["transformers"][0]
    later = found[min(_SKIPPED, len(found) - 1) :]
    return {
        "layers": len(pipe.transformer.blocks),
        "steps_s": found,
        "seconds_per_step": statistics.fmean(later),
        "peak_bytes": peak,
        "weights_bytes": sum(x.numel() * x.element_size() for x in pipe.transformer.parameters()),
        "report": told,
    }


def _seconds_of_steps(sizes: Sizes, pipe: Any, call: dict[str, Any]) -> list[float]:
    """Return the seconds of each step of one generation, without decoding."""
    ends: list[float] = []

    def at_end(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        sizes.device.wait()
        ends.append(time.perf_counter())
        return kwargs

    started = time.perf_counter()
    latents_of(pipe, call | {"callback_on_step_end": at_end})
    return [end - before for before, end in zip([started, *ends], ends, strict=False)]


def _host(sizes: Sizes, model: RealModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Count launches and waits of the host in a step, plain and sparse."""
    pipe, call = _made(sizes, model, _STEPS)

    def in_a_step() -> tuple[int, int]:
        # What a generation does once cancels between one of two steps and one of three.
        counts = []
        for steps in (2, 3):
            latents_of(pipe, call | {"num_inference_steps": steps})
            short = partial(latents_of, pipe, call | {"num_inference_steps": steps})
            counts.append(sizes.device.counted(short))
        return counts[1].launches - counts[0].launches, counts[1].waits - counts[0].waits

    plain = in_a_step()
    accelerate(pipe, **options)
    sparse = in_a_step()
    restore(pipe)
    return {
        "plain_launches": plain[0],
        "plain_waits": plain[1],
        "launches": sparse[0],
        "waits": sparse[1],
    }


def _idle(sizes: Sizes, model: RealModel) -> dict[str, Any]:
    """Time steps in which nothing is skipped against plain ones, in turn."""
    pipe, call = _made(sizes, model, 4)
    times: dict[str, list[float]] = {"plain": [], "idle": []}
    _seconds_of_steps(sizes, pipe, call | {"num_inference_steps": 2})
    for _ in range(2):
        for name, found in times.items():
            if name == "idle":
                accelerate(pipe, policy=None, cache=None, attention=None)
            found += _seconds_of_steps(sizes, pipe, call)[1:]
            restore(pipe)
    plain, idle = (statistics.median(found) for found in times.values())
    return {"steps_s": times, "idle_cost": idle / plain - 1}


def _gate(sizes: Sizes, model: RealModel) -> dict[str, Any]:
    """Tell what attention="auto" decides for this model here, and by which times."""
    pipe, call = _made(sizes, model, _STEPS)
    accelerate(pipe, policy=None, attention="auto")
    seconds = _seconds_of_steps(sizes, pipe, call)
    return {"steps_s": seconds, "report": report(pipe).to_dict(), "told": str(report(pipe))}
