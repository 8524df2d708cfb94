"""Puts the self-attention of a transformer under the control of its engine, and gives it back.

A Diffusers attention processor computes q, k and v, calls `dispatch_attention_fn` or torch's
`scaled_dot_product_attention`, and projects the result. Each self-attention module gets, in place
of its processor, an instance of a subclass whose `__call__` is the stock function itself, bound to
a copy of its globals in which these two names lead here. So fused projections, norms, rotary
embeddings, LoRA and whatever a Diffusers release changes around the attention stay the
processor's own, and no family of models needs code of its own.

What runs is asked for at run time (`under`), outside of everything that `torch.compile` sees:
inside a compiled block the call is one opaque operator, so that all layers and steps share a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional

from vidaccel.engine.compat import templated_context_parallel_attention
from vidaccel.errors import AttentionError

# query, key, value, each [B, S, H, D]; the mask; the scale, None for D^-0.5; what the model would
# have computed. Gives [B, S, H, D].
Attend = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        float | None,
        Callable[[], torch.Tensor],
    ],
    torch.Tensor,
]

_RUNNING: ContextVar[Attend | None] = ContextVar("vidaccel_attention", default=None)


@contextmanager
def under(attend: Attend) -> Iterator[None]:
    """Let `attend` compute the self-attention of intercepted modules that run meanwhile."""
    token = _RUNNING.set(attend)
    try:
        yield
    finally:
        _RUNNING.reset(token)


class Interception:
    """Keeps the processors of some self-attention modules while others, which lead here, stand in.

    Args:
        modules: the self-attention modules.

    Raises:
        AttentionError: one of them computes its attention in another way than through
            `dispatch_attention_fn` or `F.scaled_dot_product_attention`; nothing is changed then.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._stock: dict[int, Any] = {}  # what was there, by place in `modules`
        self._routed: dict[int, Any] = {}  # what is there instead
        for module in modules:
            _routed_class(type(_processor_of(module)))

    def install(self) -> None:
        """Intercept every module, also those that were given another processor meanwhile."""
        for index, module in enumerate(self._modules):
            present = _processor_of(module)
            if present is self._routed.get(index):
                _routed_class(type(self._stock[index]))  # brings its globals up to date
                continue
            routed: Any = object.__new__(_routed_class(type(present)))
            # Shared, not copied: a backend that is set from now on is set for both.
            routed.__dict__ = vars(present)
            self._stock[index], self._routed[index] = present, routed
            module.processor = routed

    def remove(self) -> None:
        """Put the very processors back that were there."""
        for index, module in enumerate(self._modules):
            # A processor that someone put in since is theirs.
            if module.processor is self._routed.get(index):
                module.processor = self._stock[index]
        self._stock.clear()
        self._routed.clear()


def _processor_of(module: nn.Module) -> Any:
    processor = vars(module).get("processor")
    if processor is None:
        raise AttentionError(
            f"{type(module).__name__} has no attention processor that could be replaced for the "
            "time being: pass attention=None"
        )
    return processor


_DISPATCH, _FUNCTIONAL, _SDPA = "dispatch_attention_fn", "F", "scaled_dot_product_attention"

# Stock class -> its subclass. One for all instances, so that compiled layers share a graph.
_ROUTED: dict[type, type] = {}


def _routed_class(stock: type) -> type:
    """Return the subclass of a processor class whose attention calls lead here."""
    stock = next((known for known, routed in _ROUTED.items() if routed is stock), stock)
    call: Any = getattr(stock, "__call__", None)  # noqa: B004
    copied = _rerouted(call) if isinstance(call, FunctionType) else None
    if copied is None:
        raise AttentionError(
            f"{stock.__name__} computes its attention neither through Diffusers' {_DISPATCH} nor "
            f"through F.{_SDPA}, so it cannot be made sparse: pass attention=None"
        )
    if stock in _ROUTED:
        # Names of the module may have been given other values since the copy was made.
        _ROUTED[stock].__call__.__globals__.update(copied)
        return _ROUTED[stock]
    bound = FunctionType(call.__code__, copied, call.__name__, call.__defaults__, call.__closure__)
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__"):
        setattr(bound, name, getattr(call, name))
    body = {"__call__": bound, "__module__": stock.__module__, "__doc__": stock.__doc__}
    _ROUTED[stock] = type(stock.__name__, (stock,), body)
    return _ROUTED[stock]


def _rerouted(call: FunctionType) -> dict[str, Any] | None:
    """Return the globals of a `__call__` with its attention replaced; None if it has none."""
    copied = dict(call.__globals__)
    # torch.compile takes a dict with a name for that module's own and would not see this one;
    # relative imports inside the function need __package__ alone.
    for name in ("__name__", "__spec__"):
        copied.pop(name, None)
    names = _names_in(call.__code__)
    routed = False
    if _DISPATCH in names and copied.get(_DISPATCH) is dispatch_attention_fn:
        copied[_DISPATCH], routed = _dispatch, True
    if {_FUNCTIONAL, _SDPA} <= names and copied.get(_FUNCTIONAL) is functional:
        copied[_FUNCTIONAL], routed = _FUNCTIONS, True
    return copied if routed else None


def _names_in(code: CodeType) -> set[str]:
    """Return the names that a function and those defined in it look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stand in for Diffusers' `dispatch_attention_fn`; tensors are [B, S, H, D]."""
    how = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    compiling = torch.compiler.is_compiling()
    if want_gradients(query, key, value) if compiling else _RUNNING.get() is None:
        plain: torch.Tensor = dispatch_attention_fn(
            query, key, value, *how, attention_kwargs,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
        return plain
    if attention_kwargs or not _is_plain(attn_mask):
        raise AttentionError(
            "this call of attention has a block mask or arguments of its own, which sparse "
            "attention does not honour: pass attention=None"
        )
    if compiling:
        if parallel_config is not None:
            raise AttentionError(
                "sparse attention in compiled blocks does not run in context parallel: leave the "
                "blocks as they are, or pass attention=None"
            )
        name = "" if backend is None else str(getattr(backend, "value", backend))
        result: torch.Tensor = _self_attention(query, key, value, *how, name)
        return result
    if parallel_config is not None and parallel_config.context_parallel_config.ring_degree == 1:
        # Ulysses: tensors are [B, S / ranks, H, D] here, and [B, S, H / ranks, D] in the function
        # that is handed over. All tokens of some heads are what a head's clusters need; with ring
        # attention no rank ever sees all keys, and the layer is left to Diffusers.
        def whole(
            _: Any, query: Any, key: Any, value: Any, mask: Any, *__: Any, **___: Any
        ) -> torch.Tensor:
            return _dispatch(query, key, value, mask, *how[1:], backend=backend)

        out: torch.Tensor = templated_context_parallel_attention(
            query, key, value, *how,
            forward_op=whole, backward_op=None, _parallel_config=parallel_config,
        )  # fmt: skip
        return out
    dense = partial(
        dispatch_attention_fn,
        query,
        key,
        value,
        *how,
        backend=backend,
        parallel_config=parallel_config,
    )
    return _attend(query, key, value, *how[:-1], dense)


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stand in for torch's function of this name; tensors are [B, H, S, D]."""
    how = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    compiling = torch.compiler.is_compiling()
    if compiling and not want_gradients(query, key, value):
        result: torch.Tensor = _self_attention(q, k, v, *how, _TORCH)
        return result.transpose(1, 2)

    def dense() -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        ).transpose(1, 2)

    if compiling:
        return dense().transpose(1, 2)
    return _attend(q, k, v, *how[:-1], dense).transpose(1, 2)


# As a backend of the operator: torch's function, without Diffusers' dispatcher.
_TORCH = "torch"


# The operator reads which layer runs, so it must run for real each time: not inside a CUDA graph.
@torch.library.custom_op(
    "vidaccel::self_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _self_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor:
    """Attend inside a compiled block; tensors are [B, S, H, D], the result contiguous."""
    how = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if backend == _TORCH:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        result = _scaled_dot_product_attention(q, k, v, *how).transpose(1, 2)
    else:
        result = _dispatch(query, key, value, *how, backend=backend or None)
    return result.contiguous()  # the strides that the compiler was told


@_self_attention.register_fake
def _(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    attend = _RUNNING.get()
    # A block that is run by itself, outside of the transformer, is nobody's layer.
    if attend is None:
        return dense()
    if is_causal or dropout_p or query.shape != key.shape or query.shape != value.shape:
        raise AttentionError(
            f"{tuple(query.shape)} queries on {tuple(key.shape)} keys and {tuple(value.shape)} "
            f"values (causal: {is_causal}, dropout: {dropout_p}) are no self-attention that can "
            "be made sparse: pass attention=None"
        )
    return attend(query, key, value, mask, scale, dense)


def want_gradients(*tensors: torch.Tensor) -> bool:
    """Tell whether what is computed from tensors has to have a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _is_plain(mask: Any) -> bool:
    return mask is None or isinstance(mask, torch.Tensor)


def _functions() -> ModuleType:
    """Return torch.nn.functional with its attention leading here."""
    functions = ModuleType(functional.__name__)
    vars(functions).update(vars(functional))
    setattr(functions, _SDPA, _scaled_dot_product_attention)
    return functions


_FUNCTIONS = _functions()
