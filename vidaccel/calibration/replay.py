"""Runs one sample of a pipeline again and again, each time with another segment reused.

A reference generation is recorded first: what the transformer gave at every step and the residuals
at its heads. Later runs replay its first steps and compute or reuse only what comes after.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch

from vidaccel.api import accelerate, engines_of, restore
from vidaccel.clips import metrics
from vidaccel.clips.calling import outcome_of, without_bar
from vidaccel.engine.engine import Engine
from vidaccel.engine.recording import Recording
from vidaccel.errors import PlanError
from vidaccel.hosts.registry import find_transformers
from vidaccel.plans.plan import Plan
from vidaccel.precision.change import refuse_low_precision


def l1(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """Mean absolute difference of two tensors of one shape."""
    return float((latents.float() - reference.float()).abs().mean())


@dataclass(frozen=True)
class Metric:
    """A measure of how far apart two outcomes of one sample are; 0 for equal ones.

    Attributes:
        output_type: what the pipeline is asked for.
        compare: reference, outcome -> how far apart they are.
    """

    output_type: str
    compare: Callable[[Any, Any], float]


def _lpips(reference: Any, frames: Any) -> float:
    return metrics.lpips(reference[0], frames[0])


def _pixels(reference: Any, frames: Any) -> float:
    return l1(torch.as_tensor(reference), torch.as_tensor(frames))


# "l1" on the final latents is what the paper's error is taken to be; the others decode every run.
METRICS = {
    "l1": Metric("latent", l1),
    "decoded": Metric("np", _pixels),
    "lpips": Metric("np", _lpips),
}


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        PlanError: there is none.
        MetricUnavailable: it needs something that is not here.
    """
    if name not in METRICS:
        raise PlanError(f"metric: found {name!r}, expected one of {', '.join(METRICS)}")
    if name == "lpips":
        metrics.load_lpips()
    return METRICS[name]


@dataclass(frozen=True)
class Reference:
    """One generation with every step computed.

    Attributes:
        recording: what the transformers gave at each step.
        latents: the latents that came out.
        outcome: what the metric compares; the latents, or the decoded clip.
        inputs: the latents that went into each step, in host memory.
        switch: first step of the second transformer of a pipeline that has two, which no segment
            may cross; None with one.
    """

    recording: Recording
    latents: torch.Tensor
    outcome: Any
    inputs: dict[int, torch.Tensor]
    switch: int | None


class Replayer:
    """Runs one sample of a pipeline again and again, each time with another segment reused.

    Use it as a context manager: the pipeline is left without acceleration.

    Args:
        pipe: a pipeline that `accelerate` takes.
        call: arguments of its call, with the prompt and `num_inference_steps`.
        seed: seed of the noise.
        metric: "l1" of the final latents, "decoded" (L1 of the frames, 0 to 1) or "lpips".
        steps: the steps that such a call makes, where it asks for others; see `steps_made`.

    Attributes:
        reference: the run in which every step is computed.
        run_settings: what the runs are like, for a policy.
        forwards: steps that were computed so far.

    Raises:
        PlanError: fewer than 3 steps, or a run that starts inside its schedule.
        PrecisionError: the pipeline is in low precision.
    """

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        seed: int = 0,
        metric: str = "l1",
        steps: int | None = None,
    ) -> None:
        self.steps = int(call["num_inference_steps"]) if steps is None else steps
        if self.steps < 3:
            raise PlanError(f"calibration needs 3 steps or more, found {self.steps}")
        refuse_low_precision(pipe, (model for model, _ in find_transformers(pipe).values()))
        self.pipe, self.call, self.seed, self.metric = pipe, call, seed, find_metric(metric)
        self.forwards = 0
        self._texts: list[Any] = []
        try:
            self.reference = self._record()
        except BaseException:
            restore(pipe)
            raise
        # Of several workflows, each with its transformer, the reference is one.
        ran = (engine.generation for engine in engines_of(pipe).values())
        self.run_settings = next(generation.run for generation in ran if generation is not None)

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the pipeline without acceleration."""
        restore(self.pipe)

    def forget_steps(self) -> None:
        """Keep only what `error_of` a plan needs from its first step on."""
        self.reference = replace(self.reference, recording=Recording(replay_until=0), inputs={})

    def allowed(self, start: int, end: int) -> bool:
        """Tell whether a segment stays on one side of the switch between two transformers."""
        switch = self.reference.switch
        return switch is None or not start < switch < end

    def noise_floor(self) -> float:
        """The error of a run that reuses nothing but goes on from the middle of the reference."""
        return self.error_of(Plan.every(1, self.steps), self.steps // 2)

    def error(self, start: int, end: int, order: int = 0, previous: int | None = None) -> float:
        """Measure the outcome error of the segment start -> end.

        Args:
            start: its computed step.
            end: the next computed step; T reuses to the end.
            order: order of the forecast; 0 holds.
            previous: the computed step before `start` that a forecast draws its line through.
        """
        return self.error_of(self._plan(start, end, order, previous), start + 1)

    def error_of(self, plan: Plan, replay_until: int = 0) -> float:
        """Measure the error of a plan of which the first `replay_until` steps count as computed."""
        outcome = self._run(plan, replay_until, output_type=self.metric.output_type)
        return self.metric.compare(self.reference.outcome, outcome)

    def drift(
        self, start: int, max_skip: int, order: int = 0, previous: int | None = None
    ) -> dict[int, torch.Tensor]:
        """Measure how reusing from `start` on moves the latents that go into each later step.

        Costs the embedding and head of the reused steps, and no block.

        Args:
            start, order, previous: as `error` takes them.
            max_skip: the longest segment.

        Returns:
            end -> difference of the latents of step `end` (T: of the final ones), for the segments
            start -> end up to `max_skip` long.
        """
        last = min(start + max_skip, self.steps)
        found: dict[int, torch.Tensor] = {}

        def look(step: int, sample: torch.Tensor) -> None:
            if step > start + 1:
                found[step] = sample.cpu().float() - self.reference.inputs[step].float()
            if step == last:
                raise _Enough

        try:
            latents = self._run(self._plan(start, last, order, previous), start + 1, look)
        except _Enough:
            return found
        found[self.steps] = latents.float() - self.reference.latents.float()
        return found

    def _plan(self, start: int, end: int, order: int, previous: int | None) -> Plan:
        # The reference is replayed until `start`, whatever the plan says of the steps before:
        # leaving some out decides only which residuals a forecast gets to see.
        left_out = range(0) if previous is None else range(previous + 1, start)
        computed = tuple(
            step for step in range(self.steps) if not start < step < end and step not in left_out
        )
        segments = len(computed) - (computed[-1] == self.steps - 1)
        orders = tuple(order * (step == start) for step in computed[:segments])
        return Plan(computed, self.steps, orders=orders)

    def _record(self) -> Reference:
        inputs: dict[int, torch.Tensor] = {}

        def look(step: int, sample: torch.Tensor) -> None:
            inputs[step] = sample.cpu().clone()

        recording = Recording()
        every = Plan.every(1, self.steps)
        latents = self._run(every, None, look, recording)
        if sorted(inputs) != list(range(self.steps)):
            raise PlanError(
                f"this run computes steps {min(inputs)} to {max(inputs)} of {self.steps}; "
                "calibration needs one that goes through its whole schedule"
            )
        begins = [e.stats.calls[0].step for e in engines_of(self.pipe).values() if e.stats.calls]
        switch = [step for step in begins if step > min(begins)]
        outcome: Any = latents
        if self.metric.output_type != "latent":
            # Playing every step back gives the same latents, decoded this time.
            outcome = self._run(
                every, self.steps, recording=recording, output_type=self.metric.output_type
            )
        return Reference(recording, latents, outcome, inputs, switch[0] if switch else None)

    def _run(
        self,
        plan: Plan,
        replay_until: int | None,
        look: Callable[[int, torch.Tensor], None] | None = None,
        recording: Recording | None = None,
        output_type: str = "latent",
    ) -> Any:
        """Return what comes out of a run; `look` sees the input of each step's first call."""
        accelerate(self.pipe, policy=plan, cache=None, attention=None)
        recording = recording or self.reference.recording
        recording.replay_until = replay_until
        seen: set[int] = set()
        handles = []
        engines = list(engines_of(self.pipe).values())
        for engine in engines:
            engine.observer = recording

            def before(
                module: Any, args: Any, kwargs: dict[str, Any], engine: Any = engine
            ) -> None:
                step = engine.running.context.step
                if look is not None and step not in seen:
                    seen.add(step)
                    look(step, kwargs[engine.host.sample])

            hook = engine.transformer.register_forward_pre_hook(before, with_kwargs=True)
            handles.append(hook)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        call = {**self.call, "generator": generator}
        try:
            with ExitStack() as stack:
                stack.enter_context(without_bar(self.pipe))
                stack.enter_context(self._texts_kept())
                for engine in engines:
                    stack.enter_context(_replayed_without_forward(engine))
                return outcome_of(self.pipe, call, output_type)
        finally:
            for handle in handles:
                handle.remove()
            # Both branches of a step count as one forward.
            self.forwards += sum(
                len({c.step for c in engine.stats.calls if not c.reused}) for engine in engines
            )

    @contextmanager
    def _texts_kept(self) -> Iterator[None]:
        """The prompts encoded once for all runs, which ask for the same ones in the same order."""
        attributes, encode = vars(self.pipe), getattr(self.pipe, "encode_prompt", None)
        if encode is None:
            yield
            return
        previous = attributes.get("encode_prompt")
        calls = itertools.count()

        def kept(*args: Any, **kwargs: Any) -> Any:
            position = next(calls)
            if position == len(self._texts):
                self._texts.append(encode(*args, **kwargs))
            return self._texts[position]

        attributes["encode_prompt"] = kept
        try:
            yield
        finally:
            del attributes["encode_prompt"]
            if previous is not None:
                attributes["encode_prompt"] = previous


@contextmanager
def _replayed_without_forward(engine: Engine) -> Iterator[None]:
    """Keep replayed steps from running the transformer, whose output would be thrown away."""
    model = engine.transformer
    attributes, forward = vars(model), model.forward
    previous = attributes.get("forward")

    @wraps(forward)  # blocks of modular pipelines pass on what its signature names
    def forward_or_nothing(*args: Any, **kwargs: Any) -> Any:
        call = engine.running
        # Anything but None, which tells the engine of an exception.
        return () if call is not None and call.replayed else forward(*args, **kwargs)

    attributes["forward"] = forward_or_nothing
    try:
        yield
    finally:
        del attributes["forward"]
        if previous is not None:
            attributes["forward"] = previous


def steps_made(pipe: Any, call: dict[str, Any]) -> int:
    """Count the steps that a call makes, at its first one: no block runs.

    MiniMax-H3 counts the end of its last step among those it is asked for.

    Args:
        pipe: the pipeline; it is left without acceleration.
        call: arguments of its call, with the prompt and `num_inference_steps`.

    Raises:
        PlanError: no transformer is called.
        PrecisionError: the pipeline is in low precision.
    """
    refuse_low_precision(pipe, (model for model, _ in find_transformers(pipe).values()))
    accelerate(pipe, policy=None, cache=None, attention=None)
    found: list[int] = []
    handles = []
    for engine in engines_of(pipe).values():

        def before(module: Any, args: Any, engine: Engine = engine) -> None:
            if engine.running is not None:  # not a call that fills a cache for others
                found.append(engine.running.context.num_inference_steps)
                raise _Enough

        handles.append(engine.transformer.register_forward_pre_hook(before))
    try:
        with without_bar(pipe):
            outcome_of(pipe, {**call, "generator": torch.Generator("cpu").manual_seed(0)}, "latent")
    except _Enough:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
        restore(pipe)
    raise PlanError("this run calls none of the pipeline's transformers")


class _Enough(BaseException):
    """Ends a run of which the rest is of no interest.

    No `Exception`: blocks of modular pipelines log those as errors.
    """
