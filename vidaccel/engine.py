"""Attaches to one transformer, skips its blocks on reused steps, and undoes itself exactly.

On a computed step the blocks run untouched and the engine keeps the residual of the whole stack,
head input minus first block input, per guidance branch. On a reused step no block runs, and the
head gets the new first block input plus that residual, or a forecast of it. Taking it at the head
means that whatever a model adds between its blocks is inside the residual once, and never added
again.
"""

import json
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from vidaccel.clock import Clock, Tick, noise_grid
from vidaccel.errors import ScheduleError, UnsupportedPipelineError
from vidaccel.forecast import weights
from vidaccel.hosts import Head, HostSpec
from vidaccel.ledger import Call, Ledger
from vidaccel.plan import Plan, PlanSource, Setting
from vidaccel.shadow import Argument, BlockArguments, ShadowList
from vidaccel.tape import Tape

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

    def __init__(self, transformer: nn.Module, host: HostSpec, source: PlanSource) -> None:
        _refuse_unsupported(transformer)
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._transformer = weakref.ref(transformer)
        self.host = host
        self.source = source
        self.setting: Setting | None = None  # of the running or last generation, as is the plan
        self.plan: Plan | None = None
        self.tape: Tape | None = None  # set while a generation is recorded or run again
        self.ledger = Ledger(sum(len(getattr(transformer, b.name)) for b in host.blocks))
        self._pipelines: list[tuple[weakref.ref[Any], Any]] = []
        self._clock = Clock(host.branch)
        self._context: str | None = None
        self._handles: list[Any] = []
        self._history: dict[str, list[Residual]] = {}  # by branch, oldest first
        self._sigmas: tuple[float, ...] = ()
        self._sample = Argument.of_forward(type(transformer), host.sample)
        self._timestep = Argument.of_forward(type(transformer), host.timestep)
        # Of the running call:
        self._tick: Tick | None = None
        self._device = torch.device("cpu")
        self._started: Any = None
        self._entry: dict[str, torch.Tensor] | None = None
        self._fresh: list[torch.Tensor] = []
        self.reusing = False
        self.playing = False
        self.blocks_run = 0

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
        """What decides, and where the plan of the last generation came from."""
        origin = self.plan.origin if self.plan is not None else ""
        return f"{self.source.description}: {origin}" if origin else self.source.description

    @property
    def step(self) -> int | None:
        """The denoising step of the running call; None between calls."""
        return None if self._tick is None else self._tick.step

    def attach(self) -> None:
        """Start intercepting. Touches the instance `__dict__` and torch's own hook lists only."""
        model = self.transformer
        heads = [(head, model.get_submodule(head.module)) for head in self.host.heads]
        for spec in self.host.blocks:
            blocks = getattr(model, spec.name)
            streams = {name for head in self.host.heads for name in head.streams}
            arguments = BlockArguments(type(blocks[0]), streams, spec.returns)
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
        vars(model)[_ATTRIBUTE] = self

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        for name in (*(spec.name for spec in self.host.blocks), "cache_context", _ATTRIBUTE):
            vars(self.transformer).pop(name, None)
        self._history.clear()

    def serve(self, pipe: Any) -> None:
        """Follow the scheduler of `pipe`, which runs this transformer."""
        self._pipelines = [(ref, s) for ref, s in self._pipelines if ref() not in (None, pipe)]
        self._pipelines.append((weakref.ref(pipe), pipe.scheduler))

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines that were accelerated with this transformer and still exist."""
        return [pipe for ref, _ in self._pipelines if (pipe := ref()) is not None]

    @property
    def bytes_held(self) -> int:
        """Bytes of the residuals that are kept at this moment."""
        held = [residual for history in self._history.values() for residual in history]
        return sum(tensor.nbytes for residual in held for tensor in residual.tensors)

    @contextmanager
    def _cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Stands in for `CacheMixin.cache_context` to learn the name of the guidance branch."""
        outer, self._context = self._context, name
        try:
            with type(self.transformer).cache_context(self.transformer, name, **fields):
                yield
        finally:
            self._context = outer

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
        # Image conditioning gives its clean frames time 0; the step is that of the noisy ones.
        timestep = float(self._timestep.value(args, kwargs).max())
        sample = self._sample.value(args, kwargs)
        schedulers = [scheduler for _, scheduler in self._pipelines]
        tick = self._clock.tick(schedulers, timestep, self._context, tuple(sample.shape))
        if tick.restarted:
            self._history.clear()
            self.ledger.restart()
            self.setting = self._setting(tick)
            self._sigmas = self.setting.sigmas or ()
            self.plan = self.source.resolve(self.setting)
        assert self.plan is not None
        history = self._history.get(tick.branch)
        self.playing = self.tape is not None and self.tape.plays(tick.step)
        # A branch that sat out the last computed step has nothing that belongs here.
        fits = bool(history) and history[-1].step >= self.plan.anchor(tick.step)
        self.reusing = fits and not self.plan.computes(tick.step)
        self._tick, self._entry, self._fresh, self.blocks_run = tick, None, [], 0
        self._device = sample.device
        self._started = _mark(self._device)

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
        """Run one block, or give its streams back unchanged on a reused step."""
        if self._entry is None:
            # The first block of a forward: what it is given is where the residual starts.
            self._entry = {
                name: named.value(name, args, kwargs)
                for head in self.host.heads
                for name in head.streams
            }
        if self.reusing or self.playing:
            return named.passed_through(args, kwargs)
        self.blocks_run += 1
        return block(*args, **kwargs)

    def _at_head(
        self, index: int, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Before a head runs: keep the residual, or put the kept one in place of the blocks."""
        if self._entry is None or self._tick is None or self.plan is None or self.playing:
            return None
        kept = self.plan.keeps(self._tick.step) or (self.tape is not None and self.tape.recording)
        if not (self.reusing or kept):
            return None
        given = args[0]
        streams = [self._entry[name].to(given.device) for name in head.streams]
        start = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
        if start.shape != given.shape:
            raise UnsupportedPipelineError(
                f"the blocks of {type(self.transformer).__name__} take {tuple(start.shape)} but "
                f"its {head.module} gets {tuple(given.shape)}; context parallelism is not "
                "supported yet: restore(pipe) before enabling it"
            )
        if self.reusing:
            return ((start + self._forecast(index).to(given.device)).to(given.dtype), *args[1:])
        self._fresh.append((given - start).to(start.dtype))
        return None

    def _forecast(self, index: int) -> torch.Tensor:
        """The residual at head `index` of a reused step, from those of the computed ones."""
        assert self._tick is not None and self.plan is not None
        history, step = self._history[self._tick.branch], self._tick.step
        known = [self._sigmas[residual.step] for residual in history]
        order, scale = self.plan.order(step), self.plan.scale(step)
        coefficients = weights(known, self._sigmas[step], order, scale)
        *older, last = [
            (coefficient, residual.tensors[index])
            for coefficient, residual in zip(coefficients, history, strict=True)
            if coefficient
        ]
        if not older and last[0] == 1.0:
            return last[1]
        # Slopes are differences of nearly equal tensors: summed in float32.
        total = last[1].float() * last[0]
        for coefficient, tensor in older:
            total = total.add(tensor.float(), alpha=coefficient)
        return total

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tick, plan, tape = self._tick, self.plan, self.tape
        if tick is None or plan is None:
            return None
        history = self._history.setdefault(tick.branch, [])
        if tape is not None and self.playing:
            if plan.keeps(tick.step) and plan.computes(tick.step):
                kept = tape.residual(tick.step, tick.branch, self._device)
                history.append(Residual(tick.step, kept))
            del history[: max(0, len(history) - plan.keeps(tick.step))]
            return tape.played(tick.step, tick.branch, self._device)
        if tape is not None and tape.recording:
            tape.record(tick.step, tick.branch, output, self._fresh)
        if self._fresh:
            history.append(Residual(tick.step, self._fresh))
        del history[: max(0, len(history) - plan.keeps(tick.step))]
        self.ledger.add(
            Call(
                step=tick.step,
                branch=tick.branch,
                reused=self.reusing,
                planned=plan.computes(tick.step),
                blocks=self.blocks_run,
                started=self._started,
                ended=_mark(self._device),
            )
        )
        self._tick, self._entry, self._fresh, self.reusing = None, None, [], False
        return None


@dataclass(frozen=True)
class Residual:
    """Head input minus first block input of one computed step, one tensor per head."""

    step: int
    tensors: list[torch.Tensor]


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
