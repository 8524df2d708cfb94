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
    with tqdm(
        total=task.forwards(),
        initial=measured_before(task, folder),
        unit_scale=1 / steps,
        bar_format=_BAR,
        disable=not progress,
    ) as bar:
        info = runner.run_info()
        bar.update(2 * steps - steps // 2)
        # Samples whose generation with every step computed has run, or is not asked for any more.
        references = {0} | _whole_samples(task, folder)

        def finish(items: Iterable[tuple[int, WorkItem]]) -> None:
            """Load or measure (sample, item)s into `measured`."""
            todo = []
            for sample, item in items:
                known = folder.load(sample, item)
                if known is None:
                    todo.append((sample, item))
                else:
                    measured[sample][item] = known
                    if item not in first:  # those are where the bar began
                        bar.update(item.forwards(task))
            for sample, item, errors in runner.run(todo):
                folder.save(sample, item, errors)
                measured[sample][item] = errors
                bar.update(item.forwards(task) + steps * (sample not in references))
                references.add(sample)

        first = set(task.items())
        finish((sample, item) for sample in samples for item in task.items())
        if task.method != "lazy":
            return graph_of(task, measured), info
        exact: set[tuple[int, int]] = set()
        for _ in range(LAZY_ROUNDS):
            edges = search_edges(graph_of(task, measured), faithful=not task.lines)
            plans = solve_edges(edges, steps, budgets, objective=objective, virtual_end=task.lines)
            used = {segment for plan in plans.values() for segment in plan.segments()}
            new = sorted(used - exact)
            if not new:
                break
            finish((sample, OneSegment(*segment)) for sample in samples for segment in new)
            exact |= set(new)
        return graph_of(task, measured), info


def measured_before(task: Task, folder: WorkFolder) -> int:
    """Count the forwards of a task whose results a work folder holds.

    The plain run of a sample counts where all of its items are there: then it is not made again,
    but for that of the first one, which tells what the runs are like.
    """
    known = sum(
        item.forwards(task)
        for sample in range(len(task.samples()))
        for item in task.items()
        if folder.load(sample, item) is not None
    )
    return known + task.num_inference_steps * len(_whole_samples(task, folder) - {0})


def _whole_samples(task: Task, folder: WorkFolder) -> set[int]:
    """Return the samples of which a work folder holds everything."""
    return {
        sample
        for sample in range(len(task.samples()))
        if all(folder.load(sample, item) is not None for item in task.items())
    }


def announce(
    pipe: Any, task: Task, *, measured: int = 0, improving: int = 0, validating: int = 0
) -> None:
    """Say on stderr what a build will cost, from three steps of its first sample.

    Args:
        pipe: the pipeline.
        task: what is measured.
        measured: forwards whose results its work folder holds.
        improving: the most forwards that improving its plans takes.
        validating: the most forwards that the end-to-end runs of its plans take.
    """
    steps, samples = task.num_inference_steps, task.samples()
    prompt, seed = samples[0]
    call = {**task.call, "prompt": prompt, "num_inference_steps": task.asked_for(3)}
    started = time.perf_counter()
    with Replayer(pipe, call, seed, steps=3) as replayer:
        seconds = (time.perf_counter() - started) / 3
        held = replayer.reference.recording.bytes_held / 3 * steps

    def cost(forwards: int) -> str:
        return (
            f"{forwards:,} forwards, {forwards / steps:.0f} generations, "
            f"{duration(forwards * seconds)}"
        )

    about = "about " if task.method == "lazy" else ""
    number = "1 sample" if len(samples) == 1 else f"{len(samples)} samples"
    lines = [
        f"{number}, {task.method}: {about}{cost(task.forwards())} at {seconds:.3g} s per step; "
        f"{held / 2**30:.2f} GiB of host memory"
    ]
    if measured:
        left = max(0, task.forwards() - measured)
        lines.append(
            f"measured before, by the work folder: {measured:,} forwards; left: {cost(left)}"
        )
    if improving:
        lines.append(f"improving the plans: at most {cost(improving)}")
    if validating:
        lines.append(f"validation, end to end: at most {cost(validating)}")
    if measured or improving or validating:
        whole = max(0, task.forwards() - measured) + improving + validating
        lines.append(f"in all: {about or 'at most '}{cost(whole)}")
    print("\n".join(lines), file=sys.stderr)


def duration(seconds: float) -> str:
    """Put seconds into words."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
