"""The call without a calibration, held against other caches in many settings at equal CPU time.

The embedded model runs with several schedulers, shifts, numbers of steps and guidance scales. What
`policy="auto"` does where nothing is known of a run is held against evenly spaced steps, shorter
runs, and caches whose settings are tuned until they take the same CPU time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from vidaccel.bench.baselines import BASELINE_METHODS, BLOCK_CACHE_SETTINGS, magnitude_ratios
from vidaccel.bench.curves import Point, Qualities, QualityResult
from vidaccel.bench.grid import GRID, Setting, scheduler_of
from vidaccel.bench.methods import baseline, block_cache, fewer_steps, generic, planned
from vidaccel.bench.quality import quality
from vidaccel.bench.records import VariantSetting, digest_of
from vidaccel.bench.tables import aligned
from vidaccel.bench.tuning import Family, Standing, at_time, qualities_of, standing, tuned
from vidaccel.bench.variants import MethodContext, Variant
from vidaccel.environment import environment
from vidaccel.errors import BenchError, UnsupportedPipelineError
from vidaccel.plans.plan import PRESETS, Plan
from vidaccel.shards import ShardFolder

AUTO, EVEN, FEWER = "auto, nothing known", "evenly spaced", "fewer sampling steps"
# Computed steps over all of the schedules that are compared: the presets "quality" and "balanced".
SPEEDUPS = (PRESETS["quality"], PRESETS["balanced"])
# Methods of other libraries; those of cache-dit share one layout of blocks.
LIBRARIES = {
    "SeaCache": "SeaCache",
    "MagCache": "MagCache",
    "TaylorSeer lite": "TaylorSeer",
    "FirstBlockCache": "FirstBlockCache",
    "cache-dit F1B0": "cache-dit",
    "cache-dit F1B0 TaylorSeer": "cache-dit",
}
# Within so many decibels of the best, two methods are level.
LEVEL = 0.5
# Captions of the embedded model for MagCache's calibration run, which others go without.
CALIBRATION_PROMPT = "a blue dotted triangle moving down on a maroon checkered background"


@dataclass(frozen=True)
class Cell:
    """One setting of the grid, measured.

    Attributes:
        setting: its name.
        plain_cpu_seconds: median CPU time of the plain pipeline.
        budgets: wanted speedup -> steps that auto computes.
        cpu_speedups: wanted speedup -> what auto realises of it.
        at_equal_time: wanted speedup -> method -> its qualities in auto's time; a method that
            takes longer is left out.
        points: all that was run on every prompt.
        failed: what another library raised.
        left_out: method -> why it was left out.
    """

    setting: str
    plain_cpu_seconds: float
    budgets: dict[str, int]
    cpu_speedups: dict[str, float]
    at_equal_time: dict[str, dict[str, Qualities]]
    points: list[Point] = field(repr=False)
    failed: dict[str, str]
    left_out: dict[str, str]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Cell":
        """Read a cell from the JSON of its shard; raises KeyError or TypeError for another one."""
        parts = {each.name: data[each.name] for each in fields(cls)}
        parts["points"] = [Point(**point) for point in parts["points"]]
        parts["at_equal_time"] = {
            speedup: {method: Qualities(**q) for method, q in of_speedup.items()}
            for speedup, of_speedup in parts["at_equal_time"].items()
        }
        return cls(**parts)

    def margin(self, speedup: str) -> float | None:
        """Return by how much auto is above the best other method, in dB; None without others."""
        found = {m: q.psnr for m, q in self.at_equal_time[speedup].items() if q.psnr is not None}
        others = [psnr for method, psnr in found.items() if method != AUTO]
        return found[AUTO] - max(others) if others and AUTO in found else None


@dataclass(frozen=True)
class DefaultsResult:
    """The result of `defaults`.

    Attributes:
        settings: arguments of the run.
        cells: one per setting of the grid.
        environment: hardware and versions.
    """

    settings: dict[str, Any]
    cells: list[Cell]
    environment: dict[str, Any]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DefaultsResult":
        """Read a result from its file."""
        cells = [Cell.from_dict(cell) for cell in data["cells"]]
        return cls(data["settings"], cells, data["environment"])

    def standings(self) -> dict[str, dict[str, Standing]]:
        """Return wanted speedup -> method -> how it stands over the whole grid, best mean first."""
        found: dict[str, dict[str, Standing]] = {}
        for speedup in self.cells[0].at_equal_time:
            methods = dict.fromkeys(m for c in self.cells for m in c.at_equal_time[speedup])
            rows = {
                method: row
                for method in methods
                if (
                    row := standing(
                        [
                            c.at_equal_time[speedup][method]
                            for c in self.cells
                            if method in c.at_equal_time[speedup]
                        ]
                    )
                )
                is not None
            }
            found[speedup] = dict(sorted(rows.items(), key=lambda r: -r[1].psnr))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the result as its file keeps it."""
        standings = {
            speedup: {method: asdict(row) for method, row in rows.items()}
            for speedup, rows in self.standings().items()
        }
        return {**asdict(self), "standings": standings}


def defaults(
    pipe: Any,
    call: Mapping[str, Any],
    prompts: Sequence[str],
    grid: Sequence[Setting] = GRID,
    *,
    seed: int = 0,
    workdir: Path | None = None,
    methods: Sequence[str] | None = None,
    progress: bool = True,
) -> DefaultsResult:
    """Measure every setting of a grid.

    Args:
        pipe: a pipeline of a flow model, whose scheduler is exchanged and put back.
        call: arguments of its call but prompt, steps and guidance.
        prompts: texts for the clips; the first is the one that settings are tuned on.
        grid: the settings.
        seed: seed of the noise.
        workdir: folder that keeps what is measured; a stopped run goes on from there.
        methods: the caches to compare with; None for all.
        progress: show bars.

    Raises:
        BenchError: there is nothing to measure, or the folder belongs to another run.
    """
    if not prompts or not grid:
        raise BenchError("a grid needs a prompt and a setting")
    own = pipe.scheduler
    with TemporaryDirectory() as temporary:
        path = Path(temporary) if workdir is None else workdir
        # More prompts go on from what was run on the first.
        manifest = {"call": dict(call), "tuned on": prompts[0], "seed": seed, "methods": methods}
        folder = ShardFolder(path, manifest, "run", BenchError)
        cells = []
        try:
            for setting in grid:
                name = str(setting).replace(", ", "-").replace(" ", "")
                shard = f"{name}-of-{digest_of(repr(list(prompts)))}"
                cell = folder.read(shard, Cell.from_dict)
                if cell is None:
                    pipe.scheduler = scheduler_of(setting)
                    run = {
                        **call,
                        "num_inference_steps": setting.steps,
                        "guidance_scale": setting.guidance,
                    }
                    measure = partial(
                        quality,
                        pipe,
                        run,
                        seed=seed,
                        clock="cpu",
                        workdir=path / name,
                        progress=progress,
                    )
                    ratios = _ratios(pipe, run, folder, name, seed, methods)
                    cell = _cell(setting, prompts, measure, ratios, methods)
                    folder.write(shard, asdict(cell))
                cells.append(cell)
        finally:
            pipe.scheduler = own
    shown = {
        **call,
        "prompts": list(prompts),
        "grid": [asdict(setting) for setting in grid],
        "seed": seed,
        "clock": "cpu",
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
    }
    return DefaultsResult(shown, cells, environment())


def _ratios(
    pipe: Any,
    call: dict[str, Any],
    folder: ShardFolder,
    name: str,
    seed: int,
    methods: Sequence[str] | None,
) -> tuple[float, ...] | None:
    """Measure what MagCache needs in a setting, once; None where it is not compared or fails."""
    if methods is not None and "MagCache" not in methods:
        return None
    known = folder.read(f"ratios-{name}")
    if known is None:
        try:
            known = magnitude_ratios(pipe, [{**call, "prompt": CALIBRATION_PROMPT}], seed=seed)
        except UnsupportedPipelineError:
            known = []
        folder.write(f"ratios-{name}", known)
    return tuple(known) or None


def _cell(
    setting: Setting,
    prompts: Sequence[str],
    measure: Any,
    ratios: tuple[float, ...] | None,
    methods: Sequence[str] | None,
) -> Cell:
    """Measure one setting."""
    steps = setting.steps
    context = MethodContext(steps, ratios=ratios)
    budgets = {f"{speedup:g}": -(-steps // speedup) for speedup in SPEEDUPS}
    first = [
        make
        for budget in budgets.values()
        for make in (
            generic(AUTO, budget),
            planned(EVEN, Plan.spread(budget, steps)),
            fewer_steps(FEWER, budget),
        )
    ]
    families, left_out = _families(context, methods)

    def targets(points: Sequence[Point]) -> list[float]:
        return [point.speedup for point in points if point.method == AUTO]

    def run(variants: Sequence[Variant]) -> Sequence[Point]:
        found: QualityResult = measure(prompts[:1], variants)
        return found.points

    chosen = [*first, *tuned(families, steps, run, targets, first)]
    result: QualityResult = measure(prompts, chosen)
    own = {p.setting["budget"]: p for p in result.points if p.method == AUTO}
    at_equal_time: dict[str, dict[str, Qualities]] = {}
    for speedup, budget in budgets.items():
        found = {AUTO: qualities_of(own[budget])}
        for method in dict.fromkeys(p.method for p in result.points if p.method != AUTO):
            of_method = [p for p in result.points if p.method == method]
            if (there := at_time(of_method, own[budget].speedup)) is not None:
                found[method] = qualities_of(there)
        at_equal_time[speedup] = found
    return Cell(
        str(setting),
        result.plain.cpu_seconds,
        budgets,
        {speedup: own[budget].speedup for speedup, budget in budgets.items()},
        at_equal_time,
        result.points,
        result.failed,
        left_out,
    )


def _families(
    context: MethodContext, methods: Sequence[str] | None
) -> tuple[list[Family], dict[str, str]]:
    """The caches that are tuned, and why others are left out."""
    found, left_out = [], {}
    block_caches: tuple[VariantSetting, ...] = tuple(
        {
            "threshold": threshold,
            "probe_blocks": 1,
            "warmup_steps": warmup,
            "max_consecutive": None if run < 0 else run,
        }
        for threshold, warmup, run in BLOCK_CACHE_SETTINGS
    )
    if methods is None or "DBCache F1B0" in methods:
        found.append(Family("DBCache F1B0", block_caches, partial(block_cache, "DBCache F1B0")))
    for method, library in LIBRARIES.items():
        if methods is not None and method not in methods:
            continue
        make = partial(_of_library, method, library, context)
        settings = BASELINE_METHODS[method].settings
        if method == "TaylorSeer lite":  # the step from which it is on where none is named
            settings = tuple({"disable_cache_before_step": 3, **s} for s in settings)
        try:
            make(settings[0])
        except UnsupportedPipelineError as error:
            left_out[method] = str(error)
            continue
        found.append(Family(method, settings, make))
    return found, left_out


def _of_library(
    method: str, library: str, context: MethodContext, setting: VariantSetting
) -> Variant:
    return baseline(method, library, setting, context)


def defaults_table(result: DefaultsResult) -> str:
    """Return the standings over the grid, and where auto is behind another method."""
    lines = []
    for speedup, rows in result.standings().items():
        realised = fmean(cell.cpu_speedups[speedup] for cell in result.cells)
        lines += [
            f"1/{speedup} of the steps computed, {realised:.2f}x by the CPU clock; PSNR in dB "
            f"over {len(result.cells)} settings at equal CPU time:",
            aligned(
                [
                    ["", "mean", "worst setting", "worst prompt", "settings reached"],
                    *(
                        [
                            method,
                            f"{row.psnr:.1f}",
                            f"{row.worst_setting:.1f}",
                            f"{row.worst_prompt:.1f}",
                            str(row.settings),
                        ]
                        for method, row in rows.items()
                    ),
                ]
            ),
            "",
        ]
    for cell in result.cells:
        for speedup, found in cell.at_equal_time.items():
            margin = cell.margin(speedup)
            if margin is None:
                continue
            others = {m: q for m, q in found.items() if m != AUTO}
            best = max(others, key=lambda m: others[m].psnr or 0.0)
            place = "first" if margin > LEVEL else "level" if margin >= -LEVEL else "BEHIND"
            lines.append(
                f"{cell.setting}, {speedup}: {place}, {found[AUTO].psnr:.1f} dB; "
                f"{best} {others[best].psnr:.1f} dB"
            )
    return "\n".join(lines)
