"""Runs SVG2 on one transformer: decides which layers and steps are sparse, and keeps clusters.

The engine says which call, branch, step and block is running; everything else is decided here, per
layer and guidance branch. Nothing here waits for the device: what is counted is added up there and
read when a report is asked for.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vidaccel.engine.attention_hook import AttentionHook
from vidaccel.engine.block_proxies import BlockArguments
from vidaccel.engine.parallel import SequenceParallelMode
from vidaccel.engine.report import AttentionReport
from vidaccel.engine.state import CallContext
from vidaccel.engine.timing import Stopwatch
from vidaccel.errors import AttentionError
from vidaccel.hosts.spec import HostSpec
from vidaccel.kernels.reference import attention_recall
from vidaccel.kernels.semantic_attention import cluster_tokens, semantic_attention
from vidaccel.kernels.state import Clustering, SemanticConfig, SemanticState
from vidaccel.svg2.interception import Interception, under
from vidaccel.svg2.settings import SVG2
from vidaccel.svg2.stats import SparsityStats

# Computes the attention of a sparse call as `semantic_attention` does; another one is put in its
# place to compare methods.
AttentionMethod = Callable[..., torch.Tensor]

# The settings that the kernels take as they are.
_SHARED_FIELDS = {f.name for f in fields(SemanticConfig)} & {f.name for f in fields(SVG2)}
_SHARED_FIELDS -= {"query_clusters", "key_clusters"}

# Why a call of attention was dense.
FIRST_STEPS, FIRST_LAYERS = "first steps", "first layers"
SHORT, MASK, NO_GPU = "short sequence", "attention mask", "not on a GPU"
RING = "ring attention, in which no process has all keys of a head"
JOINT = "text beside the video in sequence-parallel mode"


def why_dense(transformer: nn.Module, host: HostSpec) -> str:
    """Return why the self-attention of a transformer cannot be made sparse; empty when it can."""
    if host.attention is None:
        return host.attention_note or "its row names no self-attention"
    config: Any = transformer.config
    if config.get("attention_type") == "nabla":
        return "its own sparse attention (NABLA) is on"
    try:
        Interception(_modules(transformer, host))
    except AttentionError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Tokens:
    """The video and text tokens of a sequence.

    Attributes:
        total: number of tokens.
        start, stop: first and last + 1 of the video tokens; all others are text.
        text_mask: [B, text] bool, false for padding; None where there is none.
    """

    total: int
    start: int
    stop: int
    text_mask: torch.Tensor | None = None

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.stop - self.start

    @property
    def valid(self) -> torch.Tensor | None:
        """[B, total] bool, false for padding; None where there is none."""
        if self.text_mask is None:
            return None
        before, after = self.text_mask[:, : self.start], self.text_mask[:, self.start :]
        video = before.new_ones(len(before), self.video)
        return torch.cat([before, video, after], 1)

    def with_mask(self, valid: torch.Tensor) -> "Tokens":
        """Return the same with the padding of a [B, total] bool mask."""
        text = torch.cat([valid[:, : self.start], valid[:, self.stop :]], 1)
        return replace(self, text_mask=text)


class SparseAttention(AttentionHook):
    """Makes the self-attention of one transformer sparse between `attach` and `detach`.

    Args:
        transformer: an instance of the class that `host` describes.
        host: its row of the table.
        config: the settings of the user.
        gpu_only: leave attention dense where it does not run on a GPU.
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
        method: AttentionMethod = semantic_attention,
    ) -> None:
        if reason := why_dense(transformer, host):
            raise AttentionError(
                f"the attention of {type(transformer).__name__} cannot be made sparse: {reason}"
            )
        self.config = config
        self._host, self._gpu_only, self.method = host, gpu_only, method
        self._interception = Interception(_modules(transformer, host))
        self._depths, self._depth = _depths(transformer, host)
        self._layers: dict[tuple[int, str, int], _Layer] = {}
        self._stats = SparsityStats()
        # Of the running call:
        self._context = CallContext(0, 1, "", False)
        self._parallel_reason = ""  # why it cannot be sparse in its sequence-parallel mode
        self._settings = config

    def attach(self) -> None:
        self._interception.install()

    def detach(self) -> None:
        self._interception.remove()
        self.forget()

    def forget(self) -> None:
        self._layers.clear()

    def restart(self) -> None:
        self.forget()
        self._stats.finalize()
        # Loading adapters and fusing projections put other processors in.
        self._interception.install()

    def begin(
        self,
        context: CallContext,
        *,
        refreshes: bool,
        parallel_mode: SequenceParallelMode | None = None,
    ) -> None:
        """A call begins; raises AttentionError where its parallel mode allows no sparsity."""
        self._parallel_reason = ""
        if parallel_mode == "ring":
            self._parallel_reason = RING
        elif parallel_mode is not None and len(self._host.tokens) > 1:
            self._parallel_reason = JOINT
        if self._parallel_reason and not self._gpu_only:
            raise AttentionError(
                f"attention cannot be made sparse here: {self._parallel_reason}; use "
                "ContextParallelConfig(ulysses_degree=...) on a model without text in its "
                "self-attention, or pass attention=None"
            )
        self._context = context
        self._settings = self.config.at_refresh() if refreshes else self.config

    def block(
        self, position: int, named: BlockArguments, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        # Only beside text is the number of video tokens not that of all tokens.
        joint = len(self._host.tokens) > 1
        video_tokens = named.main(args, kwargs).shape[1] if joint else 0
        return under(partial(self._attend, _RunningBlock(position, video_tokens)))

    def end(self) -> None:
        self._stats.gather()

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
        tokens = self._tokens(block, query, mask)
        reason = self._dense_reason(block, query, tokens)
        if reason:
            self._stats.dense[reason] += 1
        warming = reason == FIRST_STEPS and self.config.cluster_while_dense
        watch = self._stats.watch(query.device) if self.config.timed else None
        if tokens is None or (reason and not warming):
            return _timed(dense, watch)
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        layer = self._layer((block.position, self._context.branch, sample), q, tokens)
        config = self._kernel_config(tokens.video, scale)
        text = {"video": (tokens.start, tokens.stop), "text_mask": tokens.text_mask}
        layer.state.on_phase_end = None if watch is None else watch.lap
        if warming:
            cluster_tokens(q, k, layer.state, config, **text)
            layer.trim(self.config, q.dtype)
            return _timed(dense, watch)
        if layer.top_p != config.top_p:
            layer.state.selection, layer.top_p = None, config.top_p
        out = self.method(q, k, v, layer.state, config, **text)
        self._stats.add(
            block.position, layer.state, self._recall(q, k, layer.state, tokens, config)
        )
        layer.trim(self.config, q.dtype)
        return out.transpose(1, 2)

    def _dense_reason(
        self, block: "_RunningBlock", query: torch.Tensor, tokens: Tokens | None
    ) -> str:
        if self.config.is_dense_layer(self._depths[block.position], self._depth):
            return FIRST_LAYERS
        if self._parallel_reason:
            return self._parallel_reason
        if tokens is None:
            return MASK
        if tokens.video < self.config.min_tokens:
            return SHORT
        if self._gpu_only and not query.is_cuda:
            return NO_GPU
        step, steps = self._context.step, self._context.num_inference_steps
        return FIRST_STEPS if self.config.is_dense_step(step, steps) else ""

    def _tokens(
        self, block: "_RunningBlock", query: torch.Tensor, mask: torch.Tensor | None
    ) -> Tokens | None:
        """Tell video from text; None when the mask says more than can be honoured."""
        total = query.shape[1]
        if self._host.tokens == ("video",):
            return Tokens(total, 0, total) if mask is None else None
        start = 0 if self._host.tokens[0] == "video" else total - block.video_tokens
        tokens = Tokens(total, start, start + block.video_tokens)
        if mask is None:
            return tokens
        if self._host.mask == "none" or mask.dtype != torch.bool or mask.dim() != 4:
            return None
        # What a video token may see is what there is.
        return tokens.with_mask(mask[:, 0, 0])

    def _layer(self, place: tuple[int, str, int], q: torch.Tensor, tokens: Tokens) -> "_Layer":
        shape = (*q.shape, tokens.start, tokens.stop, q.dtype, q.device)
        layer = self._layers.get(place)
        if layer is None or layer.shape != shape:
            layer = self._layers[place] = _Layer(shape)
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
        count = min(self.config.recall_rows, tokens.video)
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

    @property
    def bytes_held(self) -> int:
        """Bytes of the clusters that are kept at this moment."""
        return sum(layer.bytes_held for layer in self._layers.values())

    def report(self) -> AttentionReport:
        return self._stats.report(str(self.config), self.bytes_held)


@dataclass
class _RunningBlock:
    """One run of a block: its position, and how often it has called for attention."""

    position: int
    video_tokens: int
    calls: int = 0


@dataclass
class _Layer:
    """Clusters that one layer of one guidance branch keeps from step to step.

    Attributes:
        shape: sizes, dtype and device that it was made for; others need another layer.
        state: clusters and selection.
        top_p: the share of mass that the selection was made with.
    """

    shape: tuple[Any, ...]
    state: SemanticState = field(default_factory=SemanticState)
    top_p: float | None = None

    def trim(self, config: SVG2, dtype: torch.dtype) -> None:
        """Let go of what the next step makes anew, which is most of the memory."""
        if config.recluster_every > 1:
            return
        self.state.selection = None
        for side in ("query", "key"):
            clustering: Clustering = getattr(self.state, side)
            # Tensors without storage keep the shapes that say whom the centroids belong to.
            rest = {
                name: tensor.new_zeros(()).expand(tensor.shape)
                for name, tensor in vars(clustering).items()
                if name != "centroids"
            }
            centroids = clustering.centroids.to(dtype)
            setattr(self.state, side, Clustering(centroids=centroids, **rest))

    @property
    def bytes_held(self) -> int:
        """Bytes of all tensors."""
        parts = (self.state.query, self.state.key, self.state.selection)
        tensors = [tensor for part in parts if part is not None for tensor in vars(part).values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _timed(dense: Callable[[], torch.Tensor], watch: Stopwatch | None) -> torch.Tensor:
    """Run dense attention, and note it on the watch."""
    out = dense()
    if watch is not None:
        watch.lap("dense")
    return out


def _modules(transformer: nn.Module, host: HostSpec) -> list[nn.Module]:
    """Return the self-attention modules, in the order in which the blocks run.

    Raises:
        AttentionError: a block has none at the path of the row.
    """
    stacks: list[Any] = [transformer.get_submodule(spec.name) for spec in host.blocks]
    blocks = [block for stack in stacks for block in stack]
    try:
        return [block.get_submodule(host.attention) for block in blocks]
    except AttributeError as error:
        raise AttentionError(f"a block has no self-attention {host.attention!r}") from error


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
