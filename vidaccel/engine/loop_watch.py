"""Notices where the denoising loop of a pipeline begins, and when it has ended, in whatever way.

What happens outside of the transformer is not seen by hooks on it: that another one is in its
place, or that a callback or a scheduler has ended the run with an exception. All pipelines make a
progress bar right before their loop, and close it right after, in an exception too.
"""

import copy
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from vidaccel.engine import compat

_METHOD = "progress_bar"


class Listener(Protocol):
    """The interface that is called at the end of a loop."""

    @property
    def transformer(self) -> nn.Module:
        """The transformer that a pipeline should be running."""

    def end_generation(self, scheduler: Any, thread: int) -> None:
        """A loop that this scheduler drove in this thread has ended."""


def watch_loops(pipelines: Iterable[Any], listener: Listener) -> None:
    """Tell `listener` about the loops of pipelines that hold its transformer.

    Each gets an attribute of its own, until `unwatch_loops` takes it away.
    """
    model = listener.transformer
    for pipe in pipelines:
        names = [name for name, part in pipe.components.items() if _holds(part, model)]
        for owner in compat.owners_of_loops(pipe):
            watch = vars(owner).get(_METHOD)
            if not isinstance(watch, LoopWatch):
                watch = vars(owner)[_METHOD] = LoopWatch(owner, pipe, watch)
            for name in names:
                watch.listeners[name] = (weakref.ref(model), weakref.ref(listener))


def unwatch_loops(pipelines: Iterable[Any], listener: Listener | None = None) -> None:
    """Undo `watch_loops` for one listener, or for all of them."""
    for owner in (owner for pipe in pipelines for owner in compat.owners_of_loops(pipe)):
        watch = vars(owner).get(_METHOD)
        if isinstance(watch, LoopWatch):
            for name, (_, known) in list(watch.listeners.items()):
                if listener is None or known() in (listener, None):
                    del watch.listeners[name]
            if not watch.listeners:
                watch.take_out(owner)


class LoopWatch:
    """Stands in for the method with which a pipeline makes its progress bar.

    Args:
        owner: what has the method: the pipeline, or the part of a modular one that loops.
        pipe: the pipeline.
        before: what `owner` had in the place of the method of its class; None for nothing.

    Attributes:
        listeners: by name of the component, the transformer that it was and who is told.
    """

    def __init__(self, owner: Any, pipe: Any, before: Any) -> None:
        # Weak: a cycle would keep the weights of a dropped pipeline until the collector finds it.
        self._owner, self._pipe = weakref.ref(owner), weakref.ref(pipe)
        self._class, self._before = type(owner), before
        self.listeners: dict[str, tuple[weakref.ref[nn.Module], weakref.ref[Listener]]] = {}
        self._running: dict[int, object] = {}  # by thread

    def take_out(self, owner: Any) -> None:
        """Leave `owner` as it was."""
        if self._before is None:
            del vars(owner)[_METHOD]
        else:
            vars(owner)[_METHOD] = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the progress bar of a loop that begins."""
        bar = self._make(*args, **kwargs)
        pipe = self._pipe()
        if pipe is None or not hasattr(bar, "close"):
            return bar
        self._look_for_others(pipe)
        loop, thread, scheduler = object(), threading.get_ident(), pipe.scheduler
        self._running[thread] = loop

        def end() -> None:
            # A bar that is closed only when it is collected may come after the next loop began.
            if self._running.get(thread) is loop:
                del self._running[thread]
                for _, known in list(self.listeners.values()):
                    if (listener := known()) is not None:
                        listener.end_generation(scheduler, thread)

        bar.__class__ = _telling(type(bar))
        bar.vidaccel_end = end
        return bar

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Stand in the copy of `owner` for nothing that leads to the original."""
        before = copy.deepcopy(self._before, memo)
        copied = memo.get(id(self._owner()))
        return before or getattr(self._class, _METHOD).__get__(copied)

    def _make(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            return self._before(*args, **kwargs)
        # A shallow copy of a pipeline has this attribute too, and may be all that is left.
        owner = self._owner() or object.__new__(self._class)
        return getattr(self._class, _METHOD)(owner, *args, **kwargs)

    def _look_for_others(self, pipe: Any) -> None:
        """Warn where another transformer is in the place of the one that was accelerated."""
        for name, (known, _) in self.listeners.items():
            part = getattr(pipe, name, None)
            if part is not None and not _holds(part, known()):
                warnings.warn(
                    f"{name} of this {type(pipe).__name__} is another {type(part).__name__} than "
                    "the one that was accelerated, so it runs as it is: call "
                    "vidaccel.accelerate(pipe) again after replacing it, or vidaccel.restore(pipe)",
                    stacklevel=3,
                )


def _holds(part: Any, model: nn.Module | None) -> bool:
    """Tell whether a component is a transformer, or has it inside, compiled or with adapters."""
    if model is None or not isinstance(part, nn.Module):
        return False
    return part is model or any(module is model for module in part.modules())


def _telling(bar: type) -> type:
    """The class of progress bars that tell when they are closed, derived from that of a bar."""

    class Bar(bar):  # type: ignore[misc]
        def close(self) -> None:
            try:
                super().close()
            finally:
                if end := self.__dict__.pop("vidaccel_end", None):
                    end()

    Bar.__name__, Bar.__qualname__ = bar.__name__, bar.__qualname__
    return Bar
