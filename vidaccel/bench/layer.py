"""Predicts what one layer of semantic attention costs a chip that need not be here.

Of every launch: the turns of its inner loops, the instructions that they issue, the bytes that it
moves, and the time that its busiest unit takes. Instructions are those of the generated code, turns
follow from the shape and a random selection, and bytes count each tensor once, as if caches held
all else. Kernels that only move and count are taken to be as fast as the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from vidaccel.bench.codegen import disassembled, instructions, loop_cycles, matrix_loops
from vidaccel.bench.kernels import Shape
from vidaccel.environment import environment
from vidaccel.errors import VidaccelError


class _Rates(NamedTuple):
    """Rates of a card, of its datasheet.

    Attributes:
        card: its name.
        processors: multiprocessors.
        clock: cycles per second, boosted.
        bandwidth: bytes per second of its memory.
    """

    card: str
    processors: int
    clock: float
    bandwidth: float


# Without sm_100, where the compiler takes loops apart, so that their turns are not known.
RATES = {
    80: _Rates("A100 SXM 80 GB", 108, 1.41e9, 2.039e12),
    90: _Rates("H100 SXM", 132, 1.83e9, 3.35e12),
    120: _Rates("RTX 5090", 170, 2.41e9, 1.792e12),
}


@dataclass(frozen=True)
class Launch:
    """A launch of a layer.

    Attributes:
        kernel: its name in the inventory of kernels.
        times: how often it is launched.
        bytes_moved: read from and written to memory by one launch.
        turns: how often each loop with matrix products turns, in the order of the code, in all
            programs of one launch together; none where the time goes into memory.
        columns: constants that name the columns of the tile of each loop.
    """

    kernel: str
    times: int
    bytes_moved: float
    turns: tuple[float, ...] = ()
    columns: tuple[str, ...] = ()


def layer(
    shape: Shape, density: float, chip: int = 90, *, mass: bool = True, means: bool = True
) -> dict[str, Any]:
    """Predict one layer in bf16 in its steady state: two rounds of k-means and all the rest.

    Args:
        shape: the layer.
        density: computed share of all pairs, from 0 to 1; the selection is random.
        chip: a compute capability of `RATES`.
        mass: queries score clusters one by one, as `SVG2(mass_averaging=True)` has it.
        means: what is left out takes part by its means, as `SVG2(compensation=True)` has it.

    Returns:
        "launches" (a row per kernel), "layer_us", "dense_us" (the same attention kernel over all
        pairs in full tiles, and nothing else) and the settings. Times are pairs: every unit of a
        multiprocessor hides the others, or matrix products wait for all else.

    Raises:
        VidaccelError: `RATES` does not have the chip, or the compiler has taken the loops of a
            kernel apart, so that their turns are not known.
    """
    if chip not in RATES:
        raise VidaccelError(f"there are rates of sm_{', sm_'.join(map(str, RATES))}, not sm_{chip}")
    configs = _configs(shape, chip)
    attend = configs["attend_means" if means else "attend"].constants
    turns = attention_turns(shape, density, attend["BLOCK_M"], attend["BLOCK_N"])
    blocks = [-(-shape.tokens // attend[name]) for name in ("BLOCK_M", "BLOCK_N")]
    every = (float(shape.heads * blocks[0] * blocks[1]), 0.0)
    constants = {name: config.constants for name, config in configs.items()}
    listed = launches(shape, turns, constants, mass=mass, means=means)
    rows = [_row(shape, launch, configs[launch.kernel], chip) for launch in listed]
    dense = Launch("attend", 1, _attended(shape), every, ("BLOCK_N", "BLOCK_N"))
    return {
        "shape": asdict(shape),
        "density": density,
        "chip": chip,
        "card": RATES[chip].card,
        "launches": rows,
        "layer_us": _summed(rows),
        "dense_us": _row(shape, dense, configs["attend"], chip)["microseconds"],
        "environment": environment(),
    }


class AttentionTurns(NamedTuple):
    """Turns of the attention kernel in one layer.

    Attributes:
        tiles: tiles of queries.
        full, partial: turns over full blocks and over tiles of partial ones.
    """

    tiles: float
    full: float
    partial: float

    @property
    def loops(self) -> tuple[float, float]:
        """Return the turns of its two loops over keys."""
        return self.full, self.partial


def attention_turns(
    shape: Shape, density: float, block_m: int, block_n: int, partial: int = 16
) -> AttentionTurns:
    """Count the turns for a random selection among clusters of random sizes, the same each time.

    Args:
        shape: the layer.
        density: share of the key clusters that a query cluster selects.
        block_m, block_n: the tile of queries and keys.
        partial: keys of a partial block.
    """
    generator = np.random.default_rng(0)
    sizes = _sizes(generator, shape.tokens, shape.key_clusters)
    tiles = -(-_sizes(generator, shape.tokens, shape.query_clusters) // block_m)
    chosen = max(round(density * shape.key_clusters), 1)
    full = rest = 0.0
    for of_cluster in tiles:
        selected = np.zeros(shape.key_clusters, dtype=bool)
        selected[generator.permutation(shape.key_clusters)[:chosen]] = True
        # A run is a stretch of selected neighbours: sums of sizes between changes.
        begins = np.flatnonzero(np.diff(selected, prepend=False, append=False))
        ends = np.concatenate([[0], np.cumsum(sizes)])[begins]
        lengths = ends[1::2] - ends[::2]
        pieces = (-(-(lengths % block_n) // partial)).sum()
        full += float(of_cluster) * float((lengths // block_n).sum())
        rest += float(of_cluster) * float(-(-pieces // (block_n // partial)))
    heads = shape.heads
    return AttentionTurns(heads * float(tiles.sum()), heads * full, heads * rest)


def _sizes(generator: np.random.Generator, tokens: int, clusters: int) -> Any:
    """Return sizes of clusters that tokens fall into evenly."""
    return generator.multinomial(tokens, np.full(clusters, 1 / clusters))


def launches(
    shape: Shape,
    turns: AttentionTurns,
    constants: dict[str, dict[str, Any]],
    *,
    mass: bool,
    means: bool,
) -> list[Launch]:
    """List the launches of a layer in bf16, in their order.

    Args:
        shape: the layer.
        turns: what attention takes.
        constants: kernel -> what is known of it when compiling.
        mass, means: as `layer` has them.
    """
    from vidaccel.kernels.reference import MASS_QUERIES
    from vidaccel.kernels.sort import CHUNK

    heads, tokens, row = shape.heads, shape.tokens, 2 * shape.head_dim
    num_q, num_k = shape.query_clusters, shape.key_clusters
    both, clusters = 2 * heads * tokens, heads * (num_q + num_k)
    counts = 4 * clusters * -(-tokens // CHUNK)
    pairs = 4 * heads * num_q * num_k
    assign = constants["assign"]
    tiles = heads * -(-tokens // assign["BLOCK_M"])
    assigned = tiles * sum(-(-count // assign["BLOCK_N"]) for count in (num_q, num_k))
    found = [
        Launch("prepare", 1, clusters * (3 * 4 + 2) * shape.head_dim + counts),
        Launch("assign", 2, both * (row + 4) + counts, (assigned,), ("BLOCK_N",)),
        Launch("scan", 2, 2 * counts),
        Launch("rank", 2, 2 * both * 4 + counts),
        Launch("update", 1, both * (row + 4) + counts),
        Launch("update_sort", 1, both * (row + 4) + 3 * heads * tokens * row),
    ]
    if mass:
        tile = constants["mass"]
        looked_at = min(MASS_QUERIES, tokens // num_q)
        each = -(-looked_at // tile["BLOCK_M"]) * -(-num_k // tile["BLOCK_N"])
        twice = (float(heads * num_q * each),) * 2  # its sums, then its shares
        moved = heads * num_q * looked_at * row + pairs
        found.append(Launch("mass", 1, moved, twice, ("BLOCK_N", "BLOCK_N")))
    found += [Launch("threshold", 1, 2 * pairs), Launch("lists", 1, (2 + means) * pairs)]
    loops, columns = turns.loops, ("BLOCK_N", "BLOCK_N")
    if not means:
        return [*found, Launch("attend", 1, _attended(shape), loops, columns)]
    known = constants["attend_means"]
    of_means = "BLOCK_MEANS" if "BLOCK_MEANS" in known else "BLOCK_N"
    more = turns.tiles * -(-num_k // known[of_means])
    moved = _attended(shape) + pairs
    return [
        *found,
        Launch("attend_means", 1, moved, (*loops, more), (*columns, of_means)),
    ]


def _attended(shape: Shape) -> float:
    """Return the bytes of queries, keys, values, output and log-sum-exp, each once."""
    return shape.heads * shape.tokens * (4 * 2 * shape.head_dim + 4)


def _configs(shape: Shape, chip: int) -> dict[str, Any]:
    """Return the shipped config of each kernel of the layer."""
    from vidaccel.bench.kernel_inventory import shipped

    found = {
        config.kernel: config
        for config in shipped(chip)
        if config.head_dim in (None, shape.head_dim) and config.dtype in (None, "bf16")
    }
    # Where there is one for the chip, it does what the common kernel does elsewhere.
    for name in ("attend", "attend_means"):
        found[name] = found.get(name.replace("attend", "attend_hopper"), found[name])
    return found


def _row(shape: Shape, launch: Launch, config: Any, chip: int) -> dict[str, Any]:
    """Predict all launches of a kernel in one layer."""
    rates = RATES[chip]
    cycles = {"tensor": 0.0, "issue": 0.0, "exponent": 0.0, "overlapped": 0.0, "serial": 0.0}
    issued = 0.0
    if launch.turns:
        _, text = disassembled(config.compile(chip).asm["cubin"])
        loops = matrix_loops(instructions(text))
        if len(loops) != len(launch.turns):
            raise VidaccelError(
                f"{config.name} on sm_{chip} has {len(loops)} loops of products, not those "
                f"{len(launch.turns)} of its source: the compiler has taken them apart"
            )
        for turns, columns, loop in zip(launch.turns, launch.columns, loops, strict=True):
            width = config.constants[columns]
            found = loop_cycles(config, chip, [name for name, _ in loop], width)
            issued += turns * config.num_warps * len(loop)
            for unit, value in zip(("tensor", "issue", "exponent"), found, strict=True):
                cycles[unit] += turns * value
            cycles["overlapped"] += turns * max(found)
            cycles["serial"] += turns * (found[0] + max(found[1:]))
    moving = 1e6 * launch.bytes_moved / rates.bandwidth
    times = [
        launch.times * max(moving, 1e6 * cycles[name] / rates.processors / rates.clock)
        for name in ("overlapped", "serial")
    ]
    return {
        "kernel": launch.kernel,
        "times": launch.times,
        "turns": launch.times * sum(launch.turns),
        "warp_instructions": launch.times * issued,
        "bytes": launch.times * launch.bytes_moved,
        "microseconds": times,
    }


def _summed(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the times of all launches together."""
    return [sum(row["microseconds"][end] for row in rows) for end in range(2)]


def layer_table(result: dict[str, Any]) -> str:
    """Show the result of `layer`: a line per kernel, and the layer against dense attention."""
    shape = result["shape"]
    lines = [
        f"{shape['heads']} heads of {shape['head_dim']}, {shape['tokens']:,} tokens, "
        f"{shape['query_clusters']} and {shape['key_clusters']} clusters",
        f"{'kernel':13} {'times':>5} {'turns':>10} {'instructions':>13} {'MB':>8}  {'us':>15}",
    ]
    for row in result["launches"]:
        low, high = row["microseconds"]
        lines.append(
            f"{row['kernel']:13} {row['times']:5} {row['turns']:10,.0f} "
            f"{row['warp_instructions'] / 1e6:11,.1f} M {row['bytes'] / 1e6:8,.0f}  "
            f"{low:6,.0f} to {high:6,.0f}"
        )
    (low, high), (fast, slow) = result["layer_us"], result["dense_us"]
    attention = result["launches"][-1]["microseconds"]
    lines += [
        f"{'layer':54} {low:6,.0f} to {high:6,.0f}",
        f"{'dense attention':54} {fast:6,.0f} to {slow:6,.0f}",
        f"at a density of {result['density']:.0%} on {result['card']}: {fast / low:.2f} to "
        f"{slow / high:.2f} times as fast as dense attention, of which all but attention takes "
        f"{(low - attention[0]) / fast:.1%} to {(high - attention[1]) / slow:.1%}",
        "predictions from instruction counts and datasheets, not measurements",
    ]
    return "\n".join(lines)
