"""The step tracker against every way in which pipelines drive their transformer."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from vidaccel.engine.conditions import Conditions
from vidaccel.engine.step_tracker import StepTracker
from vidaccel.engine.trajectory import Trajectories
from vidaccel.errors import ScheduleError
from vidaccel.hosts.spec import HostSpec

SHAPE = (1, 16, 3, 8, 8)
TABLE = [1000.0, 940.5, 860.25, 700.0, 400.0]


def scheduler(table=TABLE, counts=True):
    steps = {"step_index": 0} if counts else {}
    return SimpleNamespace(timesteps=torch.tensor(table), num_inference_steps=len(table), **steps)


class Pipe:
    """As much of a pipeline as has a scheduler."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


class Driven:
    """The trajectories of which the schedulers are fixed."""

    def __init__(self, *schedulers, times=("t",)):
        self.pipes = [Pipe(source) for source in schedulers]
        self.trajectories = Trajectories(HostSpec("Transformer", (), times=times))
        for pipe in self.pipes:
            self.trajectories.serve(pipe)
        self.prompts = itertools.cycle((torch.ones(1), torch.zeros(1)))

    def locate(self, timestep, cache_context, shape):
        times = torch.tensor(timestep, dtype=torch.float64)
        trajectory, values = self.trajectories.find(times[None])
        prompt = next(self.prompts) if cache_context is None else torch.ones(1)
        conditions = Conditions(frozenset(), (prompt,), ())
        return trajectory.locate(values, cache_context, conditions, shape)


def drive(tracker, source, contexts, *, counts=True, table=TABLE, dtype=torch.float32, start=0):
    """One generation as a pipeline would run it; its calls as (step, branch, restarted)."""
    calls = []
    for step in range(start, len(table)):
        value = float(source.timesteps[step].to(dtype))
        for context in contexts:
            call = tracker.locate(value, context, SHAPE)
            assert call.num_inference_steps == len(table)
            calls.append((call.step, call.branch, call.restarted))
        if counts:
            source.step_index = step + 1
    return calls


@pytest.mark.parametrize("counts", [True, False], ids=["counting", "not counting"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_sequential_guidance(counts, named):
    source = scheduler(counts=counts)
    tracker = Driven(source)
    contexts = ["cond", "uncond"] if named else [None, None]
    calls = drive(tracker, source, contexts, counts=counts)
    expected = [(s, b, s == 0 and b == "cond") for s in range(5) for b in ("cond", "uncond")]
    assert calls == expected


def test_a_new_table_restarts_even_after_an_interrupt():
    source = scheduler()
    tracker = Driven(source)
    drive(tracker, source, ["cond"], table=TABLE)
    tracker.locate(1000.0, "cond", SHAPE)
    source.timesteps = torch.tensor(TABLE)  # what set_timesteps() does
    assert tracker.locate(1000.0, "cond", SHAPE).restarted


def test_a_chunk_that_runs_the_same_table_again_restarts():
    source = scheduler(counts=False)
    tracker = Driven(source)
    drive(tracker, source, ["cond"], counts=False)
    again = drive(tracker, source, ["cond"], counts=False)
    assert again[0] == (0, "cond", True)
    assert not any(restarted for _, _, restarted in again[1:])


def test_start_inside_the_schedule():
    source = scheduler()
    assert drive(Driven(source), source, [None], start=2)[0] == (2, "cond", True)


@pytest.mark.parametrize(("counts", "context"), [(True, None), (True, "cond"), (False, "cond")])
def test_neighbours_that_round_to_the_same_bfloat16_stay_apart(counts, context):
    table = [1000.0, 998.9, 997.1, 995.0, 990.0, 500.0]  # bfloat16: 1000, 1000, 996, 996, 992, 500
    source = scheduler(table, counts)
    tracker = Driven(source)
    calls = drive(tracker, source, [context], counts=counts, table=table, dtype=torch.bfloat16)
    assert [step for step, _, _ in calls] == list(range(6))
    assert [restarted for _, _, restarted in calls] == [True] + 5 * [False]


def test_a_time_that_is_rounded_before_it_is_turned_round():
    """As the modular pipeline of Z-Image does: near its beginning, the error is as large as it."""
    table = [1000.0, 998.9, 990.1, 985.3, 970.0, 500.3]  # bfloat16: 1000, 1000, 992, 984, 968, 500
    source = scheduler(table)
    tracker = Driven(source, times=("1 - t / 1000",))
    for step, entry in enumerate(source.timesteps):
        value = float((1000 - entry.to(torch.bfloat16)) / 1000)
        call = tracker.locate(value, "cond", SHAPE)
        assert (call.step, call.restarted) == (step, step == 0)
        source.step_index = step + 1


def test_a_changed_shape_is_told_once_and_goes_on():
    source = scheduler(counts=False)
    tracker = Driven(source)
    tracker.locate(1000.0, "cond", SHAPE)
    tracker.locate(1000.0, "uncond", SHAPE)
    other = (1, 16, 1, 8, 8)
    changed = tracker.locate(940.5, "cond", other)
    assert (changed.step, changed.restarted, changed.reshaped) == (1, False, True)
    for call in (tracker.locate(940.5, "uncond", other), tracker.locate(860.25, "cond", other)):
        assert not (call.restarted or call.reshaped)


def test_two_schedulers_of_two_pipelines():
    first, second = scheduler(), scheduler([900.0, 300.0], counts=False)
    tracker = Driven(first, second)
    drive(tracker, first, ["cond"])
    other = drive(tracker, second, ["cond"], table=[900.0, 300.0], counts=False)
    assert other == [(0, "cond", True), (1, "cond", False)]


@pytest.mark.parametrize(
    ("time", "told"),
    [
        ("t", lambda t, sigma: t),
        ("t / 1000", lambda t, sigma: t / 1000),
        ("1 - t / 1000", lambda t, sigma: 1 - t / 1000),
        ("sigma", lambda t, sigma: sigma),
        ("sigma / (sigma + 1)", lambda t, sigma: sigma / (sigma + 1)),
    ],
)
@pytest.mark.parametrize("among", [1, 3], ids=["the only one", "one of three"])
def test_what_pipelines_say_about_the_time(time, told, among):
    sigmas = [80.0, 24.4, 5.84, 0.965, 0.08]
    source = scheduler(counts=False)
    source.sigmas = torch.tensor([*sigmas, 0.0])
    others = ("sigma / (sigma + 1)", "t", "sigma")[: among - 1]
    tracker = Driven(source, times=(*others, time) if time not in others else others)
    for step, (t, sigma) in enumerate(zip(TABLE, sigmas, strict=True)):
        call = tracker.locate(told(t, sigma), "cond", SHAPE)
        assert (call.step, call.restarted) == (step, step == 0)


def test_conditioning_frames_with_a_later_time_than_the_others():
    tracker = Driven(scheduler(counts=False))
    calls = [tracker.locate((max(t, 790.0), min(t, 790.0)), "cond", SHAPE) for t in TABLE]
    assert [call.step for call in calls] == list(range(5))
    assert not any(call.restarted for call in calls[1:])


def test_a_timestep_of_nobody_is_an_error():
    tracker = Driven(scheduler())
    with pytest.raises(ScheduleError, match="timestep 123, which is not among the 5 timesteps"):
        tracker.locate(123.0, "cond", SHAPE)
    with pytest.raises(ScheduleError):
        Driven(SimpleNamespace(timesteps=None)).locate(1000.0, "cond", SHAPE)


def test_a_scheduler_that_was_never_set_drives_nothing():
    made = scheduler([float(t) for t in range(1000, 0, -1)], counts=False)
    made.config = SimpleNamespace(num_train_timesteps=1000)
    made.num_inference_steps = None
    assert not StepTracker(made).is_set
    del made.num_inference_steps
    assert not StepTracker(made).is_set
    made.timesteps = made.timesteps[::10]  # one of a user's own, without the attribute
    assert StepTracker(made).is_set
    del made.config
    assert StepTracker(made).is_set
