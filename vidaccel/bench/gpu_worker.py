"""One part of `vidaccel bench gpu`, in a process of its own, each result written as it comes.

A kernel that reads where it must not leaves its process without a device, and one that never ends
leaves it hanging: neither may cost what other items would have found.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vidaccel.bench.gpu_device import GpuWatch
from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.environment import environment
from vidaccel.errors import BenchError
from vidaccel.files import finite
from vidaccel.kernels import common
from vidaccel.kernels.interpreter import mend_interpreter
from vidaccel.shards import ShardFolder, read_manifest

# The module of each part, whose `items` lists what it measures, the most valuable first.
PARTS = {
    "kernels": "vidaccel.bench.gpu_kernels",
    "attention": "vidaccel.bench.gpu_attention",
    "models": "vidaccel.bench.gpu_models",
    "precision": "vidaccel.bench.gpu_precision",
    "train": "vidaccel.bench.gpu_train",
    "tune": "vidaccel.bench.gpu_tune",
}
# The exit code of a process whose device can no longer be used; another one goes on.
BROKEN = 75

Status = Literal["done", "failed", "running", "left"]


class PartRecord:
    """The file of a part: its items by name, each with a status, and what it found.

    "done" stays; "failed" is tried again in the next run; "running" is of a process that has
    ended before; "left" is what there was no time or memory for.

    Args:
        folder: the folder of the run.
        part: a name of PARTS.
        run: tells this run from those before it.
    """

    def __init__(self, folder: ShardFolder, part: str, run: str) -> None:
        self._folder, self.part, self._run = folder, part, run
        found = folder.read(part, dict)
        self.items: dict[str, dict[str, Any]] = {} if found is None else found["items"]

    def wanted(self, name: str) -> bool:
        """Tell whether an item has neither been measured nor failed in this run."""
        item = self.items.get(name, {})
        return item.get("status") != "done" and not (
            item.get("status") == "failed" and item.get("run") == self._run
        )

    def running(self) -> list[str]:
        """Return the items that a process was at."""
        return [name for name, item in self.items.items() if item["status"] == "running"]

    def forget(self, name: str) -> None:
        """Drop what is known of an item, if anything is."""
        if self.items.pop(name, None) is not None:
            self._write()

    def note(self, name: str, status: Status, **found: Any) -> None:
        """Keep what is known of an item; the file is written at once."""
        self.items[name] = {"status": status, "run": self._run, **finite(found)}
        self._write()

    def _write(self) -> None:
        self._folder.write(self.part, {"part": self.part, "items": self.items})


def work(
    record: PartRecord,
    items: Sequence[Item],
    sizes: Sizes,
    deadline: float,
    log: Callable[[str], object],
) -> int:
    """Run the items of a part that are wanted, in order, as long as there is time.

    Args:
        record: where results are kept.
        items: those of the part.
        sizes: where it runs.
        deadline: seconds since the epoch; an item is started only where it should end before.
        log: takes a line of progress.

    Returns:
        0, or BROKEN where the device can no longer be used.
    """
    with GpuWatch() as watch:
        return _work(record, items, sizes, deadline, log, watch)


def _work(
    record: PartRecord,
    items: Sequence[Item],
    sizes: Sizes,
    deadline: float,
    log: Callable[[str], object],
    watch: GpuWatch,
) -> int:
    device = sizes.device
    for item in items:
        if not record.wanted(item.name):
            continue
        if not sizes.dry and time.time() + item.seconds > deadline:
            record.note(item.name, "left", reason=f"would take about {item.seconds:.0f} s")
            continue
        if not sizes.dry and device.free_bytes() < item.gib * 2**30:
            record.note(item.name, "left", reason=f"needs about {item.gib:.0f} GiB of memory")
            continue
        watch.seen()
        started = time.time()
        record.note(item.name, "running")
        try:
            result = item.run()
            device.wait()
        except Exception as error:  # an item must not cost the others
            text = f"{type(error).__name__}: {error}"
            trace = traceback.format_exc(limit=-4)
            record.note(item.name, "failed", error=text, traceback=trace)
            log(f"{record.part}: {item.name}: {text.splitlines()[0]}")
            if _broken(sizes):
                return BROKEN
        else:
            seconds = time.time() - started
            record.note(item.name, "done", seconds=seconds, result=result, gpu=watch.seen())
            log(f"{record.part}: {item.name}: {seconds:.1f} s")
        gc.collect()
    return 0


def _broken(sizes: Sizes) -> bool:
    """Tell whether the device refuses all work, as it does after a wrong access."""
    gc.collect()
    try:
        sizes.device.wait()
        sizes.device.free_bytes()
        torch.zeros(1, device=sizes.device.name).add_(1).item()
    except RuntimeError:
        return True
    return False


def items_of(part: str, sizes: Sizes) -> list[Item]:
    """Return the items of a part, the most valuable first; a dry run repeats no code."""
    listed: list[Item] = importlib.import_module(PARTS[part]).items(sizes)
    return [item for item in listed if not (sizes.dry and item.repeats)]


def folder_of(path: Path, sizes: Sizes) -> ShardFolder:
    """Return the folder of a run; raises BenchError where it is that of another."""
    return ShardFolder(path, _manifest_of(sizes), "run", BenchError)


def _given_folder(path: Path) -> ShardFolder:
    """Return the folder that the starting process has made or has found to be that of its run."""
    return ShardFolder(path, read_manifest(path), "run", BenchError)


def _manifest_of(sizes: Sizes) -> dict[str, Any]:
    """Return what two runs must share so that one can go on with the results of the other."""
    known = environment()
    return {
        "bench": "gpu",
        "dry": sizes.dry,
        "gpu": None if sizes.dry else torch.cuda.get_device_name(),
        "packages": {name: known["packages"].get(name) for name in ("torch", "triton")},
        "kernels": _digest_of_kernels(),
    }


def _digest_of_kernels() -> str:
    """Return a digest of the source of the kernels: other kernels have other times."""
    digest = hashlib.sha256()
    for path in sorted(Path(common.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    """Run a part; the arguments are those that `vidaccel.bench.gpu` gives."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("run")
    parser.add_argument("deadline", type=float)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(arguments)
    sizes = Sizes(dry=given.dry)
    if sizes.dry:
        torch.set_num_threads(1)
        mend_interpreter()
    record = PartRecord(_given_folder(given.folder), given.part, given.run)
    listed = items_of(given.part, sizes)
    return work(record, listed, sizes, given.deadline, lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
