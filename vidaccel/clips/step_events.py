"""The ends of denoising steps, for pipelines without a step callback.

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
from vidaccel.engine.step_tracker import StepTracker
from vidaccel.hosts.registry import find_transformers
from vidaccel.hosts.spec import HostSpec


@contextmanager
def follow_steps(pipe: Any, on_step_end: Callable[[int, Any], None]) -> Iterator[None]:
    """Call back at the end of each denoising step of one call of a pipeline.

    Args:
        pipe: a pipeline whose transformers are in the table.
        on_step_end: called with index and latents of each step that has ended: when the next one
            begins, and for the last one, with None for latents, when the pipeline has returned.
            What it raises ends the run.
    """
    begun, running = 0, -1  # steps so far, and the index of the running one in the schedule
    tracker: StepTracker | None = None

    def on_call(
        transformer: nn.Module, host: HostSpec, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """End the running step if this call of a transformer begins another."""
        nonlocal begun, running, tracker
        # Two experts take turns within one schedule, so one tracker follows both.
        tracker = tracker or StepTracker(pipe.scheduler, host.times, host.levels)
        timestep, sample = (
            Argument.of_forward(type(transformer), name).value(args, kwargs)
            for name in (host.timestep, host.sample)
        )
        values = tracker.read(timestep)
        if values is None or not tracker.fits(values):
            return
        place = tracker.place(values)
        if place.step == running and not place.restarted:
            return  # another guidance branch
        if begun:
            on_step_end(begun - 1, _latents(sample, transformer))
        begun, running = begun + 1, place.step

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
            on_step_end(begun - 1, None)
    finally:
        for handle in handles:
            handle.remove()


def _latents(sample: Any, transformer: nn.Module) -> Any:
    """Return the latents among what a transformer is given: conditions are joined behind them.

    Args:
        sample: the argument that holds them, in video models [B, C, F, H, W] or [B, F, C, H, W].
        transformer: the one that is called.
    """
    config: Any = transformer.config
    given, made = config.in_channels, getattr(config, "out_channels", None)
    if not isinstance(sample, torch.Tensor) or sample.ndim != 5 or made is None or made >= given:
        return sample
    # Some pipelines have frames before channels.
    return sample.narrow(1 if sample.shape[1] == given else 2, 0, made)
