"""Proxies for the block lists of a transformer, which decide whether a block runs.

A block list is replaced in the transformer's instance `__dict__`, which wins over
`nn.Module.__getattr__`, by a list of the same length whose entries decide *outside* of each block
whether it runs. Nothing that lives in `_modules` changes, so state dict, module names, offload
hooks, LoRA layers and compiled blocks stay as they are, and a block compiled with `fullgraph=True`
stays one graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

# block, how to read its arguments, args, kwargs -> what the block returns
RunBlock = Callable[[nn.Module, "BlockArguments", tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Argument:
    """The place of a named argument in a call."""

    name: str
    position: int

    @classmethod
    def of_forward(cls, module_class: type[nn.Module], name: str) -> "Argument":
        """Find an argument of the forward of a class."""
        parameters = list(signature(module_class.forward).parameters)
        return cls(name, parameters.index(name) - 1)  # without self

    @classmethod
    def find(cls, module_class: type[nn.Module], name: str | None) -> "Argument | None":
        """Find an argument as `of_forward` does; None where there is none of that name."""
        known = signature(module_class.forward).parameters
        return cls.of_forward(module_class, name) if name is not None and name in known else None

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return its value in a call; None when it is not given."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None


class BlockArguments:
    """Finds the streams in the arguments and results of the blocks of one list.

    Args:
        block_class: the class of the blocks.
        streams: names of the streams that the transformer carries from block to block; those that
            these blocks take are found.
        main: the one that becomes the result.
        returns: names of the arguments that a block returns the successors of, in order.
        joins: the streams that its main one continues, joined along the tokens; empty when it
            continues the one of its own name.

    Attributes:
        returned: `returns`, each name once.
    """

    def __init__(
        self,
        block_class: type[nn.Module],
        streams: set[str],
        main: str,
        returns: tuple[str, ...],
        joins: tuple[str, ...] = (),
    ) -> None:
        taken = streams & set(signature(block_class.forward).parameters)
        names = taken | set(returns)
        self._arguments = {name: Argument.of_forward(block_class, name) for name in names}
        self._taken = taken
        self._returns = returns
        self.returned = tuple(dict.fromkeys(returns))
        self._main = main if main in returns else returns[0]
        self._joins = joins

    def value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a stream that goes into a block."""
        return self._arguments[name].value(args, kwargs)

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the streams that go into a block, by name."""
        return {name: self.value(name, args, kwargs) for name in self._taken}

    def main(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the main stream that goes into a block."""
        return self.value(self._main, args, kwargs)

    def origin(self, name: str) -> tuple[str, ...]:
        """Return the streams of the first blocks that stream `name` of these continues."""
        return self._joins if self._joins and name == self._main else (name,)

    def outputs(self, output: Any) -> dict[str, Any]:
        """Return what a block has returned, by the names of its streams."""
        values = output if len(self._returns) > 1 else (output,)
        return dict(zip(self._returns, values, strict=True))

    def output(self, streams: dict[str, Any]) -> Any:
        """Return what a block does that hands on these streams."""
        values = tuple(streams[name] for name in self._returns)
        return values[0] if len(values) == 1 else values

    def passed_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a block does that leaves its streams unchanged."""
        return self.output({name: self.value(name, args, kwargs) for name in self.returned})

    def replaced(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a block with another value for one of its streams."""
        if name in kwargs:
            return args, {**kwargs, name: value}
        position = self._arguments[name].position
        return (*args[:position], value, *args[position + 1 :]), kwargs


class BlockProxy:
    """Stands in for one block while the transformer's forward walks through its list.

    What is read from, assigned to or deleted from it is so of the block, and it is of its class.
    """

    __slots__ = ("_arguments", "_blocks", "_key", "_run")

    _blocks: "BlockListProxy"
    _key: str
    _arguments: BlockArguments
    _run: RunBlock

    def __init__(
        self, blocks: "BlockListProxy", key: str, arguments: BlockArguments, run: RunBlock
    ) -> None:
        for name, value in (
            ("_blocks", blocks),
            ("_key", key),
            ("_arguments", arguments),
            ("_run", run),
        ):
            object.__setattr__(self, name, value)

    @property
    def _block(self) -> Any:
        # Looked up at each call: wrappers such as FSDP replace entries of the list.
        return self._blocks.blocks._modules[self._key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._block, self._arguments, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._block, name)


class BlockListProxy(nn.ModuleList):
    """Stands in for a block list: gives `BlockProxy`s while the transformer's forward runs.

    To everybody else it is the list itself: its entries are the blocks, and what is assigned,
    added, replaced or deleted is so in the list. It is an `nn.ModuleList` that shares the list's
    entries, because `get_submodule`, which PEFT and Diffusers' hooks use, walks through attributes
    and insists on modules.

    Args:
        blocks: the real list.
        arguments: how to read the arguments of its blocks.
        run: decides for each call what happens.
        walking: tells whether the transformer's forward is running in this thread.
    """

    _arguments: BlockArguments
    _run: RunBlock
    _walking: Callable[[], bool]

    def __init__(
        self,
        blocks: nn.ModuleList,
        arguments: BlockArguments,
        run: RunBlock,
        walking: Callable[[], bool],
    ) -> None:
        super().__init__()
        # In the instance dictionary, out of sight of torch's own bookkeeping.
        vars(self).update(_real=blocks, _arguments=arguments, _run=run, _walking=walking)
        self._modules = blocks._modules
        self._proxies: dict[str, BlockProxy] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        """The real list."""
        real: nn.ModuleList = vars(self)["_real"]
        return real

    def _entries(self) -> list[Any]:
        entries = []
        for key in self.blocks._modules:
            if key not in self._proxies:
                self._proxies[key] = BlockProxy(self, key, self._arguments, self._run)
            entries.append(self._proxies[key])
        return entries

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries() if self._walking() else self.blocks)

    def __getitem__(self, index: Any) -> Any:
        return self._entries()[index] if self._walking() else self.blocks[index]

    def __delitem__(self, index: Any) -> None:
        del self.blocks[index]
        self._modules = self.blocks._modules  # which is another dictionary now
