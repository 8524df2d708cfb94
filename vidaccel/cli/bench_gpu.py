"""The bench of everything on a GPU: `vidaccel bench gpu`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vidaccel.cli.argument_types import number
from vidaccel.cli.options import add_command
from vidaccel.errors import BenchError


def add_gpu(benches: Any) -> None:
    """Add `vidaccel bench gpu`."""
    parser = add_command(
        benches, "gpu", "measure everything on a CUDA GPU in one short sitting, best first"
    )
    parser.add_argument(
        "--minutes", type=number(0, above=True), default=8.0, help="bound of the whole run"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-results"),
        help="folder of the results; a run that was stopped goes on there",
    )
    parser.add_argument(
        "--part",
        default="kernels,attention,models,precision,train",
        help="what to measure, in this order; also: tune",
    )
    parser.add_argument(
        "--dry", action="store_true", help="go through it with tiny sizes on the CPU; no GPU"
    )
    parser.set_defaults(run=_gpu)


def _gpu(arguments: argparse.Namespace) -> None:
    """Run `vidaccel bench gpu`."""
    from vidaccel.bench.gpu import gpu
    from vidaccel.bench.gpu_summary import summary_table

    summary = gpu(
        [part.strip() for part in arguments.part.split(",") if part.strip()],
        minutes=arguments.minutes,
        out=arguments.out,
        dry=arguments.dry,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(summary_table(summary))
    print(f"wrote {arguments.out}/summary.json", file=sys.stderr)
    failed = [name for progress in summary["parts"].values() for name in progress["failed"]]
    if failed:
        raise BenchError(
            f"{len(failed)} of the items failed, among them {failed[0]!r}; the files in "
            f"{arguments.out} say how, and the same command tries them again"
        )
