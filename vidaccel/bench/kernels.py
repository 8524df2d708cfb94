"""Measures the kernels on a CUDA GPU: correctness first, then time against dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.bench.gpu_device import Device, require_gpu
from vidaccel.bench.gpu_sampled import check_sampled
from vidaccel.bench.kernel_checks import check
from vidaccel.environment import environment
from vidaccel.kernels.common import Selection
from vidaccel.kernels.common import density as computed_share
from vidaccel.kernels.state import SemanticConfig


@dataclass(frozen=True)
class Shape:
    """The self-attention of one model.

    Attributes:
        heads, tokens, head_dim: H, S and D, batch 1.
        query_clusters, key_clusters: as published for the model, or by token count.
    """

    heads: int
    tokens: int
    head_dim: int
    query_clusters: int
    key_clusters: int


SHAPES = {
    "Wan-1.3B 480p": Shape(12, 32_760, 128, 100, 500),
    "Wan-14B 720p": Shape(40, 75_600, 128, 100, 500),
    "Wan-14B 720p, 300/1000": Shape(40, 75_600, 128, 300, 1000),
    "HunyuanVideo 720p": Shape(24, 118_800, 128, 200, 500),
    "CogVideoX-5B 480p": Shape(48, 17_550, 64, 64, 128),
    "LTX-Video 704p": Shape(32, 12_000, 64, 64, 128),
}
DENSITIES = (0.1, 0.2, 0.3, 0.5, 1.0)


def kernels(
    shapes: Sequence[str] = tuple(SHAPES),
    densities: Sequence[float] = DENSITIES,
    *,
    dtype: torch.dtype = torch.bfloat16,
    milliseconds: int = 300,
    timed: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Check every kernel, then check and time it at the shapes of video models.

    Args:
        shapes: names of SHAPES.
        densities: computed shares of all pairs; the selection at each is random, and the same for
            every method that is given one.
        dtype: bfloat16 or float16.
        milliseconds: how long one measurement repeats.
        timed: False ends with the checks.
        report: takes a line of progress.

    Returns:
        "checks" (name -> error and limit; those of a shape on sampled rows), "rows" (times in
        milliseconds, useful TFLOP/s on the selected pairs), "layers" (a whole layer with
        clustering: time, launches, scratch bytes) and "environment".

    Raises:
        CheckError: a kernel is wrong; nothing is timed then.
        VidaccelError: there is no GPU.
    """
    require_gpu()
    device = Device()
    checks: dict[str, dict[str, float]] = {}

    def keep(found: dict[str, dict[str, float]], place: str = "") -> None:
        for name, one in found.items():
            checks[f"{place}{name}"] = one
            told = f"error {one['error']:.2e} of at most {one['limit']:.2e}"
            report(f"{place + name:44} {told}")

    keep(check(dtype))
    # All of them, before the first is timed.
    for name in shapes:
        for int8 in (False, True):
            words = f"{name}{', scores in int8' if int8 else ''}: "
            tokens = video_like(device, SHAPES[name], dtype)
            keep(check_sampled(*tokens, _settings(SHAPES[name], int8)), words)
            del tokens
    rows, layers = [], []
    for name in shapes if timed else ():
        shape = SHAPES[name]
        q, k, v = video_like(device, shape, dtype)
        dense = dense_times(device, q, k, v, milliseconds)
        for backend, time in dense.items():
            rows.append(measured(device, shape, backend, 1.0, time) | {"shape": name})
            report(_line(rows[-1]))
        for density in densities:
            times = sparse_times(device, shape, q, k, v, density, milliseconds)
            for method, (share, time) in times.items():
                rows.append(measured(device, shape, method, share, time) | {"shape": name})
                report(_line(rows[-1]))
        for int8 in (False, True):
            config = _settings(shape, int8)
            layers.append({"shape": name, **layer_times(device, q, k, v, config, milliseconds)})
            layers[-1]["share_of_dense"] = layers[-1]["overhead_ms"] / min(dense.values())
            report(f"{name}: {layers[-1]}")
        del q, k, v
        torch.cuda.empty_cache()
    return {"checks": checks, "rows": rows, "layers": layers, "environment": environment()}


def _settings(shape: Shape, int8: bool) -> SemanticConfig:
    """The settings of a layer of this shape."""
    return SemanticConfig(shape.query_clusters, shape.key_clusters, int8_qk=int8)


def kernels_table(result: dict[str, Any]) -> str:
    """Show the result of `kernels`: how many checks there were, and a line per measurement."""
    lines = [f"{len(result['checks'])} checks, all within their limits"]
    lines += [_line(row) for row in result["rows"]] + [""] * bool(result["layers"])
    for layer in result["layers"]:
        lines.append(
            f"{layer['shape']:24} layer {layer['layer_ms']:8.2f} ms, density "
            f"{layer['density']:.2f}, clustering and the like {layer['overhead_ms']:.2f} ms "
            f"({layer['share_of_dense']:.1%} of dense), {layer['launches']} launches, "
            f"{layer['scratch_bytes'] / 2**20:.0f} MiB of scratch"
            f"{', scores in int8' if layer['int8_qk'] else ''}"
        )
    return "\n".join(lines)


def measured(
    device: Device, shape: Shape, method: str, density: float, milliseconds: float
) -> dict[str, Any]:
    """Return the row of one measurement."""
    operations = 4 * shape.heads * shape.tokens**2 * shape.head_dim * density
    rate = operations / milliseconds / 1e9
    peak = device.peak_rate()
    return {
        "method": method,
        "density": density,
        "milliseconds": milliseconds,
        "useful_tflops": rate,
        "share_of_datasheet_peak": rate * 1e12 / peak if peak else None,
    }


def _line(row: dict[str, Any]) -> str:
    """Show one measurement."""
    share = row["share_of_datasheet_peak"]
    return (
        f"{row['shape']:24} {row['method']:32} density {row['density']:4.2f} "
        f"{row['milliseconds']:9.3f} ms {row['useful_tflops']:6.0f} TFLOP/s"
        + (f" {share:4.0%} of peak" if share else "")
    )


def video_like(
    device: Device, shape: Shape, dtype: torch.dtype, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random tokens around random centres, so that clustering finds something."""
    torch.manual_seed(0)
    size = (batch, shape.heads, shape.tokens, shape.head_dim)
    out = []
    for _ in range(3):
        centres = torch.randn(*size[:2], 256, size[3], device=device.name, dtype=dtype)
        which = torch.randint(0, 256, (*size[:3], 1), device=device.name)
        x = torch.randn(size, device=device.name, dtype=dtype).mul_(0.5)
        out.append(x.add_(centres.gather(2, which.expand(size))))
    return out[0], out[1], out[2]


def dense_times(
    device: Device, q: Tensor, k: Tensor, v: Tensor, milliseconds: int
) -> dict[str, float]:
    """Time every dense attention that torch has here: name -> milliseconds."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def run(backend: Any = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        try:
            run()
        except RuntimeError:  # this build of torch does not have it
            continue
        name = f"dense {backend.name.split('_')[0].lower()}"
        times[name] = device.milliseconds(run, milliseconds)
    if not times:
        times["dense sdpa"] = device.milliseconds(
            lambda: scaled_dot_product_attention(q, k, v), milliseconds
        )
    return times


def sparse_times(
    device: Device,
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: float,
    milliseconds: int,
    *,
    others: bool = True,
) -> dict[str, tuple[float, float]]:
    """Time each sparse method on one random selection: method -> density, milliseconds.

    Args:
        device: where the tensors are.
        shape: theirs, and the number of clusters.
        q, k, v: [1, H, S, D].
        density: computed share of all pairs, as nearly as whole clusters allow.
        milliseconds: how long one measurement repeats.
        others: time those of other libraries too.
    """
    from vidaccel.kernels.block_sparse_attention import block_sparse_attention

    drawn = draw_selection(device, shape, density)
    share = drawn.density(shape.tokens)
    times = {}
    for name, int8 in (("vidaccel", False), ("vidaccel int8, rounding counted", True)):

        def ours(int8: bool = int8) -> object:
            lists = (drawn.q_offsets, drawn.k_offsets, drawn.selection)
            scale = shape.head_dim**-0.5
            return block_sparse_attention(
                q, k, v, *lists, scale=scale, int8_qk=int8, impl="triton"
            )[0]

        times[name] = (share, device.milliseconds(ours, milliseconds))
    if others:
        times |= _flashinfer(device, q, k, v, drawn, milliseconds)
        times |= _flex(device, q, k, v, density, milliseconds)
    return times


@dataclass(frozen=True)
class DrawnSelection:
    """A random selection of key clusters of random sizes.

    Attributes:
        q_offsets, k_offsets: [1, H, Qc + 1] and [1, H, Kc + 1] int32.
        mask: [1, H, Qc, Kc] bool.
        selection: the same as lists.
    """

    q_offsets: Tensor
    k_offsets: Tensor
    mask: Tensor
    selection: Selection

    def density(self, tokens: int) -> float:
        """Return the share of all pairs that is computed, the mean of the heads."""
        shares = computed_share(self.selection.tokens, self.q_offsets.diff(), tokens)
        return float(shares.mean())


def draw_selection(device: Device, shape: Shape, share: float) -> DrawnSelection:
    """Draw clusters of different sizes, and select each pair of them with this probability."""
    from vidaccel.kernels import reference

    q_offsets = _ragged(device, shape.query_clusters, shape.tokens, shape.heads)
    k_offsets = _ragged(device, shape.key_clusters, shape.tokens, shape.heads)
    size = (1, shape.heads, shape.query_clusters, shape.key_clusters)
    mask = torch.rand(size, device=device.name) < share
    return DrawnSelection(
        q_offsets, k_offsets, mask, reference.selection_from_mask(mask, k_offsets.diff())
    )


def _ragged(device: Device, count: int, tokens: int, heads: int) -> Tensor:
    """Return offsets of `count` clusters of different sizes: [1, heads, count + 1] int32."""
    weight = torch.rand(1, heads, count, device=device.name) + 0.3
    ends = (weight.cumsum(-1) / weight.sum(-1, keepdim=True) * tokens).round().int()
    ends[..., -1] = tokens
    return torch.nn.functional.pad(ends, (1, 0))


def _flex(
    device: Device, q: Tensor, k: Tensor, v: Tensor, density: float, milliseconds: int
) -> dict[str, tuple[float, float]]:
    """Time flex_attention with fixed blocks of 128 at the same density: it has no ragged ones."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = math.ceil(q.shape[2] / 128)
    mask = torch.rand(1, q.shape[1], blocks, blocks, device=device.name) < density
    mask[..., 0] = True
    count = mask.sum(-1).int()
    index = mask.int().argsort(dim=-1, descending=True, stable=True).int()
    try:
        made = BlockMask.from_kv_blocks(
            torch.zeros_like(count), torch.zeros_like(index), count, index, BLOCK_SIZE=128
        )
        # A compiler of C++ need not be there for a dry run.
        attention = torch.compile(flex_attention) if device.on_gpu else flex_attention

        def run() -> Any:
            return attention(q, k, v, block_mask=made)

        run()
    except Exception as error:  # what does not run here is left out, and said so
        return {f"flex: {type(error).__name__}": (math.nan, math.nan)}
    share = (count.sum() / mask.numel()).item()
    return {"flex_attention 128x128": (share, device.milliseconds(run, milliseconds))}


def _flashinfer(
    device: Device, q: Tensor, k: Tensor, v: Tensor, drawn: DrawnSelection, milliseconds: int
) -> dict[str, tuple[float, float]]:
    """Time FlashInfer's variable-block wrapper, planning counted, where it is installed."""
    try:
        from flashinfer.sparse import VariableBlockSparseAttentionWrapper
    except ImportError:
        return {}
    heads, tokens, head_dim = q.shape[1:]
    wrapper = VariableBlockSparseAttentionWrapper(
        torch.empty(128 * 2**20, dtype=torch.uint8, device=device.name)
    )
    rows, columns = drawn.q_offsets[0].diff(), drawn.k_offsets[0].diff()

    def run() -> Any:
        wrapper.plan(drawn.mask[0], rows, columns, heads, heads, head_dim, q_data_type=q.dtype)
        return wrapper.run(q[0], k[0], v[0])

    run()
    share = drawn.density(tokens)
    return {"FlashInfer with plan": (share, device.milliseconds(run, milliseconds))}


def layer_times(
    device: Device, q: Tensor, k: Tensor, v: Tensor, config: SemanticConfig, milliseconds: int
) -> dict[str, Any]:
    """Time a whole layer in its steady state, and what of it is not attention.

    "overhead_ms" is the sum of the other kernels in one profile: a GPU at the limit of its power
    has other clocks for a layer than for its attention alone.

    Raises:
        RuntimeError: the host waits for the device.
    """
    from vidaccel.kernels.block_lists import fill_block_lists
    from vidaccel.kernels.block_sparse_attention import attend, empty_block_lists
    from vidaccel.kernels.quantise import quantise_keys
    from vidaccel.kernels.semantic_attention import semantic_attention
    from vidaccel.kernels.state import SemanticState

    state = SemanticState()
    tokens, head_dim = q.shape[2:]

    def layer() -> object:
        return semantic_attention(q, k, v, state, config, impl="triton")

    layer()
    with device.no_waiting():
        layer()
    counts = device.counted(layer)
    peak = device.peak_bytes(layer)
    total = device.milliseconds(layer, milliseconds)
    graph = device.milliseconds(device.captured(layer), milliseconds)
    query, key, selection = state.query, state.key, state.selection
    assert query is not None and key is not None and selection is not None
    num_clusters = (selection.num_queries, selection.num_keys)
    lists = empty_block_lists(q, tokens, *num_clusters, num_means=None, int8_qk=config.int8_qk)
    fill_block_lists(lists, selection, query.offsets, key.offsets, selection.num_queries)
    keys = quantise_keys(k, key.offsets, config.key_clusters) if config.int8_qk else k
    alone = device.milliseconds(
        lambda: attend(
            q, keys, v, query.offsets, key.offsets, lists,
            scale=head_dim**-0.5, sorted_idx=query.sorted_idx,
        ),
        milliseconds,
    )  # fmt: skip
    others = (
        sum(time for name, time in counts.kernels.items() if not name.startswith("_attend")) / 1e3
    )
    return {
        "int8_qk": config.int8_qk,
        "layer_ms": total,
        "graph_ms": graph,
        "attention_ms": alone,
        "overhead_ms": others if counts.kernels else total - alone,
        "density": state.density().mean().item(),
        "launches": counts.launches,
        "waits": counts.waits,
        "kernels_us": counts.to_dict()["kernels_us"],
        "scratch_bytes": None if peak is None else peak - q.numel() * q.element_size(),
    }
