"""Puts an engine between a transformer and its blocks, and takes it out again.

Touches the transformer's instance `__dict__` and torch's own hook lists only.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from torch import nn

from vidaccel.engine import compat
from vidaccel.engine.block_proxies import BlockArguments, BlockListProxy
from vidaccel.engine.state import RunningCall
from vidaccel.hosts.spec import BlockList, Head, HostSpec


class ThreadState(threading.local):
    """The call that runs in one thread.

    Attributes:
        call: the running call of the transformer; None between calls.
        branch: the guidance branch as the pipeline names it.
    """

    call: RunningCall | None = None
    branch: str | None = None


class Listener(Protocol):
    """The interface that an attachment calls."""

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the transformer begins."""

    def run_block(
        self, block: nn.Module, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what a block returns in the running call."""

    def at_head(
        self, head: Head, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Return other arguments for a head; None for those that it has."""

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return another output for a call that has ended; None for the one that it has."""

    def end_generation(self) -> None:
        """A pipeline says that its generation has ended."""


class Attachment:
    """The hooks and proxies of one engine on one transformer.

    Args:
        transformer: the transformer.
        host: its row of the table.
        name: the attribute in which the transformer holds `listener`.
        listener: what is called.
        thread: is told the guidance branch, and tells whether the forward runs.
    """

    def __init__(
        self,
        transformer: nn.Module,
        host: HostSpec,
        name: str,
        listener: Listener,
        thread: ThreadState,
    ) -> None:
        # Weak: a cycle would keep the weights of a dropped pipeline, and what is held of its last
        # run, until the collector finds it.
        self._transformer, self._listener = weakref.ref(transformer), weakref.ref(listener)
        self._host, self._name, self._thread = host, name, thread
        self._handles: list[Any] = []

    @property
    def transformer(self) -> nn.Module:
        """The transformer."""
        transformer = self._transformer()
        assert transformer is not None  # it holds the listener, which holds this
        return transformer

    def attach(self) -> None:
        """Start intercepting."""
        model, listener = self.transformer, self._called()
        heads = [(head, model.get_submodule(head.module)) for head in self._host.heads]
        for spec in self._host.blocks:
            self._stand_in_for(spec)
        self._handles = [
            model.register_forward_pre_hook(listener.begin, with_kwargs=True),
            # Also after an exception, so that nothing of the run is held any longer.
            model.register_forward_hook(listener.end, always_call=True),
        ]
        for head, module in heads:
            hook = partial(listener.at_head, head)
            self._handles.append(module.register_forward_pre_hook(hook))
        if hasattr(model, "cache_context"):
            vars(model)["cache_context"] = self._cache_context
            vars(model)[compat.RESET_CACHE] = self._reset_cache
        vars(model)[self._name] = listener

    def detach(self) -> None:
        """Leave the transformer as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        lists = [spec.name for spec in self._host.blocks]
        attributes = self.transformer.__dict__
        for name in (*lists, "cache_context", compat.RESET_CACHE, self._name):
            attributes.pop(name, None)
        for name in lists:
            _take_out_of_modules(self.transformer, name)

    def follow(self) -> bool:
        """Stand in for block lists that were put in the place of others; tell whether there are."""
        model = self.transformer
        replaced = [
            spec
            for spec in self._host.blocks
            if not isinstance(vars(model).get(spec.name), BlockListProxy)
            and isinstance(getattr(model, spec.name), nn.ModuleList)
        ]
        for spec in replaced:
            self._stand_in_for(spec)
        return bool(replaced)

    def _stand_in_for(self, spec: BlockList) -> None:
        """Put a proxy in the place of a block list."""
        model = self.transformer
        _take_out_of_modules(model, spec.name)
        blocks = getattr(model, spec.name)
        arguments = BlockArguments(
            compat.original_class(blocks[0]),
            self._host.streams,
            self._host.main,
            spec.returns,
            spec.joins,
        )
        thread = self._thread
        vars(model)[spec.name] = BlockListProxy(
            blocks, arguments, self._called().run_block, lambda: thread.call is not None
        )

    def _called(self) -> Listener:
        listener = self._listener()
        assert listener is not None  # it holds this
        return listener

    @contextmanager
    def _cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Stand in for `CacheMixin.cache_context` to learn the name of the guidance branch."""
        outer, self._thread.branch = self._thread.branch, name
        own: Any = type(self.transformer)
        try:
            with own.cache_context(self.transformer, name, **fields):
                yield
        finally:
            self._thread.branch = outer

    def _reset_cache(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for the method that pipelines call when a generation has ended."""
        compat.reset_cache(self.transformer, *args, **kwargs)
        self._called().end_generation()


def _take_out_of_modules(model: nn.Module, name: str) -> None:
    """Put the list back that a proxy stands for.

    Who swaps the lists of a model for a while, as other caches do, puts back what was there: the
    proxy, and among the modules.
    """
    present = model._modules.get(name)
    if isinstance(present, BlockListProxy):
        model._modules[name] = present.blocks
