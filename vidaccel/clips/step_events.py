"""Follows the denoising steps of a pipeline that does not tell them.

Most Diffusers pipelines call back at the end of every step; some do not. All of them call their
transformer in every step with a time of the scheduler's table, and with the latents that the step
before has left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vidaccel.engine.block_proxies import Argument
from vidaccel.engine.step_tracker import Clock
from vidaccel.hosts.registry import HostSpec, find_transformers


@contextmanager
def steps_told(pipe: Any, ended: Callable[[int, Any], None]) -> Iterator[None]:
    """Have the steps of one call of a pipeline told.

    Args:
        pipe: a pipeline whose transformers are in the table.
        ended: called with index and latents of each step that has ended: when the next one begins,
            and for the last one, with None for latents, when the pipeline has returned. What it
            raises ends the run.
    """
    begun, running = 0, -1  # steps so far, and the place of the running one in the schedule
    clock: Clock | None = None

    def on_call(
        transformer: nn.Module, host: HostSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A transformer is called: if that begins a step, the one before it has ended."""
        nonlocal begun, running, clock
        clock = clock or Clock(host.branch, host.times)
        timestep, sample = (
            Argument.of_forward(type(transformer), name).value(args, kwargs)
            for name in (host.timestep, host.sample)
        )
        # Two experts take turns within one schedule, so one clock follows both.
        schedulers = [pipe.scheduler]
        tick = clock.tick(schedulers, clock.values(schedulers, timestep), None, ())
        if tick.step == running and not tick.restarted:
            return  # another guidance branch
        if begun:
            ended(begun - 1, _latents(sample, transformer))
        begun, running = begun + 1, tick.step

    handles = [
        # Before any other hook: an engine that begins another generation forgets its last one.
        transformer.register_forward_pre_hook(
            lambda module, args, kwargs, host=host: on_call(module, host, args, kwargs),
            with_kwargs=True,
            prepend=True,
        )
        for transformer, host in find_transformers(pipe).values()
    ]
    try:
        yield
        if begun:
            ended(begun - 1, None)
    finally:
        for handle in handles:
            handle.remove()


def _latents(sample: Any, transformer: nn.Module) -> Any:
    """The latents among what the transformer is given: conditions are joined behind them."""
    config = transformer.config
    given, made = config.in_channels, getattr(config, "out_channels", None)
    if not isinstance(sample, torch.Tensor) or sample.ndim != 5 or made is None or made >= given:
        return sample
    # Some pipelines have frames before channels.
    return sample.narrow(1 if sample.shape[1] == given else 2, 0, made)
