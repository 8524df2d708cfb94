"""DBCache beside that of cache-dit with equal settings: the same steps reused, the same result.

Where the two part on purpose, the case is run all the same and listed with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.bench.baselines import BASELINES, BaselineSetting
from vidaccel.clips.generate import without_bar
from vidaccel.dbcache import DBCache
from vidaccel.environment import environment
from vidaccel.errors import PlanError, UnsupportedPipelineError
from vidaccel.hosts.registry import find_transformers

THRESHOLDS = (0.0, 0.04, 0.07, 0.1, 0.15, 0.2, 0.4)
LAYOUTS = ((1, 0), (1, 1), (2, 2))  # probe and corrector blocks
# Relative difference of the latents that rounding explains: forecasts sum the same residuals in
# another order, and every step adds to what those before it left.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One setting for both.

    Attributes:
        cache: for vidaccel.
        call: arguments of the pipeline's call that are not those of the sweep.
        shift: of a scheduler that takes the place of the pipeline's; None to leave that.
        why: why the two part here; "" where they must agree.
    """

    cache: DBCache
    call: dict[str, Any] = field(default_factory=dict)
    shift: float | None = None
    why: str = ""

    def for_cache_dit(self) -> BaselineSetting:
        """The same setting in the words of cache-dit."""
        cache = self.cache

        def limit(value: int | None) -> int:
            return -1 if value is None else value

        return {
            "Fn_compute_blocks": cache.probe_blocks,
            "Bn_compute_blocks": cache.corrector_blocks,
            "residual_diff_threshold": cache.threshold,
            "max_warmup_steps": cache.warmup_steps,
            "warmup_interval": cache.warmup_interval,
            "max_cached_steps": limit(cache.max_cached),
            "max_continuous_cached_steps": limit(cache.max_consecutive),
            "max_accumulated_residual_diff_threshold": cache.max_accumulated,
            "taylorseer_order": cache.forecast_order,
        }


def sweep(thresholds: Sequence[float] = THRESHOLDS) -> list[Case]:
    """The cases in which both must agree."""
    cases = [
        Case(_separate(threshold=t, probe_blocks=probe, corrector_blocks=corrector, **forecast))
        for (probe, corrector), forecast, t in product(
            LAYOUTS, ({"forecast_order": 0}, {"forecast_order": 1}), thresholds
        )
    ]
    limits = ({"max_consecutive": 2}, {"max_cached": 5}, {"warmup_steps": 6, "warmup_interval": 2})
    return cases + [Case(_separate(threshold=0.2, **limit)) for limit in limits]


def differences(blocks: int) -> list[Case]:
    """Cases in which the two part, and why.

    Args:
        blocks: of the transformer.
    """
    return [
        Case(
            _separate(threshold=0.2, max_accumulated=0.3),
            why="cache-dit adds up the differences of computed steps too and never starts anew, "
            "so that after the limit nothing is reused any more; vidaccel adds up those of the "
            "reused steps since the last computed one",
        ),
        Case(
            _separate(threshold=0.1),
            call={"guidance_scale": 1.0},
            why="without guidance there is one call per step; cache-dit still takes every other "
            "call for the second branch and compares steps that do not follow each other",
        ),
        Case(
            _separate(threshold=0.2, warmup_steps=1, forecast_order=1),
            why="cache-dit draws no line before its fourth step, and holds until then",
        ),
        Case(
            _separate(threshold=0.15, forecast_order=2),
            why="cache-dit's second order is a Taylor series with backward differences in the "
            "place of derivatives, which is not the parabola through the last three steps",
        ),
        Case(
            _separate(threshold=0.15, forecast_order=1),
            shift=7.0,
            why="cache-dit extends the line over the number of the step, vidaccel over the noise "
            "level; on a shifted schedule these are not proportional",
        ),
        Case(
            _separate(
                threshold=0.0,
                probe_blocks=blocks // 2 + 1,
                corrector_blocks=blocks // 2 + 1,
            ),
            why="more probe and corrector blocks than there are: cache-dit runs those in both "
            "twice and gives another result although nothing is reused; vidaccel refuses",
        ),
    ]


def parity(
    pipe: Any,
    call: dict[str, Any],
    cases: Sequence[Case] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Run both on every case.

    Args:
        pipe: a pipeline with one transformer that both take, with sequential guidance; it is left
            as it is.
        call: arguments of its call.
        cases: None for `sweep` and `differences`.
        seed: of the noise.
        progress: show a bar.

    Returns:
        "summary" (cases that must agree, how many reuse the same steps, how many also give the
        same latents, and their largest relative difference), "agree" and "part": a row per case
        with both settings, the reused steps of each branch, and the difference of the latents
        relative to their largest value; "settings" and "environment".

    Raises:
        UnsupportedPipelineError: cache-dit is not installed, or there is more than one transformer.
    """
    row = BASELINES["cache-dit"]
    if row.unavailable is not None:
        raise UnsupportedPipelineError(row.unavailable)
    found = find_transformers(pipe)
    if len(found) != 1:
        raise UnsupportedPipelineError(f"expected one transformer, found {', '.join(found)}")
    (transformer, host), *_ = found.values()
    if cases is None:
        blocks = sum(len(getattr(transformer, blocks.name)) for blocks in host.blocks)
        cases = [*sweep(), *differences(blocks)]
    call = {**call, "output_type": "latent"}
    shown = {name: v for name, v in call.items() if not isinstance(v, torch.Tensor)}
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    with without_bar(pipe):
        for case in tqdm(cases, unit="case", disable=not progress):
            with _scheduler(pipe, case.shift):
                rows[not case.why].append(_compared(pipe, {**call, **case.call}, case, seed))
    agree = rows[True]
    same = [r for r in agree if r["same_steps"]]
    return {
        "summary": {
            "cases": len(agree),
            "same_steps": len(same),
            "same_latents": sum(r["difference"] <= TOLERANCE for r in same),
            "largest_difference": max((r["difference"] for r in same), default=None),
            "tolerance": TOLERANCE,
            "part": len(rows[False]),
        },
        "agree": agree,
        "part": rows[False],
        "settings": {**shown, "seed": seed, "dtype": str(pipe.dtype), "device": str(pipe.device)},
        "environment": environment(),
    }


def parity_table(result: dict[str, Any]) -> str:
    """The result of `parity` for people."""
    summary = result["summary"]
    largest = summary["largest_difference"]
    lines = [
        f"{summary['same_steps']} of {summary['cases']} cases reuse the same steps, "
        f"{summary['same_latents']} of them give the same latents within {summary['tolerance']:g}"
        + (f" (largest difference {largest:.2g})" if largest is not None else ""),
        "",
        "reused   difference  setting",
    ]
    for row in result["agree"]:
        reused = sum(map(len, row["vidaccel"]["reused"]))
        mark = "" if row["same_steps"] else "  NOT THE SAME STEPS"
        lines.append(f"{reused:6d}   {row['difference']:10.2g}  {row['name']}{mark}")
    lines += ["", "where they part:"]
    for row in result["part"]:
        lines += [
            f"{row['name']}: {row['why']}",
            f"  cache-dit  {_outcome(row['cache_dit'])}",
            f"  vidaccel   {_outcome(row['vidaccel'])}",
        ]
    return "\n".join(lines)


def _outcome(side: dict[str, Any]) -> str:
    if "refused" in side:
        return f"refused: {side['refused']}"
    branches = [",".join(map(str, steps)) or "none" for steps in side["reused"]]
    return f"reused {' / '.join(branches)}"


def _separate(**settings: Any) -> DBCache:
    """With decisions per branch and without a limit of consecutive steps, as cache-dit starts."""
    return DBCache(branches="separate", **{"max_consecutive": None, **settings})


def _compared(pipe: Any, call: dict[str, Any], case: Case, seed: int) -> dict[str, Any]:
    def latents() -> torch.Tensor:
        return pipe(generator=torch.Generator("cpu").manual_seed(seed), **call).frames

    theirs, their_side = _side(lambda: _with_cache_dit(pipe, case, latents))
    ours, our_side = _side(lambda: _with_vidaccel(pipe, case, latents))
    restore(pipe)
    difference = None
    if theirs is not None and ours is not None:
        difference = float((theirs - ours).abs().max() / theirs.abs().max())
    return {
        "name": _named(case),
        "setting": {k: v for k, v in vars(case.cache).items() if v is not None},
        "cache_dit_setting": case.for_cache_dit(),
        "call": case.call,
        "shift": case.shift,
        "why": case.why,
        "cache_dit": their_side,
        "vidaccel": our_side,
        "same_steps": their_side == our_side and "reused" in our_side,
        "difference": difference,
    }


def _named(case: Case) -> str:
    default, cache = vars(_separate()), vars(case.cache)
    shown = {
        name: value
        for name, value in {**cache, **case.call, "shift": case.shift}.items()
        if value is not None and value != default.get(name, None)
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults"


Result = tuple[torch.Tensor, list[list[int]]]


def _side(run: Callable[[], Result]) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """What one of the two gives: latents and reused steps, or why it refuses."""
    try:
        latents, reused = run()
    # cache-dit refuses with bare assertions.
    except (PlanError, AssertionError) as error:
        return None, {"refused": str(error) or type(error).__name__}
    return latents, {"reused": reused}


def _with_cache_dit(pipe: Any, case: Case, latents: Callable[[], torch.Tensor]) -> Result:
    (transformer, _), *_ = find_transformers(pipe).values()
    with BASELINES["cache-dit"].enabled(pipe, case.for_cache_dit()):
        result = latents()
        return result, [list(transformer._cached_steps), list(transformer._cfg_cached_steps)]


def _with_vidaccel(pipe: Any, case: Case, latents: Callable[[], torch.Tensor]) -> Result:
    accelerate(pipe, policy=None, cache=case.cache, attention=None)
    result = latents()
    (engine,) = engines_of(pipe).values()
    reused: dict[str, list[int]] = {"cond": [], "uncond": []}
    for call in engine.stats.calls:
        if call.reused:
            reused.setdefault(call.branch, []).append(call.step)
    return result, list(reused.values())


@contextmanager
def _scheduler(pipe: Any, shift: float | None) -> Iterator[None]:
    """A scheduler with another shift in the place of the pipeline's, while open."""
    previous = pipe.scheduler
    if shift is not None:
        pipe.scheduler = type(previous).from_config(previous.config, shift=shift)
    try:
        yield
    finally:
        pipe.scheduler = previous
