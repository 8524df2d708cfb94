"""Measures the kernels on a CUDA GPU: correctness first, then time against dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidaccel.bench.kernel_checks import check
from vidaccel.environment import environment
from vidaccel.errors import VidaccelError


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
# Dense 16-bit floating-point operations per second of the chip's datasheet.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def require_gpu() -> None:
    """Refuse to go on without a CUDA GPU and Triton.

    Raises:
        VidaccelError: one of them is not there.
    """
    if not torch.cuda.is_available():
        raise VidaccelError(
            "bench kernels measures on a CUDA GPU, and there is none here; "
            "vidaccel bench codegen needs none"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise VidaccelError("bench kernels needs Triton: pip install triton") from error


def kernels(
    shapes: Sequence[str] = tuple(SHAPES),
    densities: Sequence[float] = DENSITIES,
    *,
    dtype: torch.dtype = torch.bfloat16,
    milliseconds: int = 300,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Check every kernel, then time it at the shapes of video models.

    Args:
        shapes: names of SHAPES.
        densities: computed shares of all pairs; the selection at each is random, and the same for
            every method that is given one.
        dtype: bfloat16 or float16.
        milliseconds: how long one measurement repeats.
        report: takes a line of progress.

    Returns:
        "checks" (name -> error and limit), "rows" (times in milliseconds, useful TFLOP/s on the
        selected pairs), "layers" (a whole layer with clustering: time, launches, scratch bytes)
        and "environment".

    Raises:
        CheckError: a kernel is wrong; nothing is timed then.
        VidaccelError: there is no GPU.
    """
    require_gpu()
    checks = check(dtype)
    for name, found in checks.items():
        report(f"{name:44} error {found['error']:.2e} of at most {found['limit']:.2e}")
    rows, layers = [], []
    for name in shapes:
        shape = SHAPES[name]
        q, k, v = _video_like(shape, dtype)
        dense = _dense(q, k, v, milliseconds)
        for backend, time in dense.items():
            rows.append(_measured(name, shape, backend, 1.0, time))
            report(_line(rows[-1]))
        for density in densities:
            for method, (share, time) in _sparse(shape, q, k, v, density, milliseconds).items():
                rows.append(_measured(name, shape, method, share, time))
                report(_line(rows[-1]))
        for int8 in (False, True):
            layers.append({"shape": name, **_layer(shape, q, k, v, milliseconds, int8)})
            layers[-1]["share_of_dense"] = layers[-1]["overhead_ms"] / min(dense.values())
            report(f"{name}: {layers[-1]}")
        del q, k, v
        torch.cuda.empty_cache()
    return {"checks": checks, "rows": rows, "layers": layers, "environment": environment()}


def kernels_table(result: dict[str, Any]) -> str:
    """Show the result of `kernels`: a line per measurement."""
    lines = [_line(row) for row in result["rows"]] + [""]
    for layer in result["layers"]:
        lines.append(
            f"{layer['shape']:24} layer {layer['layer_ms']:8.2f} ms, density "
            f"{layer['density']:.2f}, clustering and the like {layer['overhead_ms']:.2f} ms "
            f"({layer['share_of_dense']:.1%} of dense), {layer['launches']} launches, "
            f"{layer['scratch_bytes'] / 2**20:.0f} MiB of scratch"
            f"{', scores in int8' if layer['int8_qk'] else ''}"
        )
    return "\n".join(lines)


def _measured(
    name: str, shape: Shape, method: str, density: float, milliseconds: float
) -> dict[str, Any]:
    """Return the row of one measurement."""
    operations = 4 * shape.heads * shape.tokens**2 * shape.head_dim * density
    rate = operations / milliseconds / 1e9
    card = torch.cuda.get_device_name()
    peak = next((value for part, value in _PEAKS.items() if part in card), None)
    return {
        "shape": name,
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


def _time(run: Callable[[], object], milliseconds: int) -> float:
    """Return the median time of a call in milliseconds, measured with device events."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=milliseconds, return_mode="median"))


def _video_like(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random tokens around random centres, so that clustering finds something."""
    torch.manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    out = []
    for _ in range(3):
        centres = torch.randn(shape.heads, 256, shape.head_dim, device="cuda", dtype=dtype)
        which = torch.randint(0, 256, (shape.heads, shape.tokens, 1), device="cuda")
        x = centres.gather(1, which.expand(-1, -1, shape.head_dim)).view(size)
        out.append(x + 0.5 * torch.randn(size, device="cuda", dtype=dtype))
    return out[0], out[1], out[2]


def _dense(q: Tensor, k: Tensor, v: Tensor, milliseconds: int) -> dict[str, float]:
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
        times[f"dense {backend.name.split('_')[0].lower()}"] = _time(run, milliseconds)
    if not times:
        times["dense sdpa"] = _time(lambda: scaled_dot_product_attention(q, k, v), milliseconds)
    return times


def _ragged(count: int, tokens: int, heads: int) -> Tensor:
    """Return offsets of `count` clusters of different sizes: [1, heads, count + 1] int32."""
    weight = torch.rand(1, heads, count, device="cuda") + 0.3
    ends = (weight.cumsum(-1) / weight.sum(-1, keepdim=True) * tokens).round().int()
    ends[..., -1] = tokens
    return torch.nn.functional.pad(ends, (1, 0))


def _sparse(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, density: float, milliseconds: int
) -> dict[str, tuple[float, float]]:
    """Time each sparse method on one random selection: method -> density, milliseconds."""
    from vidaccel.kernels import reference
    from vidaccel.kernels.block_sparse_attention import block_sparse_attention
    from vidaccel.kernels.common import density as computed

    q_offsets = _ragged(shape.query_clusters, shape.tokens, shape.heads)
    k_offsets = _ragged(shape.key_clusters, shape.tokens, shape.heads)
    size = (1, shape.heads, shape.query_clusters, shape.key_clusters)
    mask = torch.rand(size, device="cuda") < density
    selection = reference.selection_from_mask(mask, k_offsets.diff())
    share = computed(selection.tokens, q_offsets.diff(), shape.tokens).mean().item()
    scale = shape.head_dim**-0.5

    times = {}
    for name, int8 in (("vidaccel", False), ("vidaccel int8, rounding counted", True)):

        def ours(int8: bool = int8) -> object:
            lists = (q_offsets, k_offsets, selection)
            return block_sparse_attention(q, k, v, *lists, scale=scale, int8_qk=int8)[0]

        times[name] = (share, _time(ours, milliseconds))
    times |= _flashinfer(q, k, v, q_offsets, k_offsets, mask, share, milliseconds)
    times |= _flex(q, k, v, density, milliseconds)
    return times


def _flex(
    q: Tensor, k: Tensor, v: Tensor, density: float, milliseconds: int
) -> dict[str, tuple[float, float]]:
    """Time flex_attention with fixed blocks of 128 at the same density: it has no ragged ones."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = math.ceil(q.shape[2] / 128)
    mask = torch.rand(1, q.shape[1], blocks, blocks, device="cuda") < density
    mask[..., 0] = True
    count = mask.sum(-1).int()
    index = mask.int().argsort(dim=-1, descending=True, stable=True).int()
    try:
        made = BlockMask.from_kv_blocks(
            torch.zeros_like(count), torch.zeros_like(index), count, index, BLOCK_SIZE=128
        )
        compiled = torch.compile(flex_attention)

        def run() -> Any:
            return compiled(q, k, v, block_mask=made)

        run()
    except Exception as error:  # what does not run here is left out, and said so
        return {f"flex: {type(error).__name__}": (math.nan, math.nan)}
    share = (count.sum() / mask.numel()).item()
    return {"flex_attention 128x128": (share, _time(run, milliseconds))}


def _flashinfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    mask: Tensor,
    share: float,
    milliseconds: int,
) -> dict[str, tuple[float, float]]:
    """Time FlashInfer's variable-block wrapper, planning counted, where it is installed."""
    try:
        from flashinfer.sparse import VariableBlockSparseAttentionWrapper
    except ImportError:
        return {}
    heads, head_dim = q.shape[1], q.shape[3]
    wrapper = VariableBlockSparseAttentionWrapper(
        torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    )
    rows, columns = q_offsets[0].diff(), k_offsets[0].diff()

    def run() -> Any:
        wrapper.plan(mask[0], rows, columns, heads, heads, head_dim, q_data_type=q.dtype)
        return wrapper.run(q[0], k[0], v[0])

    run()
    return {"FlashInfer with plan": (share, _time(run, milliseconds))}


def _layer(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, milliseconds: int, int8_qk: bool
) -> dict[str, Any]:
    """Time a whole layer in its steady state, and what of it is not attention."""
    from vidaccel.kernels.block_lists import fill_block_lists
    from vidaccel.kernels.block_sparse_attention import attend, empty_block_lists
    from vidaccel.kernels.quantise import quantise_keys
    from vidaccel.kernels.semantic_attention import semantic_attention
    from vidaccel.kernels.state import SemanticConfig, SemanticState

    config = SemanticConfig(shape.query_clusters, shape.key_clusters, int8_qk=int8_qk)
    state = SemanticState()
    semantic_attention(q, k, v, state, config)

    def layer() -> object:
        return semantic_attention(q, k, v, state, config)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a host synchronisation raises
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer()
        torch.cuda.synchronize()
    launches = sum(
        event.count for event in profile.key_averages() if str(event.device_type).endswith("CUDA")
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer()
    scratch = torch.cuda.max_memory_allocated() - before - q.numel() * q.element_size()
    total = _time(layer, milliseconds)
    query, key, selection = state.query, state.key, state.selection
    assert query is not None and key is not None and selection is not None
    num_clusters = (selection.num_queries, selection.num_keys)
    lists = empty_block_lists(q, shape.tokens, *num_clusters, num_means=None, int8_qk=int8_qk)
    fill_block_lists(lists, selection, query.offsets, key.offsets, selection.num_queries)
    keys = quantise_keys(k, key.offsets, shape.key_clusters) if int8_qk else k
    alone = _time(
        lambda: attend(
            q, keys, v, query.offsets, key.offsets, lists,
            scale=shape.head_dim**-0.5, sorted_idx=query.sorted_idx,
        ),
        milliseconds,
    )  # fmt: skip
    return {
        "int8_qk": int8_qk,
        "layer_ms": total,
        "attention_ms": alone,
        "overhead_ms": total - alone,
        "density": state.density().mean().item(),
        "launches": launches,
        "scratch_bytes": scratch,
    }
