"""Attaches to one transformer, skips its blocks on reused steps, and undoes itself exactly.

The blocks are counted in the order in which they run, over all block lists: `probe_blocks` first,
the middle, `corrector_blocks` last; without a block cache the middle is all of them. On a computed
step they run untouched, and the engine keeps what the middle added, per guidance branch: the input
of the first corrector block, or of the head, minus that of the first middle block. On a reused step
the middle does not run, and the first corrector block, or the head, gets the new input of the
middle plus that residual, or a forecast of it. Putting it there instead of adding it up on the way
means that whatever a model adds between its blocks is inside the residual once, and never added
again.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from vidaccel.engine import compat
from vidaccel.engine.attention_hook import AttentionHook
from vidaccel.engine.block_proxies import Argument, BlockArguments, BlockListProxy
from vidaccel.engine.observer import Observer
from vidaccel.engine.parallel import group_of, seen_by, sequence_parallel_mode
from vidaccel.engine.run_settings import run_settings_of
from vidaccel.engine.state import Decision, Generation, RunningCall
from vidaccel.engine.stats import Call, CallStats
from vidaccel.engine.step_tracker import CallContext, StepTracker
from vidaccel.engine.timing import moment
from vidaccel.engine.unsupported import refuse_unsupported, refuse_unsupported_call
from vidaccel.errors import ScheduleError, UnsupportedPipelineError
from vidaccel.hosts.spec import Head, HostSpec
from vidaccel.plans.plan import RunSettings

_ATTRIBUTE = "_vidaccel_engine"


def engine_of(transformer: nn.Module) -> "Engine | None":
    """Return the engine attached to `transformer`, if any."""
    return vars(transformer).get(_ATTRIBUTE)


class DecisionSource(Protocol):
    """Decides about the steps of a generation once its run is known."""

    @property
    def description(self) -> str:
        """The name in reports."""

    def decide(self, run: RunSettings, host: HostSpec) -> Decision:
        """Return the decision for a run of the model of this row."""


class Engine:
    """Runs a decision on one transformer.

    Args:
        transformer: an instance of the class that `host` describes.
        host: its row of the table.
        source: is asked for a decision at the first call of each generation.
        attention: makes attention sparse; None leaves it alone.

    Attributes:
        generation: the running one, or the last one; None before the first.
        observer: looks on; calibration puts one in.
        stats: the calls since the engine was attached.

    Raises:
        UnsupportedPipelineError: when the transformer is in a state that the engine cannot work
            with; nothing has been changed then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        host: HostSpec,
        source: DecisionSource,
        attention: AttentionHook | None = None,
    ) -> None:
        refuse_unsupported(transformer)
        self.attention = attention or AttentionHook()
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._transformer = weakref.ref(transformer)
        self.host = host
        self._source = source
        self.observer = Observer()
        self.stats = CallStats(host.block_count(transformer))
        self.generation: Generation | None = None
        self._pipelines: list[tuple[weakref.ref[Any], Any]] = []
        self._tracker = StepTracker(host.branch, host.times)
        self._cache_context_name: str | None = None
        self._handles: list[Any] = []
        self._sample = Argument.of_forward(type(transformer), host.sample)
        self._timestep = Argument.of_forward(type(transformer), host.timestep)
        self._call: RunningCall | None = None

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UnsupportedPipelineError(
            "an accelerated transformer cannot be copied: restore(pipe) first, copy, and "
            "accelerate both"
        )

    @property
    def transformer(self) -> nn.Module:
        """The transformer that this engine is attached to."""
        transformer = self._transformer()
        assert transformer is not None  # it holds the engine
        return transformer

    @property
    def description(self) -> str:
        """Name what decides, and what that came to in the last generation."""
        origin = "" if self.generation is None else self.generation.origin
        return ": ".join(filter(None, (self._source.description, origin)))

    @property
    def notes(self) -> tuple[str, ...]:
        """Tell a reader of the last generation's report what its numbers do not."""
        last = self.generation
        if last is None or not last.run.adapters or not (last.plan or last.cache):
            return ()
        names = ", ".join(last.run.adapters)
        return (
            f"adapters were active ({names}), which no policy and no threshold that comes with "
            "vidaccel was measured with; compare a clip with one of policy=None",
        )

    @property
    def running(self) -> RunningCall | None:
        """The call that is running; None between calls."""
        return self._call

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return 0 if self.generation is None else self.generation.bytes_held

    def attach(self) -> None:
        """Start intercepting. Touches the instance `__dict__` and torch's own hook lists only."""
        model = self.transformer
        heads = [(head, model.get_submodule(head.module)) for head in self.host.heads]
        for spec in self.host.blocks:
            blocks = getattr(model, spec.name)
            arguments = BlockArguments(
                type(blocks[0]), self.host.streams, self.host.main, spec.returns, spec.joins
            )
            vars(model)[spec.name] = BlockListProxy(blocks, arguments, self._run_block)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for head, module in heads:
            hook = partial(self._at_head, head)
            self._handles.append(module.register_forward_pre_hook(hook))
        if hasattr(model, "cache_context"):
            vars(model)["cache_context"] = self._cache_context
            vars(model)[compat.RESET_CACHE] = self._reset_cache
        self.attention.attach()
        vars(model)[_ATTRIBUTE] = self

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        replaced = ("cache_context", compat.RESET_CACHE, _ATTRIBUTE)
        for name in (*(spec.name for spec in self.host.blocks), *replaced):
            vars(self.transformer).pop(name, None)
        self.attention.detach()
        self.generation = None

    def serve(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe`, which runs this transformer."""
        self._pipelines = [(ref, s) for ref, s in self._pipelines if ref() not in (None, pipe)]
        self._pipelines.append((weakref.ref(pipe), pipe.scheduler))

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines that were accelerated with this transformer and still exist."""
        return [pipe for ref, _ in self._pipelines if (pipe := ref()) is not None]

    @contextmanager
    def _cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Stand in for `CacheMixin.cache_context` to learn the name of the guidance branch."""
        outer, self._cache_context_name = self._cache_context_name, name
        own: Any = type(self.transformer)
        try:
            with own.cache_context(self.transformer, name, **fields):
                yield
        finally:
            self._cache_context_name = outer

    def _reset_cache(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for the method that pipelines call when a generation has ended."""
        compat.reset_cache(self.transformer, *args, **kwargs)
        self.attention.forget()
        if self.generation is not None:
            self.generation.forget()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_unsupported_call(model)
        for ref, scheduler in self._pipelines:
            pipe = ref()
            if pipe is not None and pipe.scheduler is not scheduler:
                raise ScheduleError(
                    f"the scheduler of this pipeline was {type(scheduler).__name__} when it was "
                    f"accelerated and is another {type(pipe.scheduler).__name__} now: call "
                    "vidaccel.accelerate(pipe) again after replacing it"
                )
        samples = self._sample.value(args, kwargs)
        samples = [samples] if isinstance(samples, torch.Tensor) else samples
        shape = tuple(size for sample in samples for size in sample.shape)
        schedulers = [scheduler for _, scheduler in self._pipelines]
        context = self._tracker.locate(
            schedulers, self._timestep.value(args, kwargs), self._cache_context_name, shape
        )
        generation = self.generation
        if context.restarted or generation is None:
            generation = self._restart(context)
        elif context.reshaped:
            generation.forget_tensors()
        device = samples[0].device
        call = RunningCall(context, device, moment(device))
        call.replayed = self.observer.replays(context)
        if not call.replayed:
            generation.decide(call)
        refreshes = generation.keeps(context.step) > 0
        self.attention.begin(
            context, refreshes=refreshes, parallel_mode=sequence_parallel_mode(model)
        )
        self._call = call

    def _restart(self, context: CallContext) -> Generation:
        """Begin a generation: nothing that was kept belongs to it."""
        # What is no longer wanted is freed before anything can be refused.
        self.generation = None
        self.attention.restart()
        self.stats.restart()
        run = run_settings_of(
            self.transformer, self.pipelines, self._tracker.scheduler, context.num_inference_steps
        )
        self.generation = Generation(run, self._source.decide(run, self.host), self.host.unit)
        return self.generation

    def _run_block(
        self, block: nn.Module, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one block, or give its streams back unchanged in the middle of a reused step."""
        call, generation = self._call, self.generation
        if call is None or generation is None:
            return block(*args, **kwargs)
        index, call.position = call.position, call.position + 1
        seen, seen_by_name = seen_by(block, args, kwargs)
        if call.replayed:
            return named.passed_through(seen, seen_by_name)
        probe, corrector = generation.probe_blocks, self.stats.blocks - generation.corrector_blocks
        if index == 0 and probe:
            call.probe_input = named.main(seen, seen_by_name)
        if index == probe:
            if probe:
                self._after_probe(call, generation, named.main(seen, seen_by_name))
            call.entry = named.streams(seen, seen_by_name)
            if call.undecided:
                generation.decide_by_probe(call)
        if index == corrector:
            args, kwargs = self._at_corrector(call, generation, named, args, kwargs)
        if call.reused and probe <= index < corrector:
            output = named.passed_through(seen, seen_by_name)
        else:
            call.blocks_run += 1
            with self.attention.block(index, named, args, kwargs):
                output = block(*args, **kwargs)
        if index + 1 == corrector == self.stats.blocks and not self.host.heads:
            return self._after_last(call, generation, named, output)
        return output

    def _after_probe(self, call: RunningCall, generation: Generation, main: torch.Tensor) -> None:
        """After the probe blocks: what they added to the main stream."""
        assert generation.cache is not None and call.probe_input is not None
        added = main - call.probe_input.to(main.device)
        residual = added[..., :: generation.cache.probe_stride, :]
        self.observer.after_probe(call.context, residual)
        generation.take_probe(call, residual, group_of(self.transformer))

    def _at_corrector(
        self,
        call: RunningCall,
        generation: Generation,
        named: BlockArguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the first corrector block: keep the residual, or put the kept one in its place."""
        for name in named.returned:
            given = named.value(name, args, kwargs)
            if (
                applied := self._apply_residual(call, generation, named.origin(name), given)
            ) is not None:
                args, kwargs = named.replaced(name, applied, args, kwargs)
        return args, kwargs

    def _after_last(
        self, call: RunningCall, generation: Generation, named: BlockArguments, output: Any
    ) -> Any:
        """After the last block of a model whose head gets its result in another layout."""
        streams = named.outputs(output)
        for name, given in streams.items():
            if (
                applied := self._apply_residual(call, generation, named.origin(name), given)
            ) is not None:
                streams[name] = applied
        return named.output(streams)

    def _at_head(
        self, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Before a head runs: keep the residual, or put the kept one in place of the blocks."""
        call, generation = self._call, self.generation
        if call is None or generation is None or not call.entry or generation.corrector_blocks:
            return None
        applied = self._apply_residual(call, generation, head.streams, args[0], head)
        return None if applied is None else (applied, *args[1:])

    def _apply_residual(
        self,
        call: RunningCall,
        generation: Generation,
        streams: tuple[str, ...],
        given: torch.Tensor | None,
        head: Head | None = None,
    ) -> torch.Tensor | None:
        """At the end of the middle: keep what it added, or on a reused step what goes on instead.

        Args:
            streams: those at the entry of the middle that `given` continues.
            given: what has come out of the middle, which a reused step has only passed through;
                None where the model runs without that stream, sound say.
            head: the module that it goes into, if it is one.
        """
        context = call.context
        wanted = generation.keeps(context.step) or self.observer.wants_residuals(context)
        if given is None or not (call.reused or wanted):
            return None
        parts = [call.entry[name].to(given.device) for name in streams]
        start = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if head is not None and head.tail:
            start = start[:, -given.shape[1] :]
        if start.shape != given.shape:
            raise UnsupportedPipelineError(
                f"the blocks of {type(self.transformer).__name__} take {tuple(start.shape)} but "
                f"{head.module if head else 'the last of them'} gets {tuple(given.shape)}"
            )
        if not call.reused:
            call.residuals.append((given - start).to(start.dtype))
            return None
        index, call.residuals_applied = call.residuals_applied, call.residuals_applied + 1
        return (start + generation.forecast(call, index, given.device)).to(given.dtype)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, generation = self._call, self.generation
        if call is None or generation is None:
            return None
        context = call.context
        self._call = None
        self.attention.end()
        if call.replayed:
            if generation.is_planned(context.step) and generation.keeps(context.step):
                call.residuals = self.observer.residuals(context, call.device)
            generation.end(call)
            return self.observer.replayed(context, call.device)
        self.observer.after_call(context, output, call.residuals)
        generation.end(call)
        self.stats.add(
            Call(
                step=context.step,
                branch=context.branch,
                reused=call.reused,
                planned=generation.plan is None or generation.is_planned(context.step),
                blocks=call.blocks_run,
                started=call.started,
                ended=moment(call.device),
                reason=call.reason or "",
                difference=call.difference,
            ),
            generation.bytes_held,
        )
        return None
