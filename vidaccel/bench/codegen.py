"""Shows what the compiler makes of every shipped kernel, for chips that need not be here.

Registers, spills and shared memory come from the resource report of the machine code, the
instruction mix of the inner loop from its disassembly. The share of peak is a *prediction*: it
says how long the tensor cores of one multiprocessor are busy in a turn of the inner loop, against
how long its other units are.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vidaccel.environment import environment
from vidaccel.errors import VidaccelError


class _Chip(NamedTuple):
    """Limits of a chip.

    Attributes:
        block_shared: largest shared memory of a block in bytes.
        shared: shared memory of a multiprocessor in bytes.
        registers: registers of a multiprocessor.
        operations: 16-bit floating-point operations of its tensor cores per cycle.
    """

    block_shared: int
    shared: int
    registers: int
    operations: int


_CHIPS = {
    80: _Chip(166_912, 167_936, 65_536, 2048),
    90: _Chip(232_448, 233_472, 65_536, 4096),
    100: _Chip(232_448, 233_472, 65_536, 8192),
    120: _Chip(101_376, 102_400, 65_536, 1024),
}
CHIPS = tuple(_CHIPS)
# Kernels, types and chips whose products ptxas makes wait for each other, with what that means.
_GAINS_NOTHING = "scores in int8 gain nothing there"
_SERIALISED = {
    ("attend_int8", "fp16", 90): _GAINS_NOTHING,
    ("attend_int8", "bf16", 90): _GAINS_NOTHING,
    ("linear_mxint8", "fp32", 90): "each sum is scaled before the next; 16-bit outputs do without",
}
# The matrix instructions that a chip's tensor cores are fast with, of 16-bit numbers and of int8,
# which do twice as many operations on all of these.
_FAST = {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "UTCIMMA")}
_MATRIX = re.compile(r"^([HI]GMMA|[HI]MMA|UTC[HIQ]MMA|QGMMA|OMMA)")
_GROUPS = {
    "tensor": r"[HI]GMMA|[HI]MMA|UTC\w*MMA|QGMMA|OMMA",
    "exponent": r"MUFU",
    "fp32": r"FFMA2?|FMUL2?|FADD2?|FMNMX3?|FSEL|FSETP|F2FP|HADD2|HMUL2|FSET|FCHK",
    "integer": r"IMAD|IADD3?|LEA|LOP3|SHF|ISETP|IMNMX|SEL|PRMT|VIADD\w*|I2F\w*|MOV|PLOP3|UMOV",
    "uniform": r"U\w+|R2UR|S2UR|R2P",
    "copy": r"LDGSTS|UTMALDG|LDGDEPBAR|DEPBAR|UBLKCP",
    "global": r"LDG|STG|LD|ST|ATOMG?|RED",
    "shared": r"LDS|STS|LDSM|STSM|LDTM|STTM",
    "spill": r"LDL|STL",
    "barrier": r"BAR|WARPSYNC|SYNCS|WARPGROUP|FENCE|MEMBAR|ERRBAR|BSYNC|BSSY|ARRIVES",
    "branch": r"BRA|EXIT|CALL|RET|NOP|BREAK|JMP|YIELD",
}


def codegen(
    chips: Sequence[int] = CHIPS,
    *,
    wanted: Callable[[Any], bool] = lambda shipped: True,
    progress: bool = True,
) -> dict[str, Any]:
    """Compile every shipped config for every chip.

    Args:
        chips: compute capabilities, such as 90.
        wanted: keeps some of the configs.
        progress: show a bar.

    Returns:
        "rows" (one dictionary per config and chip), "problems" (what must not be: spills, too
        much shared memory, a matrix kernel off the fast path) and "environment".

    Raises:
        VidaccelError: Triton is not there, or a compiler rejects a kernel.
    """
    try:
        from vidaccel.bench.kernel_inventory import shipped
        from vidaccel.kernels.common import interpreting
    except ImportError as error:
        raise VidaccelError(f"codegen needs Triton: {error}") from error
    if interpreting():
        raise VidaccelError("codegen cannot run while TRITON_INTERPRET is set")
    from tqdm.auto import tqdm

    jobs = [(config, chip) for chip in chips for config in shipped(chip) if wanted(config)]
    rows = []
    for config, chip in tqdm(jobs, unit="kernel", disable=not progress):
        try:
            compiled = config.compile(chip)
        except Exception as error:
            raise VidaccelError(f"{config.name} does not compile for sm_{chip}: {error}") from error
        rows.append(_row(config, chip, compiled))
    return {"rows": rows, "problems": problems(rows), "environment": environment()}


def problems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Tell in words what must not be in shipped code; nothing if all is well."""
    found = []
    for row in rows:
        name = f"{row['name']} on sm_{row['chip']}"
        if row["spills"]:
            found.append(f"{name} spills registers: {row['spills']} instructions")
        if row["shared_bytes"] > _CHIPS[row["chip"]].block_shared:
            found.append(f"{name} needs {row['shared_bytes']} bytes of shared memory")
        if row["matrix"] and row["dtype"] != "fp32":
            expected: tuple[str, ...] = _FAST.get(row["chip"], ("HMMA", "IMMA"))
            if row["constants"].get("INTEGERS"):
                expected = expected[1:]
            elif not row["constants"].get("INT8"):
                expected = expected[:1]
            for fast in expected:
                if fast not in row["matrix_instructions"]:
                    seen = ", ".join(row["matrix_instructions"]) or "none"
                    found.append(f"{name} has no {fast} instructions, only {seen}")
        if row["warnings"] and (row["kernel"], row["dtype"], row["chip"]) not in _SERIALISED:
            found.append(f"{name}: ptxas warns of lost speed ({', '.join(row['warnings'])})")
    return found


def notes(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Tell in words what is known of shipped code and accepted, one line per kernel and chip."""
    found = []
    for (kernel, dtype, chip), meaning in _SERIALISED.items():
        known = (kernel, dtype, chip)
        warned = [
            row
            for row in rows
            if (row["kernel"], row["dtype"], row["chip"]) == known and row["warnings"]
        ]
        if warned:
            codes = ", ".join(sorted({code for row in warned for code in row["warnings"]}))
            found.append(f"{kernel} {dtype} on sm_{chip}: products wait ({codes}); {meaning}")
    return found


def codegen_table(result: dict[str, Any]) -> str:
    """Show the result of `codegen`: a line per kernel, with the loops of matrix kernels."""
    lines = [
        f"{'kernel':28} {'sm':>3} {'regs':>4} {'spill':>5} {'shared':>7} {'blocks':>6}  "
        f"{'matrix':15} {'tensor':>6} {'exp':>4} {'fp32':>5} {'int':>4} {'other':>5}  predicted"
    ]
    for row in result["rows"]:
        loop, share = row["loop"], row["predicted"]
        mix = ""
        if loop:
            named = ("tensor", "exponent", "fp32", "integer")
            other = sum(loop.values()) - sum(loop.get(n, 0) for n in named)
            counts = [loop.get(n, 0) for n in named] + [other]
            mix = "{:>6} {:>4} {:>5} {:>4} {:>5}".format(*counts)
        kind = "+".join(row["matrix_instructions"]) or "-"
        predicted = f"{share['serial']:.0%} to {share['overlapped']:.0%} of peak" if share else ""
        lines.append(
            f"{row['name']:28} {row['chip']:3} {row['registers']:4} {row['spills']:5} "
            f"{row['shared_bytes']:7} {row['blocks_per_multiprocessor']:6}  {kind:15} {mix:28}  "
            f"{predicted}".rstrip()
        )
    lines.append("")
    lines += result["problems"] or ["no spills, shared memory within limits, fast matrix units"]
    lines += notes(result["rows"])
    lines.append("shares of peak are predictions from instruction counts, not measurements")
    return "\n".join(lines)


def _row(config: Any, chip: int, compiled: Any) -> dict[str, Any]:
    """Return the row of one compiled config."""
    usage, text = disassembled(compiled.asm["cubin"])
    code = instructions(text)
    names = [name for _, name, _ in code]
    loops = matrix_loops(code) if config.matrix else []
    loop = [name for name, _ in loops[0]] if loops else []
    warnings = ptxas_warnings(compiled.asm["ptx"])
    warps = config.num_warps
    limits = _CHIPS[chip]
    shared = int(compiled.metadata.shared)
    # Registers are handed out by eights, to 32 threads of each warp.
    by_registers = limits.registers // (-(-usage["REG"] // 8) * 8 * 32 * warps)
    blocks = min(by_registers, limits.shared // (shared + 1024), 64 // warps)
    return {
        "name": config.name,
        "kernel": config.kernel,
        "chip": chip,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
        "matrix": config.matrix,
        "constants": {k: v for k, v in config.constants.items() if isinstance(v, int)},
        "num_warps": warps,
        "num_stages": config.num_stages,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "spills": sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        "shared_bytes": shared,
        "blocks_per_multiprocessor": blocks if shared <= limits.block_shared else 0,
        "matrix_instructions": sorted(
            {found.group(1) for name in names if (found := _MATRIX.match(name))}
        ),
        "warnings": warnings,
        "loop": _mix(loop),
        "loops": [_loop_row(each) for each in loops],
        "predicted": _predicted(config, chip, loop, blocks, bool(warnings)) if loop else None,
    }


def _loop_row(loop: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Count the instructions of a loop, its copies ahead of time, and how many may be pending."""
    names = [name.split(".")[0] for name, _ in loop]
    pending = [
        int(found.group(1), 16)
        for name, operands in loop
        if name.startswith("DEPBAR") and (found := re.search(r"0x([0-9a-f]+)", operands))
    ]
    return {
        "instructions": len(loop),
        "copies": sum(name in ("LDGSTS", "UTMALDG") for name in names),
        "loads": sum(name == "LDG" for name in names),
        "barriers": sum(name == "BAR" for name in names),
        "pending_copies": pending,
    }


def ptxas_warnings(ptx: str) -> list[str]:
    """Return the codes of what ptxas says of lost speed in asynchronous products, sorted.

    Compiling tells them once alone, and Triton keeps what it has compiled: so ptxas runs again.
    """
    if "wgmma" not in ptx:
        return []
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx.encode())
        file.flush()
        command = [str(_tool("ptxas")), "-v", f"--gpu-name={target.group(1)}", file.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    if done.returncode != 0:
        raise VidaccelError(f"ptxas failed: {done.stderr.strip()}")
    return sorted(set(re.findall(r"\((C75\d\d)\)", done.stdout + done.stderr)))


def _tool(name: str) -> Path:
    """Return a program that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """Return the resource report and the disassembly of a kernel."""
    tool = _tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = []
        for option in ("-res-usage", "-sass"):
            done = subprocess.run([str(tool), option, file.name], capture_output=True, text=True)
            if done.returncode != 0:
                raise VidaccelError(f"cuobjdump failed: {done.stderr.strip()}")
            outputs.append(done.stdout + done.stderr)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", outputs[0])}
    return usage, outputs[1]


def instructions(text: str) -> list[tuple[int, str, str]]:
    """Return (address, name, operands) of each instruction of a disassembly."""
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
    return [(int(a, 16), name, rest.strip()) for a, name, rest in pattern.findall(text)]


def matrix_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[str, str]]]:
    """Return the innermost loops with matrix instructions, as names and operands, in order.

    Those of attention are of full blocks, of partial ones, and of means.
    """
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    found = []
    for begin, end in loops:
        body = [(name, rest) for address, name, rest in code if begin <= address <= end]
        if any(_MATRIX.match(name) for name, _ in body):
            found.append((begin, end, body))
    return [
        body
        for begin, end, body in sorted(found, key=lambda each: each[:2])
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e, _ in found)
    ]


def _mix(loop: Sequence[str]) -> dict[str, int]:
    """Count the instructions of each group."""
    mix: Counter[str] = Counter()
    for name in loop:
        base = name.split(".")[0]
        group = next((g for g, p in _GROUPS.items() if re.fullmatch(p, base)), "other")
        mix[group] += 1
    return dict(mix)


def loop_cycles(
    config: Any, chip: int, loop: Sequence[str], columns: int
) -> tuple[float, float, float]:
    """Return how long a turn keeps tensor cores, issue slots and exponentials busy, in cycles.

    A scheduler issues one instruction per cycle to each of 4 quarters, and a quarter answers
    4 exponentials per cycle; on sm_80 its integers become floats in the same unit.

    Args:
        config: a shipped config, with BLOCK_M rows in its tile.
        chip: the compute capability.
        loop: names of the instructions of the loop.
        columns: how many its tile has.
    """
    constants = config.constants
    block_d = _depth(constants)
    # A loop unrolled by the compiler does several turns.
    tile = constants["BLOCK_M"] * columns * block_d
    tensor = config.products * 2 * tile / _CHIPS[chip].operations
    mix = _mix(loop)
    per_quarter = config.num_warps / 4
    issue = per_quarter * (len(loop) - mix.get("tensor", 0))
    converted = sum(name.split(".")[0] == "I2F" for name in loop)
    exponent = per_quarter * (mix.get("exponent", 0) + converted) * 32 / 4
    return tensor, issue, exponent


def _depth(constants: Mapping[str, Any]) -> int:
    """Return how many channels a tile has."""
    names = ("BLOCK_D", "HEAD_DIM", "BLOCK_K")
    return next(int(constants[name]) for name in names if constants.get(name))


def _predicted(
    config: Any, chip: int, loop: list[str], blocks: int, serialised: bool
) -> dict[str, float]:
    """Predict the cycles of a turn of the loop, and the tensor cores' share of them.

    Products of int8 count at their own rate, so that shares of different kernels are of different
    peaks. "overlapped" assumes that the busiest unit hides all others, which
    needs several blocks or warp groups per multiprocessor; "serial" that nothing overlaps, as where
    the compiler has serialised the products.
    """
    tensor, issue, exponent = loop_cycles(config, chip, loop, config.constants["BLOCK_N"])
    block_d = _depth(config.constants)
    useful = (config.head_dim or block_d) / block_d
    busiest = max(tensor, issue, exponent)
    serial = useful * tensor / (tensor + max(issue, exponent))
    return {
        "tensor_cycles": tensor,
        "issue_cycles": issue,
        "exponent_cycles": exponent,
        "useful_share_of_tile": useful,
        "blocks": blocks,
        "overlapped": serial if serialised else useful * tensor / busiest,
        "serial": serial,
    }
