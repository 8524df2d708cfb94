"""DBCache beside that of cache-dit with equal settings: the same steps reused, the same result.

Where the two part on purpose, the case is run all the same and listed with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.bench.baselines import BASELINES, BaselineSetting
from vidaccel.bench.parity_cases import Case, differences, sweep
from vidaccel.clips.generate import latents_of
from vidaccel.environment import environment
from vidaccel.errors import PlanError, UnsupportedPipelineError
from vidaccel.hosts.registry import find_transformers

# Relative difference of the latents that rounding explains: forecasts sum the same residuals in
# another order, and every step adds to what those before it left.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """The result of one of the two on a case: the one or the other.

    Attributes:
        reused: the reused steps of each branch.
        refused: the reason why it does not run.
    """

    reused: list[list[int]] | None = None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the one that there is."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.reused is None:
            return f"refused: {self.refused}"
        branches = [",".join(map(str, steps)) or "none" for steps in self.reused]
        return f"reused {' / '.join(branches)}"


@dataclass(frozen=True)
class ParityRow:
    """Both on one case.

    Attributes:
        name: the settings that are not the defaults.
        setting: settings in the words of vidaccel.
        cache_dit_setting: the same in the words of cache-dit.
        call: arguments of the pipeline's call that are not those of the sweep.
        shift: shift of the scheduler; None for the pipeline's own.
        why: the reason why the two part here; "" where they must agree.
        cache_dit, vidaccel: the outcomes.
        same_steps: both reused the same steps.
        difference: largest difference of the latents relative to their largest value; None where
            one refused.
    """

    name: str
    setting: dict[str, Any]
    cache_dit_setting: BaselineSetting
    call: dict[str, Any]
    shift: float | None
    why: str
    cache_dit: Outcome
    vidaccel: Outcome
    same_steps: bool
    difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a result file keeps it."""
        outcomes = {"cache_dit": self.cache_dit.to_dict(), "vidaccel": self.vidaccel.to_dict()}
        return asdict(self) | outcomes


@dataclass(frozen=True)
class ParitySummary:
    """Counts over the cases.

    Attributes:
        cases: number of those in which both must agree.
        same_steps: number of those that reuse the same steps.
        same_latents: number of those that also give the same latents.
        largest_difference: largest of their differences; None where there are none.
        tolerance: difference up to which latents are the same.
        part: number of the cases in which the two part.
    """

    cases: int
    same_steps: int
    same_latents: int
    largest_difference: float | None
    tolerance: float
    part: int


@dataclass(frozen=True)
class ParityResult:
    """The result of `parity`.

    Attributes:
        summary: counts.
        agree: the cases in which both must agree.
        part: the cases in which the two part.
        settings: arguments of the run.
        environment: hardware and versions.
    """

    summary: ParitySummary
    agree: list[ParityRow]
    part: list[ParityRow]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        rows = {name: [row.to_dict() for row in getattr(self, name)] for name in ("agree", "part")}
        return asdict(self) | rows


def parity(
    pipe: Any,
    call: dict[str, Any],
    cases: Sequence[Case] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> ParityResult:
    """Run both on every case.

    Args:
        pipe: a pipeline with one transformer that both take, with sequential guidance; it is left
            as it is.
        call: arguments of its call.
        cases: None for `sweep` and `differences`.
        seed: seed of the noise.
        progress: show a bar.

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
    agree: list[ParityRow] = []
    part: list[ParityRow] = []
    for case in tqdm(cases, unit="case", disable=not progress):
        with _scheduler(pipe, case.shift):
            compared = _compared(pipe, {**call, **case.call}, case, seed)
        (part if case.why else agree).append(compared)
    shown = {name: v for name, v in call.items() if not isinstance(v, torch.Tensor)}
    return ParityResult(
        _summary(agree, part),
        agree,
        part,
        {
            **shown,
            "output_type": "latent",
            "seed": seed,
            "dtype": str(pipe.dtype),
            "device": str(pipe.device),
        },
        environment(),
    )


def _summary(agree: Sequence[ParityRow], part: Sequence[ParityRow]) -> ParitySummary:
    """Count the cases."""
    same = [row for row in agree if row.same_steps]
    found = [row.difference for row in same if row.difference is not None]
    return ParitySummary(
        cases=len(agree),
        same_steps=len(same),
        same_latents=sum(difference <= TOLERANCE for difference in found),
        largest_difference=max(found, default=None),
        tolerance=TOLERANCE,
        part=len(part),
    )


def parity_table(result: ParityResult) -> str:
    """Return the result of `parity` for people."""
    summary = result.summary
    largest = summary.largest_difference
    lines = [
        f"{summary.same_steps} of {summary.cases} cases reuse the same steps, "
        f"{summary.same_latents} of them give the same latents within {summary.tolerance:g}"
        + (f" (largest difference {largest:.2g})" if largest is not None else ""),
        "",
        "reused   difference  setting",
    ]
    for row in result.agree:
        reused = sum(map(len, row.vidaccel.reused or []))
        difference = "-" if row.difference is None else f"{row.difference:.2g}"
        mark = "" if row.same_steps else "  NOT THE SAME STEPS"
        lines.append(f"{reused:6d}   {difference:>10s}  {row.name}{mark}")
    lines += ["", "where they part:"]
    for row in result.part:
        lines += [
            f"{row.name}: {row.why}",
            f"  cache-dit  {row.cache_dit}",
            f"  vidaccel   {row.vidaccel}",
        ]
    return "\n".join(lines)


def _compared(pipe: Any, call: dict[str, Any], case: Case, seed: int) -> ParityRow:
    """Run both on one case."""

    def latents() -> torch.Tensor:
        return latents_of(pipe, call, seed)

    theirs, their_outcome = _outcome(lambda: _with_cache_dit(pipe, case, latents))
    ours, our_outcome = _outcome(lambda: _with_vidaccel(pipe, case, latents))
    restore(pipe)
    difference = None
    if theirs is not None and ours is not None:
        difference = float((theirs - ours).abs().max() / theirs.abs().max())
    return ParityRow(
        name=case.name,
        setting={name: value for name, value in vars(case.cache).items() if value is not None},
        cache_dit_setting=case.for_cache_dit(),
        call=case.call,
        shift=case.shift,
        why=case.why,
        cache_dit=their_outcome,
        vidaccel=our_outcome,
        same_steps=their_outcome == our_outcome and our_outcome.reused is not None,
        difference=difference,
    )


LatentsAndSteps = tuple[torch.Tensor, list[list[int]]]


def _outcome(run: Callable[[], LatentsAndSteps]) -> tuple[torch.Tensor | None, Outcome]:
    """Run one of the two; return its latents, if it runs, and its outcome."""
    try:
        latents, reused = run()
    # cache-dit refuses with bare assertions.
    except (PlanError, AssertionError) as error:
        return None, Outcome(refused=str(error) or type(error).__name__)
    return latents, Outcome(reused=reused)


def _with_cache_dit(pipe: Any, case: Case, latents: Callable[[], torch.Tensor]) -> LatentsAndSteps:
    (transformer, _), *_ = find_transformers(pipe).values()
    with BASELINES["cache-dit"].enabled(pipe, case.for_cache_dit()):
        result = latents()
        return result, [list(transformer._cached_steps), list(transformer._cfg_cached_steps)]


def _with_vidaccel(pipe: Any, case: Case, latents: Callable[[], torch.Tensor]) -> LatentsAndSteps:
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
    """Put a scheduler with another shift in the place of the pipeline's, while open."""
    previous = pipe.scheduler
    if shift is not None:
        pipe.scheduler = type(previous).from_config(previous.config, shift=shift)
    try:
        yield
    finally:
        pipe.scheduler = previous
