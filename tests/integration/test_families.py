"""The invariants of acceleration on a tiny random pipeline of every supported family."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from tiny import Case
from tiny.looking import count_blocks, snapshot, transformers_of
from vidaccel import DBCache, accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.engine.state import CallContext
from vidaccel.engine.trajectory import Trajectory
from vidaccel.hosts.registry import find_transformers

PLAN = [0, 1, 4]
# Reuses whatever it may: every difference of a tiny random model is far below.
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=None)


def with_corrector(case: Case) -> DBCache:
    """The eager cache, with a corrector block where the model can have one."""
    hosts = [host for _, host in find_transformers(case.pipe).values()]
    return replace(EAGER, corrector_blocks=0 if any(host.no_corrector for host in hosts) else 1)


def test_idle_is_bit_equal_and_restore_is_exact(family: Case):
    """Invariants 1 and 2."""
    models = transformers_of(family.pipe)
    baseline = family.run()
    before = {name: snapshot(model) for name, model in models.items()}
    assert torch.isfinite(baseline).all()
    accelerate(family.pipe, policy=None)
    assert torch.equal(family.run(), baseline)
    accelerate(family.pipe, policy=None, cache=DBCache(threshold=0, warmup_steps=0))
    assert torch.equal(family.run(), baseline)
    for part in report(family.pipe).transformers:
        assert set(part.timeline) == {"C"}
        assert part.bytes_held == 0
    restore(family.pipe)
    assert {name: snapshot(model) for name, model in models.items()} == before
    assert torch.equal(family.run(), baseline)


def test_the_plan_is_what_runs_and_an_exception_leaves_no_trace(family: Case):
    """Invariants 5 and 6."""
    counts = count_blocks(family.pipe)
    baseline = family.run()
    everything, counts["blocks"] = counts["blocks"], 0
    accelerate(family.pipe, policy=PLAN, cache=None)
    expected = family.run()
    error = (expected - baseline).abs().max()
    assert 0 < error < 0.5 * baseline.abs().max()
    shown = report(family.pipe)
    rows = [row for part in shown.transformers for row in part.branches]
    assert sum(row.blocks_run for row in rows) == counts["blocks"] - family.aside < everything
    assert sum(row.blocks_without_vidaccel for row in rows) == everything - family.aside
    first = family.first
    for part in shown.transformers:
        computed = {*PLAN, first, *family.unplanned}
        steps = range(first, first + len(part.timeline))
        assert part.timeline == "".join("C" if step in computed else "-" for step in steps)
        first += 0 if family.side_by_side else len(part.timeline)

    left = iter(range(3, -1, -1))

    def fail(module: Any, args: Any, output: Any) -> None:
        if next(left) == 0:
            raise KeyboardInterrupt

    models = transformers_of(family.pipe).values()
    handles = [model.register_forward_hook(fail) for model in models]
    with pytest.raises(KeyboardInterrupt):
        family.run()
    for handle in handles:
        handle.remove()
    assert torch.equal(family.run(), expected)


def test_the_block_cache_runs_probe_and_corrector(family: Case):
    """Invariant 6, with a block cache."""
    cache = with_corrector(family)
    accelerate(family.pipe, policy=None, cache=cache)
    counts = count_blocks(family.pipe)
    family.run()
    rows = [row for part in report(family.pipe).transformers for row in part.branches]
    assert sum(row.blocks_run for row in rows) == counts["blocks"] - family.aside
    unit = max(host.unit for _, host in find_transformers(family.pipe).values())
    for part in report(family.pipe).transformers:
        assert part.bytes_held == 0
        for row in part.branches:
            whole = row.blocks_without_vidaccel // (row.steps_computed + row.steps_reused)
            partial = unit * (1 + cache.corrector_blocks)
            assert row.steps_reused > row.steps_computed or len(part.timeline) < 4
            assert row.blocks_run == row.steps_computed * whole + row.steps_reused * partial


@dataclass
class Call:
    """One call of a transformer as its pipeline made it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: str | None

    def again(self, model: Any) -> list[torch.Tensor]:
        """What the model answers to it now."""
        named = self.context is not None
        with torch.no_grad(), model.cache_context(self.context) if named else nullcontext():
            return tensors(model(*self.args, **self.kwargs))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None:
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def recorded(case: Case) -> list[Call]:
    """The calls of the case's transformer in the last generation that a run makes."""
    model, scheduler = getattr(case.pipe, case.component), case.pipe.scheduler
    calls: list[tuple[Any, Call]] = []
    names: list[str] = []

    @contextmanager
    def cache_context(name: str, **fields: Any) -> Any:
        names.append(name)
        with type(model).cache_context(model, name, **fields):
            yield
        names.pop()

    def record(module: Any, args: Any, kwargs: Any) -> None:
        context = names[-1] if names else None
        calls.append((scheduler.timesteps, Call(args, dict(kwargs), context)))

    if hasattr(model, "cache_context"):
        vars(model)["cache_context"] = cache_context
    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    case.run()
    handle.remove()
    vars(model).pop("cache_context", None)
    scheduler.timesteps = calls[-1][0]
    return [call for table, call in calls if table is scheduler.timesteps]


@pytest.mark.parametrize("decides", ["plan", "cache"])
def test_the_same_input_twice_gives_the_same_output(family: Case, decides: str):
    """Invariant 3: whatever a model adds between its blocks is in the result once."""
    model = getattr(family.pipe, family.component)
    call = recorded(family)[-1]
    plain = call.again(model)
    if decides == "plan":
        accelerate(family.pipe, policy=[0], cache=None)
    else:
        accelerate(family.pipe, policy=None, cache=with_corrector(family))
    total = len(family.pipe.scheduler.timesteps)
    steps = iter((CallContext(0, total, "cond", True), CallContext(1, total, "cond", False)))
    engine = engines_of(family.pipe)[family.component]
    tracker = SimpleNamespace(scheduler=family.pipe.scheduler, step=0, length=total)
    trajectory = Trajectory(tracker, engine.host.branch, 2)
    trajectory.locate = lambda *args: next(steps)
    engine.trajectories.find = lambda timestep: (trajectory, ())
    first, second = call.again(model), call.again(model)
    assert report(family.pipe).transformers[0].timeline in ("C-", "Cp")
    for expected, computed, reused in zip(plain, first, second, strict=True):
        assert torch.equal(computed, expected)
        torch.testing.assert_close(reused, expected, rtol=1e-4, atol=1e-5)


def test_guidance_branches_do_not_touch_each_other(family: Case):
    """Invariant 4: a branch that runs alone answers the same as among the others."""
    calls = recorded(family)
    model = getattr(family.pipe, family.component)
    accelerate(family.pipe, policy=PLAN, cache=None)
    together = [call.again(model) for call in calls]
    branches = [step.branch for step in report(family.pipe).transformers[0].steps]
    # Of the last window, where a pipeline runs the same schedule several times.
    calls, together = calls[-len(branches) :], together[-len(branches) :]
    for branch in set(branches):
        accelerate(family.pipe, policy=PLAN, cache=None)
        for call, name, expected in zip(calls, branches, together, strict=True):
            if name == branch:
                for alone, among in zip(call.again(model), expected, strict=True):
                    assert torch.equal(alone, among)
    restore(family.pipe)


def test_another_shape_and_number_of_steps_start_fresh(family: Case):
    """Invariant 5: what is kept from one call of the pipeline never meets the next."""
    accelerate(family.pipe, policy="every 2", cache=None)
    changes = family.other
    family.run()
    changed = family.run(**changes)
    restore(family.pipe)
    accelerate(family.pipe, policy="every 2", cache=None)
    assert torch.equal(family.run(**changes), changed)


def twice(case: Case) -> dict[str, Any]:
    """The arguments of a call for two prompts: the case's own, and that with its words reversed.

    Of pipelines without prompts the class after its own.
    """
    changed: dict[str, Any] = {}
    for name, value in case.kwargs.items():
        if name == case.per_prompt:
            changed[name] = [value, another(value)]
        elif name.endswith("cu_seqlens"):  # where the words of each prompt end
            changed[name] = torch.cat([value, value[-1] + value[1:]])
        elif isinstance(value, torch.Tensor) and "prompt" in name:
            changed[name] = torch.cat([value, value.flip(1) if value.ndim > 2 else value])
        elif isinstance(value, list) and "prompt" in name:
            changed[name] = [*value, *(one.flip(0) for one in value)]
        elif name == "class_labels":
            changed[name] = [*value, *(one + 1 for one in value)]
    return changed


def another(value: Any) -> Any:
    """The negative of a picture; a clip backwards; another prompt."""
    if isinstance(value, str):
        return value + value
    return value[::-1] if isinstance(value, list) else value.point(lambda level: 255 - level)


def one_of(case: Case, both: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of a call for prompt `i` of two."""
    one = {}
    for name, value in both.items():
        if name == case.per_prompt:
            one[name] = value[i]
        elif not name.endswith("cu_seqlens"):
            one[name] = value[i : i + 1]
    return one


def test_a_batch_of_two_equals_two_batches_of_one(family: Case):
    """Invariant 4."""
    if family.batch:
        pytest.skip(f"{type(family.pipe).__name__} {family.batch}")
    accelerate(family.pipe, policy=PLAN, cache=None)
    both = twice(family)
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]
    together = family.run(**both, generator=seeds)
    for i in range(2):
        alone = family.run(seed=i, **one_of(family, both, i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-4)


def another_scheduler(scheduler: Any) -> Any:
    """One of another class that serves the same model."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    if isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if isinstance(scheduler, diffusers.CogVideoXDDIMScheduler):
        return diffusers.CogVideoXDPMScheduler()
    if isinstance(scheduler, diffusers.DDIMScheduler | diffusers.DDPMScheduler):
        return diffusers.DPMSolverMultistepScheduler()
    return None


def test_another_scheduler_works_as_well(family: Case):
    other = another_scheduler(family.pipe.scheduler)
    if other is None or family.scheduler:
        reason = family.scheduler or f"works with {type(family.pipe.scheduler).__name__} only"
        pytest.skip(f"{type(family.pipe).__name__} {reason}")
    family.pipe.scheduler = other
    baseline = family.run()
    accelerate(family.pipe, policy=None)
    assert torch.equal(family.run(), baseline)
    accelerate(family.pipe, policy=PLAN, cache=None)
    error = (family.run() - baseline).abs().max()
    assert 0 < error < 0.5 * baseline.abs().max()
    timeline = "".join(part.timeline for part in report(family.pipe).transformers)
    assert "-" in timeline
