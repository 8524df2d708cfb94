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
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from vidaccel.clock import Clock, Tick, noise_grid
from vidaccel.dbcache import FIRST, PLANNED, DBCache, Decider
from vidaccel.errors import ScheduleError, UnsupportedPipelineError
from vidaccel.hosts import Head, HostSpec
from vidaccel.ledger import Call, Ledger
from vidaccel.plan import Plan, Setting
from vidaccel.residuals import Residuals
from vidaccel.shadow import Argument, BlockArguments, ShadowList
from vidaccel.sources import CourseSource
from vidaccel.tape import Tape

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

    Raises:
        UnsupportedPipelineError: when the transformer is in a state that the engine cannot work
            with; nothing has been changed then.
    """

    def __init__(self, transformer: nn.Module, host: HostSpec, source: CourseSource) -> None:
        _refuse_unsupported(transformer)
        source.check(transformer, host)
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._transformer = weakref.ref(transformer)
        self.host = host
        self.source = source
        self.setting: Setting | None = None  # of the running or last generation, as are these two
        self.plan: Plan | None = None
        self.cache: DBCache | None = None
        self._origin = ""
        self.tape: Tape | None = None  # set while a generation is recorded or run again
        self.on_probe: ProbeListener | None = None  # is told every probe residual
        self.ledger = Ledger(host.block_count(transformer))
        self._pipelines: list[tuple[weakref.ref[Any], Any]] = []
        self._clock = Clock(host.branch)
        self._context: str | None = None
        self._handles: list[Any] = []
        self._residuals = Residuals()
        self._probes: dict[str, torch.Tensor] = {}  # of the last computed step, by branch
        self._deciders: dict[str, Decider] = {}
        self._sigmas: tuple[float, ...] = ()
        self._sample = Argument.of_forward(type(transformer), host.sample)
        self._timestep = Argument.of_forward(type(transformer), host.timestep)
        self._call: _RunningCall | None = None

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
        return (
            f"{self.source.description}: {self._origin}"
            if self._origin
            else self.source.description
        )

    @property
    def step(self) -> int | None:
        """The denoising step of the running call; None between calls."""
        return None if self._call is None else self._call.tick.step

    @property
    def bytes_held(self) -> int:
        """Bytes of the cached tensors that are kept at this moment."""
        return self._residuals.bytes_held + sum(probe.nbytes for probe in self._probes.values())

    def attach(self) -> None:
        """Start intercepting. Touches the instance `__dict__` and torch's own hook lists only."""
        model = self.transformer
        heads = [(head, model.get_submodule(head.module)) for head in self.host.heads]
        for spec in self.host.blocks:
            blocks = getattr(model, spec.name)
            arguments = BlockArguments(type(blocks[0]), self.host.streams, spec.returns)
            vars(model)[spec.name] = ShadowList(blocks, arguments, self._run_block)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for index, (head, module) in enumerate(heads):
            hook = partial(self._at_head, index, head)
            self._handles.append(module.register_forward_pre_hook(hook))
        if hasattr(model, "cache_context"):
            vars(model)["cache_context"] = self._cache_context
            vars(model)["_reset_stateful_cache"] = self._reset_stateful_cache
        vars(model)[_ATTRIBUTE] = self

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        shadowed = ("cache_context", "_reset_stateful_cache", _ATTRIBUTE)
        for name in (*(spec.name for spec in self.host.blocks), *shadowed):
            vars(self.transformer).pop(name, None)
        self._forget()

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
        self._forget()

    def _forget(self) -> None:
        self._residuals.clear()
        self._probes.clear()
        self._deciders.clear()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise UnsupportedPipelineError(_WHOLE_MODEL)
        if getattr(model, "_cache_config", None) is not None:
            raise UnsupportedPipelineError(_NATIVE_CACHE)
        for ref, scheduler in self._pipelines:
            pipe = ref()
            if pipe is not None and pipe.scheduler is not scheduler:
                raise ScheduleError(
                    f"the scheduler of this pipeline was {type(scheduler).__name__} when it was "
                    f"accelerated and is another {type(pipe.scheduler).__name__} now: call "
                    "vidaccel.accelerate(pipe) again after replacing it"
                )
        sample = self._sample.value(args, kwargs)
        schedulers = [scheduler for _, scheduler in self._pipelines]
        timestep = self._clock.value(schedulers, self._timestep.value(args, kwargs))
        tick = self._clock.tick(schedulers, timestep, self._context, tuple(sample.shape))
        if tick.restarted:
            self._restart(tick)
        call = _RunningCall(tick, sample.device, _mark(sample.device))
        call.playing = self.tape is not None and self.tape.plays(tick.step)
        if not call.playing:
            self._propose(call)
        self._call = call

    def _restart(self, tick: Tick) -> None:
        """Begin a generation: nothing that was kept belongs to it."""
        self._forget()
        self.ledger.restart()
        self.setting = self._setting(tick)
        self._sigmas = self.setting.sigmas or ()
        course = self.source.resolve(self.setting, self.host)
        self.plan, self.cache, self._origin = course.plan, course.cache, course.origin
        self._residuals = Residuals("device" if self.cache is None else self.cache.store)

    @property
    def _probe_blocks(self) -> int:
        return 0 if self.cache is None else self.cache.probe_blocks

    @property
    def _corrector_blocks(self) -> int:
        return 0 if self.cache is None else self.cache.corrector_blocks

    def _decider(self, branch: str) -> Decider | None:
        if self.cache is None or not self.cache.probe_blocks:
            return None
        key = "" if self.cache.branches == "together" else branch
        if key not in self._deciders:
            self._deciders[key] = Decider(self.cache, guards=self.plan is not None)
        return self._deciders[key]

    def _propose(self, call: "_RunningCall") -> None:
        """What is known about a call before its first block: reused, computed, or to be decided."""
        step, branch = call.tick.step, call.tick.branch
        decider = self._decider(branch)
        decided = None if decider is None else decider.decided(step)
        if self.plan is not None and self.plan.computes(step):
            call.compute(PLANNED)
        elif decided is False:
            call.compute(decider.reason)
        elif not self._fits(branch, step):
            call.compute(FIRST)
        elif decider is None or decided:
            call.reused = True
        elif (obstacle := decider.obstacle(step)) is not None:
            call.compute(obstacle)
        else:
            call.undecided = True
            return
        if decider is not None and decided is None:
            decider.settle(step, call.reason)

    def _fits(self, branch: str, step: int) -> bool:
        """Whether the branch has a residual that a reused step may use."""
        last = self._residuals.last_step(branch)
        if last is None:
            return False
        # A branch that sat out the last computed step has nothing that belongs here.
        decider = self._decider(branch)
        anchor = -1 if self.plan is None else self.plan.anchor(step)
        return last >= max(anchor, -1 if decider is None else decider.computed_at)

    def _setting(self, tick: Tick) -> Setting:
        """The running generation, for policies that are made for a certain one."""
        scheduler = self._clock.scheduler
        config = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        names = {getattr(pipe, "name_or_path", None) for pipe in self.pipelines}
        model_id = next((name for name in names if name and not Path(name).exists()), None)
        return Setting(
            tick.num_inference_steps,
            transformer=type(self.transformer).__name__,
            model_id=model_id,
            config_hash=sha256(text.encode()).hexdigest(),
            scheduler=type(scheduler).__name__,
            sigmas=noise_grid(scheduler, tick.num_inference_steps),
        )

    def _run_block(
        self, block: nn.Module, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one block, or give its streams back unchanged in the middle of a reused step."""
        call = self._call
        if call is None:
            return block(*args, **kwargs)
        index, call.position = call.position, call.position + 1
        if call.playing:
            return named.passed_through(args, kwargs)
        corrector = self.ledger.blocks - self._corrector_blocks
        if index == 0 and self._probe_blocks:
            call.probed = named.main(args, kwargs)
        if index == self._probe_blocks:
            call.entry = named.streams(args, kwargs)
            if call.undecided:
                self._decide(call)
        if index == corrector:
            args, kwargs = self._at_corrector(call, named, args, kwargs)
        elif call.reused and self._probe_blocks <= index < corrector:
            return named.passed_through(args, kwargs)
        call.blocks_run += 1
        output = block(*args, **kwargs)
        if index == self._probe_blocks - 1:
            self._probe(call, named.main_of(output))
        return output

    def _probe(self, call: "_RunningCall", output: torch.Tensor) -> None:
        """After the last probe block: how much its residual has changed."""
        assert self.cache is not None
        branch, stride = call.tick.branch, self.cache.probe_stride
        probe = (output - call.probed.to(output.device))[:, ::stride]
        if self.on_probe is not None:
            self.on_probe(call.tick, probe)
        last = self._probes.get(branch)
        if last is not None and last.shape == probe.shape:
            change = (last.float() - probe.float()).abs().mean()
            call.difference = change / last.float().abs().mean()
        call.probed = probe

    def _decide(self, call: "_RunningCall") -> None:
        """Hold the difference of an undecided step against the threshold."""
        decider = self._decider(call.tick.branch)
        assert decider is not None
        difference = float("nan") if call.difference is None else float(call.difference)
        call.undecided, call.reused = False, True
        if (objection := decider.objection(difference)) is not None:
            call.compute(objection)
        decider.settle(call.tick.step, call.reason, difference)

    def _at_corrector(
        self,
        call: "_RunningCall",
        named: BlockArguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the first corrector block: keep the residual, or put the kept one in its place."""
        for index, name in enumerate(named.returned):
            given = named.value(name, args, kwargs)
            start = call.entry[name].to(given.device)
            if call.reused:
                filled = start + self._forecast(call, index, given.device)
                args, kwargs = named.replaced(name, filled.to(given.dtype), args, kwargs)
            elif self._keeps(call.tick.step):
                call.fresh.append(given - start)
        return args, kwargs

    def _at_head(
        self, index: int, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Before a head runs: keep the residual, or put the kept one in place of the blocks."""
        call = self._call
        if call is None or not call.entry or call.playing or self._corrector_blocks:
            return None
        if not (call.reused or self._keeps(call.tick.step)):
            return None
        given = args[0]
        streams = [call.entry[name].to(given.device) for name in head.streams]
        start = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
        if start.shape != given.shape:
            raise UnsupportedPipelineError(
                f"the blocks of {type(self.transformer).__name__} take {tuple(start.shape)} but "
                f"its {head.module} gets {tuple(given.shape)}; context parallelism is not "
                "supported yet: restore(pipe) before enabling it"
            )
        if call.reused:
            filled = start + self._forecast(call, index, given.device)
            return (filled.to(given.dtype), *args[1:])
        call.fresh.append((given - start).to(start.dtype))
        return None

    def _forecast(self, call: "_RunningCall", index: int, device: torch.device) -> torch.Tensor:
        step, branch = call.tick.step, call.tick.branch
        if self.plan is not None:
            order = self.plan.order(step)
        else:
            assert self.cache is not None
            order = self.cache.forecast_order
        return self._residuals.forecast(branch, index, self._sigmas[step], order, device)

    def _keeps(self, step: int) -> int:
        """How many of the last residuals, that of `step` included, later steps may ask for."""
        if self.plan is not None:
            return self.plan.keeps(step)
        if self.cache is None or self._is_last(step):
            return 0
        return self.cache.forecast_order + 1

    def _is_last(self, step: int) -> bool:
        assert self.setting is not None
        return step == self.setting.num_inference_steps - 1

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, tape = self._call, self.tape
        if call is None:
            return None
        tick = call.tick
        self._call = None
        if tape is not None and call.playing:
            return tape.played(tick.step, tick.branch, call.device)
        if tape is not None and tape.recording:
            tape.record(tick.step, tick.branch, output)
        if call.fresh:
            self._residuals.add(tick.branch, tick.step, self._sigmas[tick.step], call.fresh)
        self._residuals.trim(tick.branch, self._keeps(tick.step))
        if self._probe_blocks and not call.reused:
            self._probes[tick.branch] = call.probed
        if self._is_last(tick.step):
            self._probes.pop(tick.branch, None)
        self.ledger.add(
            Call(
                step=tick.step,
                branch=tick.branch,
                reused=call.reused,
                planned=self.plan is None or self.plan.computes(tick.step),
                blocks=call.blocks_run,
                started=call.started,
                ended=_mark(call.device),
                reason="" if call.reused else call.reason,
                difference=call.difference,
            ),
            self.bytes_held,
        )
        return None


@dataclass
class _RunningCall:
    """One call of the transformer while it runs.

    Attributes:
        tick, device, started: its place, and when and where it began.
        playing: a recorded output is given back, and nothing runs.
        reused: the middle blocks do not run.
        undecided: the difference of the probe blocks will say which of the two.
        reason: why it is computed.
        position: blocks reached so far.
        blocks_run: of them, those that ran.
        probed: the main stream at the first block, then the residual of the probe blocks.
        difference: relative change of that residual, a scalar tensor.
        entry: the streams at the first middle block.
        fresh: the residual of this step, one tensor per head or stream.
    """

    tick: Tick
    device: torch.device
    started: Any
    playing: bool = False
    reused: bool = False
    undecided: bool = False
    reason: str = ""
    position: int = 0
    blocks_run: int = 0
    probed: Any = None
    difference: torch.Tensor | None = None
    entry: dict[str, torch.Tensor] = field(default_factory=dict)
    fresh: list[torch.Tensor] = field(default_factory=list)

    def compute(self, reason: str) -> None:
        """Have every block run."""
        self.reused, self.reason = False, reason


def _mark(device: torch.device) -> Any:
    """A moment on the device's own time line, without waiting for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UnsupportedPipelineError(
            "context parallelism is not supported yet: accelerate a pipeline that runs on one GPU"
        )
