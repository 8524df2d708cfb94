"""Measures what reusing each segment of a generation costs, on any pipeline the engine supports.

The error of a segment i -> j is the outcome error of LeMiCa (arXiv 2511.00090, section 3): the
mean absolute difference of the final latents between a run in which only the steps between i and
j are reused and one in which every step is computed, with the same prompt and noise.

- `exact` runs the pipeline again for every segment, from step i on: T - i forwards each.
- `gain` measures how far each segment moves the latents of step j, which costs only the embedding
  and head of the reused steps, and multiplies it with how much a deviation at j grows until the
  end, which a few exact segments tell (interpolated log-linearly over j).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.errors import PlanError
from vidaccel.plan import Plan
from vidaccel.tape import Tape

Metric = Callable[[torch.Tensor, torch.Tensor], float]

# Every how many steps the gain is measured.
GAIN_INTERVAL = 4


def l1(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """Mean absolute difference of two tensors of one shape."""
    return float((latents.float() - reference.float()).abs().mean())


def segments(steps: int, max_skip: int) -> Iterator[tuple[int, int]]:
    """The segments (i, j) that reuse at least one step, in order; j = T reuses to the end.

    Args:
        steps: T.
        max_skip: the longest segment, j - i.
    """
    for start in range(steps - 1):
        for end in range(start + 2, min(start + max_skip, steps) + 1):
            yield start, end


@dataclass(frozen=True)
class Reference:
    """One generation with every step computed.

    Attributes:
        tape: what the transformers gave at each step.
        latents: what came out.
        inputs: the latents that went into each step, in host memory.
        switch: first step of the second transformer of a pipeline that has two, which no segment
            may cross; None with one.
    """

    tape: Tape
    latents: torch.Tensor
    inputs: dict[int, torch.Tensor]
    switch: int | None


class Replayer:
    """Runs one sample of a pipeline again and again, each time with another segment reused.

    Use it as a context manager: the pipeline is left without acceleration.

    Args:
        pipe: a pipeline that `accelerate` takes.
        call: arguments of its call, with the prompt and `num_inference_steps`.
        seed: of the noise.
        metric: compares the latents of a run with those of the reference.

    Attributes:
        reference: the run in which every step is computed.
        setting: what the runs are like, for a policy.
        forwards: steps that were computed so far.

    Raises:
        PlanError: fewer than 3 steps, or a run that starts inside its schedule.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], seed: int = 0, metric: Metric = l1) -> None:
        self.steps = int(call["num_inference_steps"])
        if self.steps < 3:
            raise PlanError(f"calibration needs 3 steps or more, found {self.steps}")
        self.pipe, self.call, self.seed, self.metric = pipe, call, seed, metric
        self.forwards = 0
        try:
            self.reference = self._record()
        except BaseException:
            restore(pipe)
            raise
        self.setting = next(iter(engines_of(pipe).values())).setting

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *_: Any) -> None:
        restore(self.pipe)

    def allowed(self, start: int, end: int) -> bool:
        """Whether the segment stays on one side of the switch between two transformers."""
        switch = self.reference.switch
        return switch is None or not start < switch < end

    def noise_floor(self) -> float:
        """The error of a run that reuses nothing but goes on from the middle of the reference."""
        return self.error_of(Plan.every(1, self.steps), self.steps // 2)

    def error(self, start: int, end: int) -> float:
        """The outcome error of the segment start -> end; `end` = T reuses to the end."""
        return self.error_of(self._plan(start, end), start)

    def error_of(self, plan: Plan, play_until: int = 0) -> float:
        """The outcome error of any plan; its first `play_until` steps must all be computed."""
        return self.metric(self.reference.latents, self._run(plan, play_until))

    def deviations(self, start: int, max_skip: int) -> dict[int, float]:
        """How far reusing from `start` on moves the latents that go into each later step.

        Returns:
            end -> mean absolute difference of the latents of step `end` (T: of the outcome), for
            the segments start -> end up to `max_skip` long.
        """
        last = min(start + max_skip, self.steps)
        found: dict[int, float] = {}

        def look(step: int, sample: torch.Tensor) -> None:
            if step > start + 1:
                found[step] = l1(self.reference.inputs[step], sample.cpu())
            if step == last:
                raise _Enough

        try:
            latents = self._run(self._plan(start, last), start, look)
        except _Enough:
            return found
        found[self.steps] = l1(self.reference.latents, latents)
        return found

    def _plan(self, start: int, end: int) -> Plan:
        computed = [step for step in range(self.steps) if not start < step < end]
        return Plan(tuple(computed), self.steps)

    def _record(self) -> Reference:
        inputs: dict[int, torch.Tensor] = {}

        def look(step: int, sample: torch.Tensor) -> None:
            inputs[step] = sample.cpu().clone()

        tape = Tape()
        latents = self._run(Plan.every(1, self.steps), 0, look, tape)
        tape.recording = False
        if sorted(inputs) != list(range(self.steps)):
            raise PlanError(
                f"this run computes steps {min(inputs)} to {max(inputs)} of {self.steps}; "
                "calibration needs one that goes through its whole schedule"
            )
        _, *others = engines_of(self.pipe).values()
        switch = [engine.ledger.calls[0].step for engine in others if engine.ledger.calls]
        return Reference(tape, latents, inputs, switch[0] if switch else None)

    def _run(
        self,
        plan: Plan,
        play_until: int,
        look: Callable[[int, torch.Tensor], None] | None = None,
        tape: Tape | None = None,
    ) -> torch.Tensor:
        """The latents of a run; `look` sees the input of each step's first call."""
        accelerate(self.pipe, policy=plan)
        tape = tape or self.reference.tape
        tape.play_until = play_until
        seen: set[int] = set()
        handles = []
        engines = list(engines_of(self.pipe).values())
        for engine in engines:
            engine.tape = tape

            def before(
                module: Any, args: Any, kwargs: dict[str, Any], engine: Any = engine
            ) -> None:
                if look is not None and engine.step not in seen:
                    seen.add(engine.step)
                    look(engine.step, kwargs[engine.host.sample])

            hook = engine.transformer.register_forward_pre_hook(before, with_kwargs=True)
            handles.append(hook)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        call = {**self.call, "generator": generator, "output_type": "latent"}
        try:
            return self.pipe(**call).frames
        finally:
            for handle in handles:
                handle.remove()
            # Both branches of a step count as one forward.
            self.forwards += sum(
                len({c.step for c in engine.ledger.calls if not c.reused}) for engine in engines
            )


class _Enough(Exception):
    """Ends a run of which the rest is of no interest."""


def exact_errors(
    replayer: Replayer, max_skip: int, starts: Iterable[int] | None = None
) -> dict[tuple[int, int], float]:
    """The error of every segment, each by a run of its own.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        starts: only segments from these steps on; None for all.
    """
    wanted = None if starts is None else set(starts)
    return {
        (start, end): replayer.error(start, end)
        for start, end in segments(replayer.steps, max_skip)
        if (wanted is None or start in wanted) and replayer.allowed(start, end)
    }


def gain_errors(
    replayer: Replayer, max_skip: int, interval: int = GAIN_INTERVAL
) -> dict[tuple[int, int], float]:
    """The error of every segment as exact local deviation times interpolated gain.

    Args:
        replayer: one sample.
        max_skip: longest segment.
        interval: the gain is measured at every so many steps.
    """
    steps = replayer.steps
    local = {
        (start, end): deviation
        for start in range(steps - 1)
        for end, deviation in replayer.deviations(start, max_skip).items()
        if replayer.allowed(start, end)
    }
    # The outcome is the latents after the last step, so a deviation there has a gain of 1.
    gains = {steps: 1.0}
    for end in range(2, steps, interval):
        # The longest segment to this step: the larger the deviation, the clearer its growth.
        starts = [s for s in range(max(0, end - 3), end - 1) if local.get((s, end), 0.0) > 0.0]
        if starts:
            gains[end] = replayer.error(starts[0], end) / local[starts[0], end]
    return {
        (start, end): deviation * _interpolated(gains, end)
        for (start, end), deviation in local.items()
    }


def _interpolated(gains: dict[int, float], step: int) -> float:
    """The gain at a step, log-linearly between those that were measured."""
    known = sorted(end for end, gain in gains.items() if gain > 0.0)
    if step <= known[0]:
        return gains[known[0]]
    right = next(end for end in known if end >= step)
    left = max(end for end in known if end <= step)
    if left == right:
        return gains[left]
    share = (step - left) / (right - left)
    return math.exp((1 - share) * math.log(gains[left]) + share * math.log(gains[right]))
