"""The threshold of DBCache that gives a wanted speedup or error, from recorded runs.

One run with every step computed keeps what the probe blocks gave at each step. From it follows,
for any threshold, which steps would be reused and so how many blocks would run, without running
anything again. What that does to the result is then measured end to end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from tqdm.auto import tqdm

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.clips.generate import latents_of
from vidaccel.dbcache import DBCache, Decider
from vidaccel.engine.engine import Engine
from vidaccel.engine.observer import Observer
from vidaccel.engine.state import CallContext
from vidaccel.engine.stats import StepKind
from vidaccel.errors import PlanError
from vidaccel.hosts.registry import find_transformers
from vidaccel.precision.change import refuse_low_precision

# Tokens of a probe residual that are kept of each step; more would not move a mean.
_TOKENS = 1024


@dataclass(frozen=True)
class Suggestion:
    """A threshold and what it does.

    Attributes:
        cache: the settings with that threshold.
        steps_computed: mean over the runs it was measured on.
        num_inference_steps: T.
        speedup: blocks without a cache over blocks with it, measured.
        error: mean absolute difference of the final latents from those of a run with every step
            computed, over their mean absolute value; measured.
    """

    cache: DBCache
    steps_computed: float
    num_inference_steps: int
    speedup: float
    error: float

    @property
    def threshold(self) -> float:
        """The threshold."""
        assert self.cache.threshold is not None
        return self.cache.threshold

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:.4g}: {self.steps_computed:.4g} of "
            f"{self.num_inference_steps} steps computed, {self.speedup:.2f}x fewer blocks, "
            f"latents off by {self.error:.2%}"
        )


def suggest_threshold(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    num_inference_steps: int,
    speedup: float | None = None,
    max_error: float | None = None,
    cache: DBCache | None = None,
    call_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Suggestion:
    """Find the threshold of a `DBCache` from recorded runs instead of guessing it.

    Args:
        pipe: a pipeline that `accelerate` takes. It is left without acceleration.
        prompts: one or a few; each is run once with every step computed, and again for each
            threshold that is tried: once for a speedup, about log2(T) times for an error.
        num_inference_steps: T.
        speedup: the lowest threshold that runs this many times fewer blocks.
        max_error: the highest threshold whose final latents are off by no more than this, as a
            fraction of their mean absolute value. Give one of the two.
        cache: the other settings; its threshold does not matter.
        call_kwargs: further arguments of the pipeline's call, such as the size.
        seed: seed of the noise.
        progress: show a bar.

    Returns:
        The threshold and what it was measured to do.

    Raises:
        PlanError: not one of the two wishes, or one that no threshold can fulfil.
        UnsupportedPipelineError: as `accelerate`.
    """
    cache = cache or DBCache()
    if (speedup is None) == (max_error is None):
        raise PlanError("give either speedup or max_error")
    if speedup is not None and not 1 < speedup < math.inf:
        raise PlanError(f"speedup is a number above 1, found {speedup!r}")
    if max_error is not None and not 0 < max_error < math.inf:
        raise PlanError(f"max_error is a number above 0, found {max_error!r}")
    if not cache.probe_blocks:
        raise PlanError("probe_blocks=0 leaves nothing to compare")
    call = {**(call_kwargs or {}), "num_inference_steps": num_inference_steps}
    samples = [prompts] if isinstance(prompts, str) else list(prompts)
    if not samples:
        raise PlanError("prompts: found none, expected at least one")
    refuse_low_precision(pipe, (model for model, _ in find_transformers(pipe).values()))

    with tqdm(total=len(samples), unit="run", disable=not progress) as bar:
        search = _ThresholdSearch(pipe, cache, call, samples, seed, bar)
        try:
            search.record()
            if speedup is not None:
                return search.measured(search.threshold_for(speedup))
            assert max_error is not None
            return search.largest_within(max_error)
        finally:
            restore(pipe)


class _ThresholdSearch:
    """The recorded runs of one search.

    Attributes:
        records: per prompt, one for each transformer.
        latents: per prompt, of the run with every step computed.
    """

    def __init__(
        self,
        pipe: Any,
        cache: DBCache,
        call: dict[str, Any],
        prompts: list[str],
        seed: int,
        bar: Any,
    ) -> None:
        self.pipe, self.cache, self.call, self.prompts = pipe, cache, call, prompts
        self.seed, self.bar = seed, bar
        self.records: list[list[_ProbeRecord]] = []
        self.latents: list[torch.Tensor] = []

    def record(self) -> None:
        """Run every prompt with every step computed and keep the probe residuals."""
        for prompt in self.prompts:
            # Warm-up would be refused where it is as long as the run, and decides nothing here.
            recording = replace(self.cache, threshold=0.0, warmup_steps=0)
            accelerate(self.pipe, policy=None, cache=recording)
            records = [_ProbeRecord(engine) for engine in engines_of(self.pipe).values()]
            self.latents.append(self._run(prompt))
            self.records.append([record for record in records if record.probes])

    def threshold_for(self, speedup: float) -> float:
        """The lowest threshold whose simulated runs have this many times fewer blocks."""
        best = 1.0
        for threshold in self._thresholds():
            found = self._simulated(threshold)
            if found >= speedup:
                return threshold
            best = max(best, found)
        raise PlanError(
            f"no threshold runs {speedup:g} times fewer blocks, {best:.2f} times is the most with "
            f"warmup_steps={self.cache.warmup_steps}, "
            f"max_consecutive={self.cache.max_consecutive}, "
            f"probe_blocks={self.cache.probe_blocks} and "
            f"corrector_blocks={self.cache.corrector_blocks}"
        )

    def largest_within(self, max_error: float) -> Suggestion:
        """The highest threshold within an error, by bisection over those that differ."""
        outcomes: dict[float, float] = {}  # simulated speedup -> the lowest threshold that has it
        for threshold in self._thresholds():
            outcomes.setdefault(self._simulated(threshold), threshold)
        outcomes.pop(1.0, None)
        different = sorted(outcomes.values())
        best, low, high = None, 0, len(different) - 1
        while low <= high:
            middle = (low + high) // 2
            found = self.measured(different[middle])
            if found.error <= max_error:
                best, low = found, middle + 1
            else:
                high = middle - 1
        if best is None:
            raise PlanError(
                f"no reused step keeps the latents within {max_error:g}: raise max_error, or use "
                "warmup_steps to keep the first steps"
            )
        return best

    def measured(self, threshold: float) -> Suggestion:
        """Run every prompt with a threshold."""
        cache = replace(self.cache, threshold=threshold)
        computed, whole, run, errors = 0, 0, 0, []
        self.bar.total += len(self.prompts)
        for prompt, reference in zip(self.prompts, self.latents, strict=True):
            accelerate(self.pipe, policy=None, cache=cache)
            latents = self._run(prompt)
            for engine in engines_of(self.pipe).values():
                computed += engine.stats.timeline().count(StepKind.COMPUTED)
                for totals in engine.stats.totals().values():
                    whole += (totals.computed + totals.reused) * engine.stats.blocks
                    run += totals.blocks_run
            off = (latents - reference).abs().mean() / reference.abs().mean()
            errors.append(float(off))
        ran = (engine.generation for engine in engines_of(self.pipe).values())
        steps = next(generation.run.num_inference_steps for generation in ran if generation)
        mean = computed / len(self.prompts)
        return Suggestion(cache, mean, steps, whole / run, fmean(errors))

    def _run(self, prompt: str) -> torch.Tensor:
        latents = latents_of(self.pipe, {**self.call, "prompt": prompt}, self.seed).float().cpu()
        self.bar.update()
        return latents

    def _thresholds(self) -> list[float]:
        """A threshold above each difference that a run can come to, in ascending order."""
        found = torch.cat([r.differences().flatten() for sample in self.records for r in sample])
        values = sorted(set(found[found.isfinite()].tolist()))
        # Halfway to the next one, so that a small change of the run changes no decision.
        return [*((a + b) / 2 for a, b in pairwise(values)), values[-1] * 1.01]

    def _simulated(self, threshold: float) -> float:
        """Blocks without a cache over blocks with it, the mean over prompts."""
        cache = replace(self.cache, threshold=threshold)
        return fmean(
            sum(r.blocks * len(r.probes) for r in records)
            / sum(r.blocks_run(cache) for r in records)
            for records in self.records
        )


class _ProbeRecord(Observer):
    """The probe residuals of one transformer in a run that computed every step.

    Attributes:
        blocks: that a computed step runs.
        probes: step -> probe residual of the branch that comes first, some of its tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self.blocks = engine.stats.blocks
        self.probes: dict[int, torch.Tensor] = {}
        self._differences: torch.Tensor | None = None
        engine.observer = self

    def after_probe(self, context: CallContext, residual: torch.Tensor) -> None:
        if context.step not in self.probes:
            stride = math.ceil(residual.shape[1] / _TOKENS)
            self.probes[context.step] = residual[:, ::stride].float().cpu().clone()

    def differences(self) -> torch.Tensor:
        """[n, n]: of the j-th step against the i-th, i < j; NaN elsewhere."""
        if self._differences is None:
            probes = list(self.probes.values())
            found = torch.full((len(probes), len(probes)), math.nan, dtype=torch.float64)
            for i, last in enumerate(probes):
                size = last.abs().mean()
                for j in range(i + 1, len(probes)):
                    found[i, j] = (last - probes[j]).abs().mean() / size
            self._differences = found
        return self._differences

    def blocks_run(self, cache: DBCache) -> int:
        """Blocks that a run with these settings would run."""
        found, decider, total = self.differences(), Decider(cache), 0
        last = None
        for now, step in enumerate(self.probes):
            difference = math.nan if last is None else float(found[last, now])
            reason = decider.before_probe(step) or decider.after_probe(difference)
            decider.record(step, reason, difference)
            if reason:
                last = now
            total += self.blocks if reason else cache.probe_blocks + cache.corrector_blocks
        return total
