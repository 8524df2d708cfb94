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

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from vidaccel.dbcache import DBCache
from vidaccel.engine.adapters import active_adapters
from vidaccel.engine.attention_hook import Attention
from vidaccel.engine.block_proxies import Argument, BlockArguments, BlockListProxy
from vidaccel.engine.parallel import group_of, refuse_unsupported, seen_by, sequence_parallel_mode
from vidaccel.engine.recording import Tape
from vidaccel.engine.state import Generation, RunningCall
from vidaccel.engine.stats import Call, CallStats
from vidaccel.engine.step_tracker import Clock, Tick, noise_grid
from vidaccel.engine.timing import moment
from vidaccel.errors import ScheduleError, UnsupportedPipelineError
from vidaccel.hosts.registry import Head, HostSpec
from vidaccel.plans.plan import Plan, RunSettings
from vidaccel.resolve import CourseSource

# The place of a call and the residual of its probe blocks.
ProbeListener = Callable[[Tick, torch.Tensor], None]

_ATTRIBUTE = "_vidaccel_engine"


def engine_of(transformer: nn.Module) -> "Engine | None":
    """The engine attached to `transformer`, if any."""
    return vars(transformer).get(_ATTRIBUTE)


class Engine:
    """Runs a plan on one transformer.

    Args:
        transformer: an instance of the class that `host` describes.
        host: its row of the table.
        source: the plan, resolved at the first call of each generation.
        attention: what `accelerate(attention=...)` came to; None leaves attention alone.

    Raises:
        UnsupportedPipelineError: when the transformer is in a state that the engine cannot work
            with; nothing has been changed then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        host: HostSpec,
        source: CourseSource,
        attention: Attention | None = None,
    ) -> None:
        _refuse_unsupported(transformer)
        source.check(transformer, host)
        self.attention = attention or Attention()
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._transformer = weakref.ref(transformer)
        self.host = host
        self.source = source
        self.tape: Tape | None = None  # set while a generation is recorded or run again
        self.on_probe: ProbeListener | None = None  # is told every probe residual
        self.stats = CallStats(host.block_count(transformer))
        self._pipelines: list[tuple[weakref.ref[Any], Any]] = []
        self._clock = Clock(host.branch, host.times)
        self._context: str | None = None
        self._handles: list[Any] = []
        self._sample = Argument.of_forward(type(transformer), host.sample)
        self._timestep = Argument.of_forward(type(transformer), host.timestep)
        self._generation: Generation | None = None  # the running or last one
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
        """What decides, and what that came to in the last generation."""
        origin = "" if self._generation is None else self._generation.origin
        return ": ".join(filter(None, (self.source.description, origin)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the last generation's report should know besides its numbers."""
        run_settings = self.run_settings
        if run_settings is None or not run_settings.adapters or not (self.plan or self.cache):
            return ()
        names = ", ".join(run_settings.adapters)
        return (
            f"adapters were active ({names}), which no policy and no threshold that comes with "
            "vidaccel was measured with; compare a clip with one of policy=None",
        )

    @property
    def run_settings(self) -> RunSettings | None:
        """The run that the last generation was."""
        return None if self._generation is None else self._generation.run_settings

    @property
    def plan(self) -> Plan | None:
        """The plan of the last generation."""
        return None if self._generation is None else self._generation.plan

    @property
    def cache(self) -> DBCache | None:
        """The block cache of the last generation."""
        return None if self._generation is None else self._generation.cache

    @property
    def step(self) -> int | None:
        """The denoising step of the running call; None between calls."""
        return None if self._call is None else self._call.tick.step

    @property
    def playing(self) -> bool:
        """Whether the running call gives back what was recorded."""
        return self._call is not None and self._call.playing

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return 0 if self._generation is None else self._generation.bytes_held

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
            vars(model)["_reset_stateful_cache"] = self._reset_stateful_cache
        self.attention.attach()
        vars(model)[_ATTRIBUTE] = self

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        shadowed = ("cache_context", "_reset_stateful_cache", _ATTRIBUTE)
        for name in (*(spec.name for spec in self.host.blocks), *shadowed):
            vars(self.transformer).pop(name, None)
        self.attention.detach()
        self._generation = None

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
        """Stands in for `CacheMixin.cache_context` to learn the name of the guidance branch."""
        outer, self._context = self._context, name
        try:
            with type(self.transformer).cache_context(self.transformer, name, **fields):
                yield
        finally:
            self._context = outer

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Stands in for the method that pipelines call when a generation has ended."""
        model = self.transformer
        type(model)._reset_stateful_cache(model, *args, **kwargs)
        self.attention.forget()
        if self._generation is not None:
            self._generation.forget()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedPipelineError(_WHOLE_MODEL)
        if getattr(model, "_cache_config", None) is not None:
            raise UnsupportedPipelineError(_NATIVE_CACHE)
        refuse_unsupported(model)
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
        times = self._clock.values(schedulers, self._timestep.value(args, kwargs))
        tick = self._clock.tick(schedulers, times, self._context, shape)
        generation = self._generation
        if tick.restarted or generation is None:
            generation = self._restart(tick)
        elif tick.reshaped:
            generation.forget_tensors()
        device = samples[0].device
        call = RunningCall(tick, device, moment(device))
        call.playing = self.tape is not None and self.tape.plays(tick.step)
        if not call.playing:
            generation.propose(call)
        refreshes = generation.keeps(tick.step) > 0
        self.attention.begin(tick, refreshes=refreshes, spread=sequence_parallel_mode(model))
        self._call = call

    def _restart(self, tick: Tick) -> Generation:
        """Begin a generation: nothing that was kept belongs to it."""
        # What is no longer wanted is freed before anything can be refused.
        self._generation = None
        self.attention.restart()
        self.stats.restart()
        run_settings = self._setting(tick)
        course = self.source.resolve(run_settings, self.host)
        self._generation = Generation(run_settings, course, self.host.unit)
        return self._generation

    def _setting(self, tick: Tick) -> RunSettings:
        """The running generation, for policies that are made for a certain one."""
        scheduler = self._clock.scheduler
        config = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        names = {getattr(pipe, "name_or_path", None) for pipe in self.pipelines}
        model_id = next((name for name in names if name and not Path(name).exists()), None)
        return RunSettings(
            tick.num_inference_steps,
            transformer=type(self.transformer).__name__,
            model_id=model_id,
            config_hash=sha256(text.encode()).hexdigest(),
            scheduler=type(scheduler).__name__,
            sigmas=noise_grid(scheduler, tick.num_inference_steps),
            adapters=active_adapters(self.transformer),
        )

    def _run_block(
        self, block: nn.Module, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one block, or give its streams back unchanged in the middle of a reused step."""
        call, generation = self._call, self._generation
        if call is None or generation is None:
            return block(*args, **kwargs)
        index, call.position = call.position, call.position + 1
        seen, seen_by_name = seen_by(block, args, kwargs)
        if call.playing:
            return named.passed_through(seen, seen_by_name)
        probe, corrector = generation.probe_blocks, self.stats.blocks - generation.corrector_blocks
        if index == 0 and probe:
            call.probed = named.main(seen, seen_by_name)
        if index == probe:
            if probe:
                self._after_probe(call, generation, named.main(seen, seen_by_name))
            call.entry = named.streams(seen, seen_by_name)
            if call.undecided:
                generation.decide(call)
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
        assert generation.cache is not None
        residual = (main - call.probed.to(main.device))[..., :: generation.cache.probe_stride, :]
        if self.on_probe is not None:
            self.on_probe(call.tick, residual)
        generation.compare(call, residual, group_of(self.transformer))

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
            if (filled := self._fill(call, generation, named.origin(name), given)) is not None:
                args, kwargs = named.replaced(name, filled, args, kwargs)
        return args, kwargs

    def _after_last(
        self, call: RunningCall, generation: Generation, named: BlockArguments, output: Any
    ) -> Any:
        """After the last block of a model whose head gets its result in another layout."""
        streams = named.outputs(output)
        for name, given in streams.items():
            if (filled := self._fill(call, generation, named.origin(name), given)) is not None:
                streams[name] = filled
        return named.output(streams)

    def _at_head(
        self, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Before a head runs: keep the residual, or put the kept one in place of the blocks."""
        call, generation = self._call, self._generation
        if call is None or generation is None or not call.entry or generation.corrector_blocks:
            return None
        filled = self._fill(call, generation, head.streams, args[0], head)
        return None if filled is None else (filled, *args[1:])

    def _fill(
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
        recording = self.tape is not None and self.tape.recording
        if given is None or not (call.reused or recording or generation.keeps(call.tick.step)):
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
            call.fresh.append((given - start).to(start.dtype))
            return None
        index, call.filled = call.filled, call.filled + 1
        return (start + generation.forecast(call, index, given.device)).to(given.dtype)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, generation, tape = self._call, self._generation, self.tape
        if call is None or generation is None:
            return None
        tick = call.tick
        self._call = None
        self.attention.end()
        if tape is not None and call.playing:
            if generation.plans(tick.step) and generation.keeps(tick.step):
                call.fresh = tape.residual(tick.step, tick.branch, call.device)
            generation.finish(call)
            return tape.played(tick.step, tick.branch, call.device)
        if tape is not None and tape.recording:
            tape.record(tick.step, tick.branch, output, call.fresh)
        generation.finish(call)
        self.stats.add(
            Call(
                step=tick.step,
                branch=tick.branch,
                reused=call.reused,
                planned=generation.plan is None or generation.plans(tick.step),
                blocks=call.blocks_run,
                started=call.started,
                ended=moment(call.device),
                reason=call.reason,
                difference=call.difference,
            ),
            generation.bytes_held,
        )
        return None


_WHOLE_MODEL = (
    "the transformer is compiled as a whole, which freezes the decision of every step into one "
    "graph; compile its blocks instead: pipe.transformer.compile_repeated_blocks(fullgraph=True)"
)
_NATIVE_CACHE = (
    "the transformer has a Diffusers cache enabled, which would skip the same blocks a second "
    "time; call pipe.transformer.disable_cache() first"
)


def _refuse_unsupported(transformer: nn.Module) -> None:
    if hasattr(transformer, "_orig_mod") or transformer._compiled_call_impl is not None:
        raise UnsupportedPipelineError(_WHOLE_MODEL)
    if getattr(transformer, "_cache_config", None) is not None:
        raise UnsupportedPipelineError(_NATIVE_CACHE)
    refuse_unsupported(transformer)
