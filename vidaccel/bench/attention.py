"""What sparse attention costs in quality: PSNR against density, and recall by layer.

SVG2 is compared with two ways to be as sparse without it: blocks of neighbouring tokens instead of
clusters, and clusters that are picked at random instead of by their attention mass.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.clips.generate import generate
from vidaccel.clips.metrics import psnr
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.files import write_text
from vidaccel.kernels import reference
from vidaccel.kernels.semantic_attention import (
    Clustering,
    SemanticConfig,
    SemanticState,
    semantic_attention,
)
from vidaccel.svg2.settings import SVG2

# As many clusters as leave a few tokens in each at the size of the embedded model.
BASE = SVG2(
    min_tokens=0,
    dense_layers=0,
    query_clusters=24,
    key_clusters=64,
    min_ratio=0.05,
    mass_averaging=False,
    compensation=False,
    query_metric=False,
)

PROMPTS = (
    "a magenta striped square moving down on a charcoal checkered background",
    "a red dotted circle moving right on a navy striped background",
)


def fixed_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int],
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """In the place of `semantic_attention`: runs of neighbouring tokens as the clusters."""
    scale = config.scale or q.shape[3] ** -0.5
    sides = []
    for x, count in ((q, config.query_clusters), (k, config.key_clusters)):
        place = torch.arange(x.shape[2], device=x.device, dtype=torch.int32)
        labels = (place * count // x.shape[2]).expand(*x.shape[:3]).contiguous()
        means = reference.cluster_means(x, labels, count)
        sides.append(Clustering(means, labels, *reference.sort_by_label(labels, count)))
    state.query, state.key = sides
    state.selection = reference.select_top_p(
        state.query.centroids,
        state.key.centroids,
        state.key.counts,
        scale=scale,
        top_p=config.top_p,
        min_ratio=config.min_ratio,
    )
    return _attend(q, k, v, state, scale)


def random_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SemanticState,
    config: SemanticConfig,
    *,
    video: tuple[int, int],
    text_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """In the place of `semantic_attention`: its clusters, as many of them, but drawn blindly."""
    semantic_attention(q, k, v, state, config, video=video)
    mask = state.selection.mask()
    draw = torch.rand(mask.shape, generator=torch.Generator().manual_seed(state.calls))
    rank = draw.to(mask.device).argsort(-1).argsort(-1)
    mask = rank < mask.sum(-1, keepdim=True)
    state.selection = reference.selection_from_mask(mask, state.key.counts)
    return _attend(q, k, v, state, config.scale or q.shape[3] ** -0.5)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: SemanticState, scale: float
) -> torch.Tensor:
    return reference.block_sparse_attention(
        q,
        reference.permute(k, state.key.order),
        reference.permute(v, state.key.order),
        state.query.offsets,
        state.key.offsets,
        state.selection,
        scale=scale,
        q_order=state.query.order,
    )[0]


class Method(NamedTuple):
    """One way to make attention sparse.

    Attributes:
        settings: but for top_p.
        attend: what computes the attention.
        planned: steps are skipped too, and clips compared with dense ones of the same steps.
    """

    settings: SVG2
    attend: Callable[..., torch.Tensor] = semantic_attention
    planned: bool = False


BETTER = replace(BASE, mass_averaging=True, compensation=True)

# What is measured over every density.
METHODS = {
    "svg2": Method(BASE),
    "mass averaging": Method(replace(BASE, mass_averaging=True)),
    "compensation": Method(replace(BASE, compensation=True)),
    "query metric": Method(replace(BASE, query_metric=True)),
    "averaging, compensation": Method(BETTER),
    "all three": Method(replace(BETTER, query_metric=True)),
    "int8 QK": Method(replace(BASE, int8_qk=True)),
    "averaging, compensation, int8 QK": Method(replace(BETTER, int8_qk=True)),
    "with a plan": Method(BETTER, planned=True),
    "with a plan, refresh at 0.95": Method(replace(BETTER, refresh_top_p=0.95), planned=True),
    "fixed blocks": Method(BASE, fixed_blocks),
    "random": Method(BASE, random_clusters),
}

# What is measured at one top_p: one change of the settings each.
CHANGES: dict[str, dict[str, Any]] = {
    "as they are": {},
    "no k-means after the first": {"kmeans_iters": 0},
    "1 k-means iteration": {"kmeans_iters": 1},
    "5 k-means iterations": {"kmeans_iters": 5},
    "50 first iterations": {"init_iters": 50},
    "cluster while dense": {"cluster_while_dense": True},
    "cluster every 2nd": {"recluster_every": 2},
    "cluster every 4th": {"recluster_every": 4},
    "cluster and select every 2nd": {"recluster_every": 2, "reselect_every": 2},
    "cluster and select every 4th": {"recluster_every": 4, "reselect_every": 4},
    "12 query clusters": {"query_clusters": 12},
    "48 query clusters": {"query_clusters": 48},
    "32 key clusters": {"key_clusters": 32},
    "128 key clusters": {"key_clusters": 128},
    "no dense steps": {"dense_steps": 0},
    "dense first layer": {"dense_layers": 1},
}


def attention(
    pipe: Any,
    call: dict[str, Any],
    *,
    prompts: Sequence[str] = PROMPTS,
    top_ps: Sequence[float] = (0.5, 0.7, 0.9),
    methods: Sequence[str] | None = None,
    changes_at: float | None = 0.7,
    partial: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure PSNR against the dense clip for each method and top_p.

    Args:
        pipe: a pipeline that `accelerate` takes; it is left without acceleration.
        call: its arguments, but for the prompt.
        prompts: each makes one clip, with its place in the list as the seed.
        top_ps: where every method is measured.
        methods: names of METHODS; all of them if left out.
        changes_at: top_p at which single changes of the settings are measured, on the first
            prompt only; None measures none.
        partial: a file that keeps what is measured, so that a run that was stopped goes on.

    Returns:
        "settings", "points" (a dict each: method, its settings, psnr in dB on average, of each
        prompt and of the worst, density of the sparse calls and of all, recall, both also by
        layer; of scores in 8 bits also the PSNR against the same in full) and "environment".

    Raises:
        BenchError: there is no prompt, no top_p, or no method of that name.
    """
    if not prompts or not top_ps:
        raise BenchError("bench attention needs at least one prompt and one top_p")
    chosen = tuple(METHODS) if methods is None else tuple(dict.fromkeys(methods))
    if not chosen or (unknown := [name for name in chosen if name not in METHODS]):
        wrong = f"there is no method {unknown[0]!r}" if chosen else "there is no method"
        raise BenchError(f"{wrong}; known are {'; '.join(METHODS)}")
    runs = [
        (name, method._replace(settings=replace(method.settings, top_p=top_p, recall_rows=32)))
        for name, method in ((name, METHODS[name]) for name in chosen)
        for top_p in top_ps
    ]
    changed = [
        (name, Method(replace(BASE, top_p=changes_at, **change)))
        for name, change in CHANGES.items()
        if changes_at is not None
    ]
    done = json.loads(partial.read_text()) if partial is not None and partial.exists() else {}
    units = [(seed, prompt, *run) for seed, prompt in enumerate(prompts) for run in runs]
    units += [(0, prompts[0], *run) for run in changed]
    plain: dict[tuple[int, bool], Any] = {}
    found: dict[tuple[str, SVG2], list[dict[str, Any]]] = {}
    for seed, prompt, name, method in tqdm(units, unit="clip", disable=not progress):
        key = f"{prompt}: {name}: {json.dumps(asdict(method.settings))}"
        if key not in done:
            if (seed, method.planned) not in plain:
                clip, _ = _made(pipe, call, prompt, seed, None, method)
                plain[seed, method.planned] = clip
            done[key] = _measure(pipe, call, prompt, seed, plain[seed, method.planned], method)
            if partial is not None:
                write_text(partial, json.dumps(done))
        found.setdefault((name, method.settings), []).append(done[key])
    restore(pipe)
    return {
        "settings": {
            **call,
            "prompts": list(prompts),
            "changes_at": changes_at,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        "points": [
            {"method": name, "settings": asdict(method.settings)}
            | _averaged(found[name, method.settings])
            for name, method in runs + changed
        ],
        "environment": environment(),
    }


def _measure(
    pipe: Any, call: dict[str, Any], prompt: str, seed: int, plain: Any, method: Method
) -> dict[str, Any]:
    """One clip of one prompt."""
    unrounded = None
    if method.settings.int8_qk:
        full = replace(method.settings, int8_qk=False, recall_rows=0)
        unrounded, _ = _made(pipe, call, prompt, seed, full, method)
    clip, sparse = _made(pipe, call, prompt, seed, method.settings, method)
    found = asdict(sparse.report())
    names = ("density", "density_with_dense", "recall")
    empty = ("empty_query_clusters", "empty_key_clusters")
    return {
        "psnr": psnr(plain, clip),
        "psnr_without_int8": None if unrounded is None else psnr(unrounded, clip),
        **{name: found[name] for name in (*names, *empty)},
        "density_of_layers": [values["density"] for values in found["layers"].values()],
        "recall_of_layers": [values["recall"] for values in found["layers"].values()],
    }


def _made(
    pipe: Any,
    call: dict[str, Any],
    prompt: str,
    seed: int,
    settings: SVG2 | None,
    method: Method,
) -> tuple[Any, Any]:
    """A clip, and what made its attention sparse; `settings` None leaves it dense."""
    steps = int(call["num_inference_steps"])
    # Some computed steps in a row, which no cache keeps, and some that are used again.
    computed = [s for s in range(steps) if s < steps // 2 or s % 2 == 0]
    accelerate(pipe, policy=computed if method.planned else None, cache=None, attention=settings)
    sparse = next(iter(engines_of(pipe).values())).attention
    if settings is not None:
        sparse.method = method.attend
    asked = {**call, "prompt": prompt}
    return generate(pipe, asked, seed=seed, progress=False).frames, sparse


def _averaged(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the prompts, each prompt's PSNR, and the worst one."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values, strict=True)]
        return None if values[0] is None else statistics.fmean(values)

    means = {name: mean([clip[name] for clip in clips]) for name in clips[0]}
    each = [clip["psnr"] for clip in clips]
    return means | {"psnr_of_prompts": each, "psnr_of_worst_prompt": min(each)}


def attention_table(result: dict[str, Any]) -> str:
    """The result of `attention` for people."""
    lines = [f"{'method':32s}  top_p  density  recall   PSNR  worst  prompts"]
    for point in result["points"]:
        recall = "-" if point["recall"] is None else f"{point['recall']:.1%}"
        lines.append(
            f"{point['method']:32s}  {point['settings']['top_p']:5.2f}  {point['density']:7.1%}  "
            f"{recall:>6s}  {point['psnr']:5.2f}  {point['psnr_of_worst_prompt']:5.2f}  "
            f"{len(point['psnr_of_prompts']):7d}"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """PSNR against density of every method, and the recall of the layers at the highest top_p.

    Lines show the mean over the prompts; where there are several, a thin line leads down to the
    worst one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in METHODS:
        points = [point for point in result["points"] if point["method"] == name]
        if not points:
            continue
        points.sort(key=lambda point: point["density"])
        densities = [point["density"] for point in points]
        (line,) = left.plot(densities, [p["psnr"] for p in points], marker="o", label=name)
        for point in points:
            worst = [point["psnr"], point["psnr_of_worst_prompt"]]
            left.plot([point["density"]] * 2, worst, color=line.get_color(), linewidth=0.8)
        right.plot(points[-1]["recall_of_layers"], marker="o", label=f"{densities[-1]:.0%} {name}")
    left.set(xlabel="density of sparse calls", ylabel="PSNR against dense attention (dB)")
    right.set(xlabel="layer", ylabel="recall of attention mass", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
