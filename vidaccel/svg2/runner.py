"""Runs SVG2 on one transformer: decides which layers and steps are sparse, and keeps clusters.

The engine says which call, branch, step and block is running; everything else is decided here, per
layer and guidance branch. Nothing here waits for the device: what is counted is added up there and
read when a report is asked for.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vidaccel.engine.attention_hook import AttentionCall, AttentionHook
from vidaccel.engine.block_proxies import BlockArguments
from vidaccel.engine.parallel import SequenceParallelMode
from vidaccel.engine.report import AttentionReport
from vidaccel.engine.state import CallContext
from vidaccel.engine.timing import Stopwatch
from vidaccel.errors import AttentionError
from vidaccel.hosts.spec import HostSpec
from vidaccel.kernels.common import MAX_BATCH_HEADS
from vidaccel.kernels.reference import attention_recall
from vidaccel.kernels.semantic_attention import cluster_tokens, semantic_attention
from vidaccel.kernels.state import SemanticConfig, SemanticState
from vidaccel.svg2.gate import Gate, why_unfit
from vidaccel.svg2.interception import Interception, under, want_gradients
from vidaccel.svg2.layers import Layer
from vidaccel.svg2.settings import SVG2
from vidaccel.svg2.stats import CallSparsity, SparsityStats
from vidaccel.svg2.support import attention_modules, why_dense
from vidaccel.svg2.tokens import Tokens, tokens_of

# Computes the attention of a sparse call as `semantic_attention` does; another one is put in its
# place to compare methods.
AttentionMethod = Callable[..., torch.Tensor]

# The settings that the kernels take as they are.
_SHARED_FIELDS = {f.name for f in fields(SemanticConfig)} & {f.name for f in fields(SVG2)}
_SHARED_FIELDS -= {"query_clusters", "key_clusters"}

# Why a call of attention was dense.
FIRST_STEPS, FIRST_LAYERS = "first steps", "first layers"
SHORT, MASK, NO_GPU = "short sequence", "attention mask", "not on a GPU"
GRADIENTS, MANY = "gradients", "more batch items and heads than a grid has programs"
RING = "ring attention, in which no process has all keys of a head"
JOINT = "text beside the video in sequence-parallel mode"


class SparseAttention(AttentionHook):
    """Makes the self-attention of one transformer sparse between `attach` and `detach`.

    Args:
        transformer: an instance of the class that `host` describes.
        host: its row of the table.
        config: the settings of the user.
        gpu_only: leave attention dense where the kernels cannot run, also for want of a GPU.
        gate: leaves attention dense where that is faster, or the sparse call fails; None for
            whoever wants it sparse whatever it takes.
        method: what computes a sparse call.

    Raises:
        AttentionError: its attention cannot be made sparse; nothing has been changed then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        host: HostSpec,
        config: SVG2,
        *,
        gpu_only: bool = False,
        gate: Gate | None = None,
        method: AttentionMethod = semantic_attention,
    ) -> None:
        if reason := why_dense(transformer, host):
            raise AttentionError(
                f"the attention of {type(transformer).__name__} cannot be made sparse: {reason}"
            )
        self.config = config
        self.host, self.method, self.stats = host, method, SparsityStats()
        self._gpu_only, self.gate = gpu_only, gate
        # Weak, since the transformer holds the engine, which holds this.
        self._transformer = weakref.ref(transformer)
        self._modules = attention_modules(transformer, host)
        self._interception = Interception(self._modules)
        self._depths, self._depth = _depths(transformer, host)
        self._layers: dict[int, dict[_Place, Layer]] = {}  # by generation
        self._lock = threading.Lock()
        # Why the kernels cannot run there, for heads of this size and dtype.
        self._unfit: dict[tuple[torch.device, int, torch.dtype], str] = {}

    def attach(self) -> None:
        self._interception.install()

    def detach(self) -> None:
        self._interception.remove()
        self.forget()

    def forget(self, generation: int | None = None) -> None:
        if generation is None:
            self._layers.clear()
        else:
            self._layers.pop(generation, None)

    def restart(self, generation: int) -> None:
        self.forget(generation)
        self.stats.finalize()
        with self._lock:
            self._follow_blocks()
            # Loading adapters and fusing projections put other processors in.
            self._interception.install()

    def _follow_blocks(self) -> None:
        """Take over the blocks that have come in the place of others."""
        transformer = self._transformer()
        assert transformer is not None  # it runs
        modules = attention_modules(transformer, self.host)
        if list(map(id, modules)) == list(map(id, self._modules)):
            return
        interception = Interception(modules)
        self._interception.remove()
        self._interception, self._modules = interception, modules
        self._depths, self._depth = _depths(transformer, self.host)

    def begin(
        self,
        generation: int,
        context: CallContext,
        *,
        refreshes: bool,
        parallel_mode: SequenceParallelMode | None = None,
        video_rows: tuple[int, int] | None = None,
    ) -> "SparseCall":
        """A call begins; raises AttentionError where its parallel mode allows no sparsity."""
        reason = ""
        if parallel_mode == "ring":
            reason = RING
        elif parallel_mode is not None and len(self.host.tokens) > 1:
            reason = JOINT
        if reason and not self._gpu_only:
            raise AttentionError(
                f"attention cannot be made sparse here: {reason}; use "
                "ContextParallelConfig(ulysses_degree=...) on a model without text in its "
                "self-attention, or pass attention=None"
            )
        settings = self.config.at_refresh() if refreshes else self.config
        layers = self._layers.setdefault(generation, {})
        return SparseCall(self, layers, context, settings, reason, video_rows)

    def is_dense_layer(self, position: int) -> bool:
        """Tell whether the layer of the block at this position is dense in every step."""
        return self.config.is_dense_layer(self._depths[position], self._depth)

    def why_dense_here(
        self, query: torch.Tensor, tokens: Tokens | None, wants_gradients: bool
    ) -> str:
        """Return why calls like this one are dense in every step and layer; empty if not.

        Raises:
            AttentionError: the user has asked for what there is no kernel for.
        """
        if tokens is None:
            return MASK
        if tokens.video < self.config.min_tokens:
            return SHORT
        if wants_gradients:
            return GRADIENTS
        if not query.is_cuda:
            return NO_GPU if self._gpu_only else ""
        if query.shape[0] * query.shape[2] > MAX_BATCH_HEADS:
            return MANY
        kind = (query.device, query.shape[3], query.dtype)
        if kind not in self._unfit:
            text = len(self.host.tokens) > 1
            self._unfit[kind] = why_unfit(*kind, self.config, text=text)
        reason = self._unfit[kind]
        if reason and not self._gpu_only:
            raise AttentionError(
                f"attention cannot be made sparse here: {reason}; pass attention=None"
            )
        return reason

    @property
    def bytes_held(self) -> int:
        """Bytes of the clusters that are kept at this moment."""
        generations = list(self._layers.values())
        return sum(layer.bytes_held for layers in generations for layer in list(layers.values()))

    def report(self) -> AttentionReport:
        found = self.stats.report(str(self.config), self.bytes_held)
        verdicts = () if self.gate is None else tuple(map(str, self.gate.verdicts))
        return replace(found, verdicts=verdicts)


# Position of a block, guidance branch, and sample where a block attends for each by itself.
_Place = tuple[int, str, int]


class SparseCall(AttentionCall):
    """One call of the transformer.

    Args:
        owner: makes it sparse.
        layers: the clusters of its generation.
        context: its place in the generation.
        settings: those of the step.
        parallel_reason: why it cannot be sparse in its sequence-parallel mode; empty if it can.
        video_rows: first and last + 1 of the video rows of a packed sequence.
    """

    def __init__(
        self,
        owner: SparseAttention,
        layers: dict[_Place, Layer],
        context: CallContext,
        settings: SVG2,
        parallel_reason: str,
        video_rows: tuple[int, int] | None = None,
    ) -> None:
        self._owner, self._layers, self._context = owner, layers, context
        self._settings, self._parallel_reason = settings, parallel_reason
        self._rows = video_rows
        self._stats = CallSparsity()

    def block(
        self, position: int, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        # Only beside text is the number of video tokens not that of all tokens.
        joint = len(self._owner.host.tokens) > 1
        video_tokens = named.main(args, kwargs).shape[1] if joint else 0
        return under(partial(self._attend, _RunningBlock(position, video_tokens)))

    def end(self) -> None:
        self._owner.stats.add(self._stats)

    def _attend(
        self,
        block: "_RunningBlock",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dense: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """One call of self-attention; tensors are [B, S, H, D]."""
        # Mochi calls once for each sample of its batch, and each has clusters of its own.
        sample, block.calls = block.calls, block.calls + 1
        tokens = tokens_of(self._owner.host, query.shape[1], block.video_tokens, mask, self._rows)
        wants_gradients = want_gradients(query, key, value)
        reason = self._dense_reason(block, query, tokens, wants_gradients)
        if reason:
            self._stats.dense[reason] += 1
        config = self._owner.config
        # Clusters belong to no graph, so there are none to make for a call that has one.
        warming = reason == FIRST_STEPS and config.cluster_while_dense
        watch = self._stats.watch(query.device) if config.timed else None
        if tokens is None or (reason and not warming):
            return _timed(dense, watch)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        place = (block.position, self._context.branch, sample)
        layer = self._layer(place, q, tokens)
        kernel_config = self._kernel_config(tokens.video, scale)
        text = {"video": (tokens.start, tokens.stop), "text_mask": tokens.text_mask}
        layer.state.on_phase_end = None if watch is None else watch.lap
        if warming:
            cluster_tokens(q, k, layer.state, kernel_config, **text)
            layer.trim(config, q.dtype)
            return _timed(dense, watch)
        if layer.top_p != kernel_config.top_p:
            layer.state.selection, layer.top_p = None, kernel_config.top_p

        def attend(state: SemanticState) -> torch.Tensor:
            return self._owner.method(q, k, v, state, kernel_config, **text)

        gate = self._owner.gate
        if gate is None:
            out = attend(layer.state)
        else:
            video = (tokens.start, tokens.stop)
            won = gate.attend(layer.shape, attend, dense, layer.state, video)
            if won is None:
                self._layers.pop(place, None)
                self._stats.dense[gate.why_dense(layer.shape)] += 1
                return _timed(dense, watch)
            out = won
        recall = self._recall(q, k, layer.state, tokens, kernel_config)
        self._stats.add(block.position, layer.state, recall)
        layer.trim(config, q.dtype)
        return out.transpose(1, 2)

    def _dense_reason(
        self,
        block: "_RunningBlock",
        query: torch.Tensor,
        tokens: Tokens | None,
        wants_gradients: bool,
    ) -> str:
        """Return why a call of attention is dense; empty when it is not."""
        # First, so that what is refused is refused before a step is lost.
        lasting = self._parallel_reason or self._owner.why_dense_here(
            query, tokens, wants_gradients
        )
        if self._owner.gate is not None and tokens is not None and not lasting:
            lasting = self._owner.gate.why_dense(_shape(query.transpose(1, 2), tokens))
        if self._owner.is_dense_layer(block.position):
            return FIRST_LAYERS
        step, steps = self._context.step, self._context.num_inference_steps
        first = self._owner.config.is_dense_step(step, steps)
        return lasting or (FIRST_STEPS if first else "")

    def _layer(self, place: _Place, q: torch.Tensor, tokens: Tokens) -> Layer:
        shape = _shape(q, tokens)
        layer = self._layers.get(place)
        if layer is None or layer.shape != shape:
            layer = self._layers[place] = Layer(shape)
        return layer

    def _kernel_config(self, video_tokens: int, scale: float | None) -> SemanticConfig:
        query_clusters, key_clusters = self._settings.clusters(video_tokens)
        return SemanticConfig(
            **{name: getattr(self._settings, name) for name in _SHARED_FIELDS},
            query_clusters=query_clusters,
            key_clusters=key_clusters,
            scale=scale,
        )

    def _recall(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        state: SemanticState,
        tokens: Tokens,
        config: SemanticConfig,
    ) -> torch.Tensor | None:
        """Measure the mean share of the attention mass that rows all over the video keep."""
        count = min(self._settings.recall_rows, tokens.video)
        if not count:
            return None
        rows = tokens.start + torch.arange(count, device=q.device) * tokens.video // count
        assert state.query is not None
        assert state.key is not None
        assert state.selection is not None
        recall: torch.Tensor = attention_recall(
            q,
            k,
            state.query.labels,
            state.key.labels,
            state.selection,
            scale=config.scale or q.shape[3] ** -0.5,
            rows=rows,
            valid=tokens.valid,
        )
        return recall.mean()


@dataclass
class _RunningBlock:
    """One run of a block: its position, and how often it has called for attention."""

    position: int
    video_tokens: int
    calls: int = 0


def _shape(q: torch.Tensor, tokens: Tokens) -> tuple[Any, ...]:
    """Return what tells calls of attention apart; q is [B, H, S, D]."""
    return (*q.shape, tokens.start, tokens.stop, q.dtype, q.device)


def _timed(dense: Callable[[], torch.Tensor], watch: Stopwatch | None) -> torch.Tensor:
    """Run dense attention, and note it on the watch."""
    out = dense()
    if watch is not None:
        watch.lap("dense")
    return out


def _depths(transformer: nn.Module, host: HostSpec) -> tuple[list[int], int]:
    """Return the depth of each block, in running order, and that of the whole stack.

    Blocks that run beside the main ones, such as those that make control hints, count for
    themselves.
    """
    depths: list[int] = []
    main = 0
    for spec in host.blocks:
        stack: Any = transformer.get_submodule(spec.name)
        count = len(stack)
        beside = spec.returns != host.blocks[-1].returns
        depths += range(count) if beside else range(main, main + count)
        main += 0 if beside else count
    return depths, main
