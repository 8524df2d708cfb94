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

from typing import Any, NoReturn

import torch
from torch import nn

from vidaccel.engine.attachment import Attachment, ThreadState
from vidaccel.engine.attention_hook import AttentionHook
from vidaccel.engine.block_proxies import BlockArguments
from vidaccel.engine.call_arguments import CallArguments
from vidaccel.engine.guidance import GuidedCalls
from vidaccel.engine.loop_watch import unwatch_loops, watch_loops
from vidaccel.engine.observer import Observer
from vidaccel.engine.parallel import group_of, seen_by, sequence_parallel_mode
from vidaccel.engine.report import notes_of
from vidaccel.engine.residuals import entry_of
from vidaccel.engine.run_settings import run_settings_of
from vidaccel.engine.state import CallContext, DecisionSource, Generation, RunningCall
from vidaccel.engine.stats import CallStats
from vidaccel.engine.tail import Put, run_tail
from vidaccel.engine.timing import moment
from vidaccel.engine.trajectory import BYPASSED, Trajectories, Trajectory
from vidaccel.engine.unsupported import refuse_unsupported, refuse_unsupported_call, why_plain
from vidaccel.engine.writes import WriteWatch
from vidaccel.errors import UnsupportedPipelineError
from vidaccel.hosts.spec import Head, HostSpec

_ATTRIBUTE = "_vidaccel_engine"


def engine_of(transformer: nn.Module) -> "Engine | None":
    """Return the engine attached to `transformer`, if any."""
    return vars(transformer).get(_ATTRIBUTE)


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
        self.host = host
        self._source = source
        self.observer = Observer()
        self.stats = CallStats(host.block_count(transformer))
        self.generation: Generation | None = None
        self.trajectories = Trajectories(host, self._drop)
        self._thread = ThreadState()
        self._attachment = Attachment(transformer, host, _ATTRIBUTE, self, self._thread)
        self._given, self._guided = CallArguments(transformer, host), GuidedCalls()
        self._writes = WriteWatch()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedPipelineError(
            "an accelerated transformer cannot be copied or pickled: restore(pipe) first, and "
            "accelerate again afterwards; its state_dict() is that of the plain one"
        )

    @property
    def transformer(self) -> nn.Module:
        """The transformer that this engine is attached to."""
        return self._attachment.transformer

    @property
    def description(self) -> str:
        """Name what decides, and what that came to in the last generation."""
        origin = "" if self.generation is None else self.generation.origin
        return ": ".join(filter(None, (self._source.description, origin)))

    @property
    def notes(self) -> tuple[str, ...]:
        """Tell a reader of the last generation's report what its numbers do not."""
        doubts = sorted({past.doubt for past in self.trajectories.all() if past.doubt})
        last = self.generation
        decided = last is not None and (last.plan is not None or last.cache is not None)
        adapters = last.run.adapters if last is not None and decided else ()
        return (*notes_of(self.stats, doubts, adapters), *self.observer.notes)

    @property
    def running(self) -> RunningCall | None:
        """The call that is running; None between calls."""
        return self._thread.call

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return sum(past.bytes_held for past in self.trajectories.all())

    def attach(self) -> None:
        """Start intercepting. Touches the instance `__dict__` and torch's own hook lists only."""
        self._attachment.attach()
        self.attention.attach()
        watch_loops(self.trajectories.pipelines, self)

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        self._attachment.detach()
        self.attention.detach()
        unwatch_loops(self.trajectories.pipelines, self)
        self.generation = None

    def recompute(self) -> None:
        """Free what is kept, so that the next call of every branch is computed."""
        for trajectory in self.trajectories.all():
            trajectory.forget_tensors()
        self.attention.forget()

    def end_generation(self, scheduler: Any = None, thread: int = 0) -> None:
        """Free what is kept of the last generation of this thread, or of those of a scheduler."""
        past = self.trajectories
        self._forget(past.last() if scheduler is None else past.of(scheduler, thread))

    def _forget(self, past: Trajectory | None) -> None:
        if past is not None:
            past.forget()
            self.attention.forget(id(past))

    def _drop(self, past: Trajectory) -> None:
        """Let go of a trajectory that no call will belong to any more."""
        self.stats.close(id(past))
        self.attention.forget(id(past))

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Place and decide a call of the transformer that begins."""
        self._thread.call = None
        refuse_unsupported_call(model)
        self._follow_changes()
        reason = self._given.why_aside(args, kwargs) or why_plain(model)
        found = reason or self.trajectories.find(self._given.timestep(args, kwargs))
        if isinstance(found, str):
            self.stats.add_plain(found)
            return
        trajectory, values = found
        samples = self._given.samples(args, kwargs)
        shape = tuple(size for sample in samples for size in sample.shape)
        conditions = self._given.conditions(model, args, kwargs)
        name = self._thread.branch or self._guided.branch(self.trajectories.pipelines, values)
        context = trajectory.locate(values, name, conditions, shape)
        generation = trajectory.generation
        if context.restarted or generation is None:
            generation = self._restart(trajectory, context, self._given.size(args, kwargs))
        elif context.reshaped:
            generation.forget_tensors()
        self.generation = generation
        device = samples[0].device
        blocks = self._given.blocks(self.stats.blocks, args, kwargs)
        call = RunningCall(context, blocks, device, moment(device))
        call.trajectory, call.generation = trajectory, generation
        call.arguments = args, kwargs
        if trajectory.begins_step:
            generation.begin_step(context.step)
        call.replayed = self.observer.replays(context)
        if not call.replayed:
            generation.decide(call, trajectory.doubt)
        call.attention = self.attention.begin(
            id(trajectory),
            context,
            refreshes=generation.keeps(context.step) > 0,
            parallel_mode=sequence_parallel_mode(model),
            video_rows=self._given.video_rows(args, kwargs),
        )
        self._thread.call = call

    def _follow_changes(self) -> None:
        """Notice what a user has put in the place of what was accelerated."""
        self.trajectories.check_schedulers()
        replaced, model = self._attachment.follow(), self.transformer
        total = self.host.block_count(model)
        if replaced or total != self.stats.blocks:
            self._source.check(model, self.host)
            self.stats.blocks = total
            for trajectory in self.trajectories.all():
                trajectory.generation = None

    def _restart(
        self, trajectory: Trajectory, context: CallContext, shape: tuple[int, ...]
    ) -> Generation:
        """Begin a generation: nothing that was kept belongs to it."""
        # What is no longer wanted is freed before anything can be refused.
        trajectory.generation = None
        self.attention.restart(id(trajectory))
        self.stats.restart(id(trajectory))
        run = run_settings_of(
            self.transformer,
            self.trajectories.pipelines,
            trajectory.tracker.scheduler,
            context.num_inference_steps,
            shape,
        )
        generation = Generation(run, self._source.decide(run, self.host), self.host.unit)
        trajectory.generation = generation
        self._writes.restart()
        return generation

    def run_block(
        self, block: nn.Module, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one block, or give its streams back unchanged in the middle of a reused step."""
        call = self._thread.call
        if call is None or call.generation is None:
            return block(*args, **kwargs)
        generation = call.generation
        index, call.position = call.position, call.position + 1
        seen, seen_by_name = seen_by(block, args, kwargs)
        if call.replayed:
            output = named.passed_through(seen, seen_by_name)
            if index == 0 and call.put is not None:
                call.entry = named.streams(seen, seen_by_name)
            at_end = call.position == call.blocks and not self.host.heads
            put = at_end and call.put is not None
            return self._after_last(call, generation, named, output) if put else output
        probe, corrector = generation.probe_blocks, call.blocks - generation.corrector_blocks
        if index == 0 and probe:
            call.probe_input = self._kept(call, "probe", named.main(seen, seen_by_name))
        if index == probe:
            if probe:
                self._after_probe(call, generation, named.main(seen, seen_by_name))
            streams = named.streams(seen, seen_by_name)
            call.entry = {name: self._kept(call, name, value) for name, value in streams.items()}
            if call.undecided:
                generation.decide_by_probe(call)
        if index == corrector:
            args, kwargs = self._at_corrector(call, generation, named, args, kwargs)
        if call.reused and probe <= index < corrector:
            output = named.passed_through(seen, seen_by_name)
        else:
            call.blocks_run += 1
            with call.attention.block(index, named, args, kwargs):
                output = block(*args, **kwargs)
        if index + 1 == corrector == call.blocks and not self.host.heads:
            return self._after_last(call, generation, named, output)
        return output

    def run_tail(self, call: RunningCall, put: Put) -> Any:
        """Run the embedding and the head of a call once more; see `vidaccel.engine.tail`."""
        return run_tail(self.transformer, self._thread, call, put)

    def _kept(self, call: RunningCall, name: str, stream: Any) -> Any:
        """A stream as it is now, if something of this call is wanted later."""
        return self._writes.keep(name, stream) if self._is_kept(call) else stream

    def _is_kept(self, call: RunningCall) -> bool:
        """Tell whether something of a computed call is wanted later."""
        if call.reused or call.generation is None:
            return False
        context = call.context
        return bool(
            call.generation.probe_blocks
            or call.generation.keeps(context.step)
            or self.observer.wants_residuals(context)
        )

    def _after_probe(self, call: RunningCall, generation: Generation, main: torch.Tensor) -> None:
        """After the probe blocks: what they added to the main stream."""
        assert generation.cache is not None and call.probe_input is not None
        self._writes.look("probe", call.probe_input)
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

    def at_head(
        self, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Before a head runs: keep the residual, or put the kept one in place of the blocks."""
        call = self._thread.call
        generation = None if call is None else call.generation
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
        if given is None:
            return None
        if call.put is not None:
            start = entry_of(call.entry, streams, given, head, self.transformer)
            return call.put(start).to(given.dtype) if self.host.main in streams else None
        wanted = generation.keeps(context.step) or self.observer.wants_residuals(context)
        if not (call.reused or wanted):
            return None
        for name in streams:
            self._writes.look(name, call.entry[name])
        start = entry_of(call.entry, streams, given, head, self.transformer)
        if not call.reused:
            call.residuals.append((given - start).to(start.dtype))
            call.has_main.append(self.host.main in streams)
            return None
        index, call.residuals_applied = call.residuals_applied, call.residuals_applied + 1
        return (start + generation.forecast(call, index, given.device)).to(given.dtype)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Keep and count what a call that has ended leaves behind."""
        call = self._thread.call
        if call is None or call.generation is None:
            return None
        generation, context = call.generation, call.context
        self._thread.call = None
        call.attention.end()
        if output is None:  # an exception ends the call, and most likely the run
            self.observer.after_exception()
            self._forget(call.trajectory)
            self._writes.restart()
            return None
        if call.replayed:
            if generation.is_planned(context.step) and generation.keeps(context.step):
                call.residuals = self.observer.residuals(context, call.device)
            generation.end(call)
            return self.observer.replayed(context, call.device)
        self.observer.after_call(call, output)
        if call.position != call.blocks:
            call.trajectory.doubt = BYPASSED
            generation.forget()
        else:
            generation.end(call)
        if call.trajectory.is_over:
            call.trajectory.forget_tensors()
            self.attention.forget(id(call.trajectory))
        told = call.told(moment(call.device))
        self.stats.add(told, id(call.trajectory), self.bytes_held)
        return None
