"""Runs the Gluon kernel of `hopper_attention` on the CPU, with a model of what it is made of.

Triton's interpreter knows no Gluon, so nothing else can run this kernel without its GPU. The
functions are taken from the text of their module, and find what is defined here under the names of
Gluon's. The model is slower than a GPU in all that may be late there: what is copied arrives when
it is waited for, and not before; a product reads its operands until it is waited for. A kernel that
relies on more fails an assertion here, where on a GPU it would go wrong now and then.

Layouts are nothing here, and all warps run in step. What they have read of shared memory is written
again only behind a barrier: that of `wait_group`, or else one that Triton's compiler puts before
the write, as it does between one walk and the next. So the model asks for no barrier.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vidaccel.kernels import hopper_attention

# Where the model's numbers lack what Gluon's have.
_SPELLINGS = {
    "scores.type.layout": "None",
    "start.to(gl.int64)": "torch.as_tensor(start).to(gl.int64)",
}


@dataclass
class Pointer:
    """A place in a tensor, or a tensor of places."""

    memory: Tensor
    offsets: Any = 0

    def __add__(self, offsets):
        return Pointer(self.memory, self.offsets + offsets)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.memory.dtype)

    def places(self, mask) -> tuple[Tensor, Tensor]:
        """Return the places, 0 where the mask hides them, and the mask; none out of bounds."""
        offsets = torch.as_tensor(self.offsets)
        mask = torch.as_tensor(True if mask is None else mask).expand(offsets.shape)
        shown = offsets[mask]
        within = ((shown >= 0) & (shown < self.memory.numel())).all()
        assert within, f"out of bounds of {self.memory.numel()}"
        return torch.where(mask, offsets, 0).long(), mask


def _flat(x: Tensor) -> Tensor:
    """Return the memory from the first number of a tensor on, however its axes lie."""
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((size,), (1,))


def _load(pointer: Pointer, mask=None, other=0) -> Tensor:
    """Read what lies in places, `other` where the mask hides them."""
    places, mask = pointer.places(mask)
    found = pointer.memory[places]
    return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, values: Tensor, mask=None) -> None:
    """Write to places, but for those that the mask hides."""
    places, mask = pointer.places(mask)
    pointer.memory[places[mask]] = values.expand(places.shape)[mask]


@dataclass
class Shared:
    """Shared memory, or a stage of a ring of it. Holds NaN until something is written."""

    values: Tensor

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def index(self, stage) -> Shared:
        return Shared(self.values[int(stage)])

    def permute(self, order) -> Shared:
        return Shared(self.values.permute(order))

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)

    def overlaps(self, other: Shared) -> bool:
        """Tell whether it is the same memory, or the same stage."""
        return self.values.data_ptr() == other.values.data_ptr()


class Product:
    """A product under way. It is no tensor: nothing can use it before it has been waited for."""

    @classmethod
    def __torch_function__(cls, function, *args, **kwargs):
        raise AssertionError("a product is read before it has ended")

    def __init__(self, a: Any, b: Shared, acc: Tensor) -> None:
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        left = a.values if isinstance(a, Shared) else a
        self.value = acc + left.float() @ b.values.float()
        self.done = False

    def finish(self) -> None:
        """Let its value be used, if the operands had been there."""
        assert not self.value.isnan().any(), "a product of what has not been copied yet"
        self.done = True


@dataclass
class Machine:
    """What is under way in one program: copies, groups of them that are closed, and products.

    Its methods have the names of Gluon's functions.
    """

    copies: list[tuple[Shared, Tensor]] = field(default_factory=list)
    groups: list[list[tuple[Shared, Tensor]]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def async_copy_global_to_shared(self, stage: Shared, pointer: Pointer, mask=None) -> None:
        """Start a copy: what was there is gone, and what is to be there has not come."""
        read = [operand for product in self.products for operand in product.operands]
        assert not any(map(stage.overlaps, read)), "a product reads what is written"
        self.copies.append((stage, _load(pointer, mask)))
        stage.values.fill_(float("nan"))

    def commit_group(self) -> None:
        """Close the group of the copies that were started."""
        self.groups.append(self.copies)
        self.copies = []

    def wait_group(self, pending: int) -> None:
        """Let copies arrive until so many groups are under way."""
        assert not self.copies, "a wait amid a group"
        while len(self.groups) > pending:
            for stage, values in self.groups.pop(0):
                stage.store(values)

    def warpgroup_mma(self, a, b, acc, *, use_acc: bool = True, is_async: bool) -> Product:
        """Start a product of rows, in registers or shared memory, and shared memory."""
        assert is_async
        product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        self.products.append(product)
        return product

    def warpgroup_mma_wait(self, pending: int, deps: list[Any]) -> Any:
        """Let products end until so many are under way, and return those that are asked for."""
        while len(self.products) > pending:
            self.products.pop(0).finish()
        found = tuple(x.value if isinstance(x, Product) and x.done else x for x in deps)
        return found[0] if len(found) == 1 else found

    def assert_idle(self) -> None:
        """Fail where a program would end with something under way."""
        assert not (self.copies or self.groups or self.products), "left under way"


def _tensors(function):
    """Let a function of torch take plain numbers."""
    return lambda *args: function(*map(torch.as_tensor, args))


def _no_layout(*args, **kwargs) -> None:
    """Stand for a layout: it says where numbers lie, not which."""


def _language(program: int) -> SimpleNamespace:
    """Return what the kernel calls `gl`, for one program."""
    layouts = ("Blocked", "NVMMADistributed", "Slice", "NVMMAShared", "DotOperand")
    return SimpleNamespace(
        **{f"{name}Layout": _no_layout for name in layouts},
        constexpr=lambda x: x,
        program_id=lambda axis: torch.tensor(program),
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        static_range=range,
        arange=lambda begin, end, layout: torch.arange(begin, end),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.full(shape, float("nan"), dtype=dtype)
        ),
        convert_layout=lambda x, layout: x,
        load=_load,
        store=_store,
        maximum=_tensors(torch.maximum),
        minimum=_tensors(torch.minimum),
        where=_tensors(torch.where),
        max=torch.amax,
        sum=torch.sum,
        exp2=torch.exp2,
        log2=torch.log2,
    )


def kernel_source() -> str:
    """Return the text of the module with the kernel."""
    return Path(hopper_attention.__file__).read_text()


def _namespace(source: str) -> dict[str, Any]:
    """Define all that a text of the module defines, with the model in the place of Gluon."""
    for gluons, ours in _SPELLINGS.items():
        assert gluons in source, f"{gluons} is gone: then the model need not replace it"
        source = source.replace(gluons, ours)
    body = [x for x in ast.parse(source).body if not isinstance(x, (ast.Import, ast.ImportFrom))]
    code = compile(ast.Module(body, []), "<model>", "exec", annotations.compiler_flag)
    namespace = vars(hopper_attention) | {
        "gl": _language(0),  # for the constants
        "gluon": SimpleNamespace(jit=lambda function=None, **options: function or (lambda f: f)),
        "launch": _launch,
        "fence_async_shared": lambda: None,
    }
    exec(code, namespace)
    return namespace


def _launch(kernel, device, programs: int):
    """Stand for `launch`: return what runs the programs, one after another."""

    def run(*args, num_warps, **constants):
        values = [Pointer(_flat(x)) if isinstance(x, Tensor) else x for x in args]
        for program in range(programs):
            machine = Machine()
            kernel.__globals__.update(
                gl=_language(program),
                async_copy=machine,
                warpgroup_mma=machine.warpgroup_mma,
                warpgroup_mma_wait=machine.warpgroup_mma_wait,
            )
            kernel(*values, **constants)
            machine.assert_idle()

    return run


def run_on_model(
    q, k, v, q_offsets, k_offsets, lists, *, scale, sorted_idx, means, config, source=None
) -> tuple[Tensor, Tensor]:
    """Do what `attend_on_hopper` does; `source` is another text of its module, if any."""
    attend = _namespace(source or kernel_source())["attend_on_hopper"]
    options = {"scale": scale, "sorted_idx": sorted_idx, "means": means, "config": config}
    return attend(q, k, v, q_offsets, k_offsets, lists, **options)
