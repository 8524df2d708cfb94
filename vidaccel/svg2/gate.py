"""Lets attention be sparse only where that is right and pays: a trial call, and a race with dense.

Before the first block `why_kernels_fail` compiles the kernels for a head size and dtype, runs them
on a few hundred tokens with nothing left out, and compares the result with torch's attention.
`Gate` then holds the first sparse call of each shape against dense attention on the same tensors.
Only these two wait for the device.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.engine.timing import Stopwatch
from vidaccel.hosts.spec import HostSpec
from vidaccel.kernels.common import DTYPES, why_no_kernels
from vidaccel.kernels.semantic_attention import semantic_attention
from vidaccel.kernels.state import SemanticConfig, SemanticState
from vidaccel.svg2.settings import SVG2
from vidaccel.svg2.support import head_size, why_no_kernel_for

# The trial call: tokens, those of them that are text where the model has text beside its video.
TRIAL_TOKENS, TRIAL_TEXT = 256, 32
# How far the trial may be from exact attention, as a share of its norm: far above the rounding of
# two bytes, and of scores in 8 bits, and far below any wrong row.
TRIAL_ERROR = 0.05
# How far a sparse call may be from dense attention. Sparsity itself costs a twentieth at most at
# the default settings on the embedded model's first version, more where attention is spread out;
# values of no meaning are off by 1 or more.
CALL_ERROR = 0.5
# Rows of the video that are compared, and how often each side is timed; the fastest counts.
ROWS, TIMES = 256, 2

# Computes something on a device, and gives it with the seconds that it took there.
Clock = Callable[[Callable[[], torch.Tensor], torch.device], tuple[torch.Tensor, float]]


def seconds_on(
    compute: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, float]:
    """Compute, and return the result and its seconds on the device's own time line; waits."""
    watch = Stopwatch(device)
    result = compute()
    watch.lap("all")
    ((_, seconds),) = watch.seconds()
    return result, seconds


def why_unfit(
    device: torch.device, head_dim: int, dtype: torch.dtype, settings: SVG2, *, text: bool
) -> str:
    """Return why attention cannot be sparse on a GPU; empty when it can. Waits for the device.

    Args:
        device, head_dim, dtype, settings, text: as `why_kernels_fail` takes them.
    """
    return (
        why_no_kernel_for(head_dim, dtype)
        or why_no_kernels(device)
        or why_kernels_fail(device, head_dim, dtype, settings, text=text)
    )


def why_trial_fails(
    gpu: torch.device, transformer: nn.Module, host: HostSpec, settings: SVG2
) -> str:
    """Return why the kernels fail for a transformer on a GPU; empty when they do not.

    Where nothing tells the size of its heads, or the dtype that it computes in, the first call of
    attention does.

    Args:
        gpu: where it runs, of a kind that `why_not_on` has nothing against.
        transformer: one whose attention can be made sparse.
        host: its row of the table.
        settings: those whose kernels are compiled.
    """
    size = head_size(transformer, host)
    dtype = next((x.dtype for x in transformer.parameters() if x.is_floating_point()), None)
    if size is None or dtype is None or dtype not in DTYPES:
        return ""
    return why_kernels_fail(gpu, size, dtype, settings, text=len(host.tokens) > 1)


@torch.no_grad()
def why_kernels_fail(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    settings: SVG2,
    *,
    text: bool = False,
    attention: Callable[..., torch.Tensor] = semantic_attention,
) -> str:
    """Run the kernels on a few tokens, and return what is wrong with them; empty for nothing.

    Args:
        device: where they run.
        head_dim: size of the heads.
        dtype: that of queries, keys and values.
        settings: those whose kernels are compiled.
        text: there is text beside the video.
        attention: runs them, as `semantic_attention` does.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, TRIAL_TOKENS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    # With nothing left out the result is that of plain attention, whatever the clusters are.
    config = replace(_config(settings), query_clusters=4, key_clusters=16, top_p=1.0, init_iters=1)
    state = SemanticState()
    video = (0, TRIAL_TOKENS - TRIAL_TEXT * text)
    try:
        # The first call clusters from scratch, the second from the centroids of the first.
        found = [attention(q, k, v, state, config, video=video) for _ in range(2)]
        exact = scaled_dot_product_attention(q.float(), k.float(), v.float())
        errors = [relative_error(out, exact) for out in found]
    # A compiler, a driver or a missing library may raise anything, and attention stays dense.
    except Exception as error:
        return f"a trial call of the kernels failed ({_first_line(error)})"
    if not all(error <= TRIAL_ERROR for error in errors):  # NaN is not
        return f"a trial call of the kernels was wrong by {max(errors):.1%}"
    return ""


def _config(settings: SVG2) -> SemanticConfig:
    """The settings that kernels take, for the clusters of a long video."""
    shared = {f.name for f in fields(SemanticConfig)} & {f.name for f in fields(SVG2)}
    values = {name: getattr(settings, name) for name in shared}
    return SemanticConfig(**values | {"query_clusters": 1, "key_clusters": 1})


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the difference over that of the exact result; waits for the device."""
    exact = exact.float()
    return float((found.float() - exact).norm() / exact.norm().clamp_min(1e-12))


def _first_line(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


@dataclass(frozen=True)
class Verdict:
    """The outcome of one sparse call of a shape beside a dense one.

    Attributes:
        shape: [B, H, S, D] of queries, and their dtype, in words.
        sparse_seconds, dense_seconds: time on the device; None where the sparse call failed.
        error: distance of the sampled rows from dense attention, as a share of their norm; None
            where the sparse call failed.
        failed: what the sparse call raised; empty for nothing.
    """

    shape: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    error: float | None = None
    failed: str = ""

    @property
    def why_dense(self) -> str:
        """The reason to stay dense; empty where sparse attention has won."""
        if self.failed:
            return f"the sparse call of {self.shape} failed ({self.failed})"
        assert self.error is not None
        assert self.sparse_seconds is not None and self.dense_seconds is not None
        if not self.error <= CALL_ERROR:  # NaN is not
            return f"the sparse call of {self.shape} is {self.error:.0%} off dense attention"
        if self.sparse_seconds >= self.dense_seconds:
            return f"not faster for {self.shape}: {self._times}"
        return ""

    @property
    def _times(self) -> str:
        assert self.sparse_seconds is not None and self.dense_seconds is not None
        return f"{1e3 * self.sparse_seconds:.3g} ms sparse, {1e3 * self.dense_seconds:.3g} ms dense"

    def __str__(self) -> str:
        return self.why_dense or f"{self.shape}: {self._times}, {self.error:.1%} off dense"


class Gate:
    """Holds the first sparse call of each shape against dense attention; several threads may ask.

    Args:
        clock: times the calls.
    """

    def __init__(self, clock: Clock = seconds_on) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._verdicts: dict[Any, Verdict] = {}

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts so far."""
        return list(self._verdicts.values())

    def why_dense(self, shape: Any) -> str:
        """Return why calls of a shape stay dense; empty where they do not, or none was held yet."""
        verdict = self._verdicts.get(shape)
        return "" if verdict is None else verdict.why_dense

    def attend(
        self,
        shape: Any,
        sparse: Callable[[SemanticState], torch.Tensor],
        dense: Callable[[], torch.Tensor],
        state: SemanticState,
        video: tuple[int, int],
    ) -> torch.Tensor | None:
        """Attend sparsely, the first time of a shape beside dense attention.

        Args:
            shape: what tells calls apart that take another time: sizes, dtype and device.
            sparse: attends with a state; gives [B, H, S, D].
            dense: attends densely; gives [B, S, H, D].
            state: that of the layer.
            video: first and last + 1 of the video tokens, whose rows are compared.

        Returns:
            [B, H, S, D] of the sparse call, or None where it has not won: the call is to be dense.
        """
        if shape not in self._verdicts:
            with self._lock:
                if shape not in self._verdicts:
                    out, verdict = self._race(sparse, dense, state, video)
                    self._verdicts[shape] = verdict
                    return None if verdict.why_dense else out
        return None if self.why_dense(shape) else sparse(state)

    @torch.no_grad()
    def _race(
        self,
        sparse: Callable[[SemanticState], torch.Tensor],
        dense: Callable[[], torch.Tensor],
        state: SemanticState,
        video: tuple[int, int],
    ) -> tuple[torch.Tensor, Verdict]:
        exact = dense()  # also what wakes its kernels up
        device = exact.device
        shape = f"{'x'.join(map(str, exact.transpose(1, 2).shape))} {exact.dtype}"
        shape = shape.replace("torch.", "")
        try:
            out = sparse(state)
            # Timed on copies, from centroids as later steps find them; the state is replaced in a
            # call and never written into.
            times = [
                self._clock(lambda: sparse(replace(state, on_phase_end=None)), device)[1]
                for _ in range(TIMES)
            ]
            rows = torch.linspace(*video, ROWS + 1, dtype=torch.float64)[:-1].long().to(device)
            error = relative_error(out[:, :, rows], exact.transpose(1, 2)[:, :, rows])
            if not bool(out.isfinite().all()):
                error = float("nan")
        # Whatever kernels raise on shapes that the trial did not have: the generation goes on.
        except Exception as failure:
            with suppress(Exception):
                state.reset()
            return exact, Verdict(shape, failed=_first_line(failure))
        dense_times = [self._clock(dense, device)[1] for _ in range(TIMES)]
        return out, Verdict(shape, min(times), min(dense_times), error)
