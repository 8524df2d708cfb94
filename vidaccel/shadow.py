"""Stand-ins for the block lists of a transformer, which decide whether a block runs.

A block list is shadowed in the transformer's instance `__dict__`, which wins over
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
    """Where a named argument is in a call."""

    name: str
    position: int

    @classmethod
    def of_forward(cls, module_class: type, name: str) -> "Argument":
        parameters = list(signature(module_class.forward).parameters)
        return cls(name, parameters.index(name) - 1)  # without self

    def value(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[self.name] if self.name in kwargs else args[self.position]


class BlockArguments:
    """Finds the streams in the arguments and results of the blocks of one list.

    Args:
        block_class: class of the blocks.
        streams: names of the streams that the transformer carries from block to block; those that
            these blocks take are found.
        returns: names of the arguments that a block returns the successors of, in order.

    Attributes:
        returned: `returns`, each name once.
    """

    def __init__(self, block_class: type, streams: set[str], returns: tuple[str, ...]) -> None:
        taken = streams & set(signature(block_class.forward).parameters)
        names = taken | set(returns)
        self._arguments = {name: Argument.of_forward(block_class, name) for name in names}
        self._taken = taken
        self._returns = returns
        self.returned = tuple(dict.fromkeys(returns))
        # The stream that the head reads, where the block returns it.
        self._main = next((name for name in returns if name in streams), returns[0])

    def value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._arguments[name].value(args, kwargs)

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The streams that go into a block, by name."""
        return {name: self.value(name, args, kwargs) for name in self._taken}

    def main(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The main stream that goes into a block."""
        return self.value(self._main, args, kwargs)

    def main_of(self, output: Any) -> Any:
        """The main stream that comes out of a block."""
        # The last of equal names is the stream that goes on to the next block.
        position = max(i for i, name in enumerate(self._returns) if name == self._main)
        return output[position] if len(self._returns) > 1 else output

    def passed_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block returns that leaves its streams unchanged."""
        values = tuple(self.value(name, args, kwargs) for name in self._returns)
        return values[0] if len(values) == 1 else values

    def replaced(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block with another value for one of its streams."""
        if name in kwargs:
            return args, {**kwargs, name: value}
        position = self._arguments[name].position
        return (*args[:position], value, *args[position + 1 :]), kwargs


class ShadowBlock:
    """Stands in for one block in the walk of the transformer's forward."""

    def __init__(
        self, blocks: nn.ModuleList, key: str, arguments: BlockArguments, run: RunBlock
    ) -> None:
        self._blocks, self._key, self._arguments, self._run = blocks, key, arguments, run

    @property
    def _block(self) -> Any:
        # Looked up at each call: wrappers such as FSDP replace entries of the list.
        return self._blocks._modules[self._key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._block, self._arguments, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_blocks", "_key"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self._block, name)


class ShadowList(nn.ModuleList):
    """Shadows a block list: iterating and indexing give `ShadowBlock`s.

    It stays an `nn.ModuleList` that shares the real list's entries, because `get_submodule`, which
    PEFT and Diffusers' hooks use, walks through attributes and insists on modules.

    Args:
        blocks: the real list.
        arguments: how to read the arguments of its blocks.
        run: decides for each call what happens.
    """

    def __init__(self, blocks: nn.ModuleList, arguments: BlockArguments, run: RunBlock) -> None:
        super().__init__()
        self._modules = blocks._modules
        # A plain attribute, out of sight of torch's own bookkeeping.
        self._shadows = [ShadowBlock(self, key, arguments, run) for key in self._modules]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._shadows)

    def __getitem__(self, index: Any) -> Any:
        return self._shadows[index]
