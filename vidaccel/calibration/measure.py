"""All segments of a task measured, by whatever runner there is, and kept as they come."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from networkx import DiGraph
from tqdm.auto import tqdm

from vidaccel.calibration.assemble import Measured, graph_of
from vidaccel.calibration.replay import Replayer
from vidaccel.calibration.runners import RunInfo, Runner
from vidaccel.calibration.task import OneSegment, Task, WorkItem
from vidaccel.calibration.work_folder import WorkFolder
from vidaccel.lemica.graph import search_edges
from vidaccel.lemica.search import solve_edges

# More rounds of "lazy" than ever seen; each of them measures at least one new segment.
LAZY_ROUNDS = 50

_BAR = "{l_bar}{bar}| {n:.1f}/{total:.0f} generations [{elapsed}<{remaining}]"


def measure(
    runner: Runner,
    task: Task,
    folder: WorkFolder,
    *,
    budgets: Iterable[int],
    objective: str,
    progress: bool,
) -> tuple[DiGraph, RunInfo]:
    """Measure every segment of a task, and return the graph of them all.

    Args:
        runner: where the work is done.
        task: what is measured.
        folder: its shards; what they hold is not measured again.
        budgets: with the method "lazy", the segments of the best plans of these are measured
            exactly, until the plans stay.
        objective: what the best of them are, see `lemica.search.solve`.
        progress: a bar in units of generations.
    """
    steps, samples = task.num_inference_steps, range(len(task.samples()))
    measured: Measured = defaultdict(dict)
    total = task.forwards() / steps
    with tqdm(total=total, bar_format=_BAR, disable=not progress) as bar:
        info = runner.run_info()
        bar.update(2 - steps // 2 / steps)
        references = {0}  # samples whose generation with every step computed has run

        def finish(items: Iterable[tuple[int, WorkItem]]) -> None:
            """Load or measure (sample, item)s into `measured`."""
            todo = []
            for sample, item in items:
                known = folder.load(sample, item)
                if known is None:
                    todo.append((sample, item))
                else:
                    measured[sample][item] = known
                    bar.update(item.forwards(task) / steps)
            for sample, item, errors in runner.run(todo):
                folder.save(sample, item, errors)
                measured[sample][item] = errors
                bar.update(item.forwards(task) / steps + (sample not in references))
                references.add(sample)

        finish((sample, item) for sample in samples for item in task.items())
        if task.method != "lazy":
            return graph_of(task, measured), info
        exact: set[tuple[int, int]] = set()
        for _ in range(LAZY_ROUNDS):
            edges = search_edges(graph_of(task, measured), faithful=not task.lines)
            plans = solve_edges(edges, steps, budgets, objective=objective)
            used = {segment for plan in plans.values() for segment in plan.segments()}
            new = sorted(used - exact)
            if not new:
                break
            finish((sample, OneSegment(*segment)) for sample in samples for segment in new)
            exact |= set(new)
        return graph_of(task, measured), info


def announce(pipe: Any, task: Task, improving: int = 0) -> None:
    """Say on stderr what a task will cost, from three steps of its first sample.

    Args:
        pipe: the pipeline.
        task: what is measured.
        improving: the most forwards that improving its plans takes.
    """
    steps, samples = task.num_inference_steps, task.samples()
    prompt, seed = samples[0]
    call = {**task.call, "prompt": prompt, "num_inference_steps": 3}
    started = time.perf_counter()
    with Replayer(pipe, call, seed) as replayer:
        seconds = (time.perf_counter() - started) / 3
        held = replayer.reference.recording.bytes_held / 3 * steps
    forwards = task.forwards()
    about = "about " if task.method == "lazy" else ""
    print(
        f"{len(samples)} samples, {task.method}: {about}{forwards:,} forwards, "
        f"{forwards / steps:.0f} generations, {duration(forwards * seconds)} at {seconds:.3g} s "
        f"per step; {held / 2**30:.2f} GiB of host memory",
        file=sys.stderr,
    )
    if improving:
        print(
            f"improving the plans: at most {improving:,} forwards, {improving / steps:.0f} "
            f"generations, {duration(improving * seconds)}",
            file=sys.stderr,
        )


def duration(seconds: float) -> str:
    """Put seconds into words."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
