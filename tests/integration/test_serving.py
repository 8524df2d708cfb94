"""A process that serves many requests: nothing carries over, nothing piles up."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny import STEPS, Case, embeds
from tiny.hunyuan import hunyuan
from tiny.wan import wan
from vidaccel import DBCache, accelerate, report
from vidaccel.api import engines_of

CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2)
ACCELERATIONS: dict[str, dict[str, Any]] = {
    "plan": {"policy": "every 3", "cache": None},
    "cache": {"policy": None, "cache": replace(CACHE, forecast_order=1)},
}


@pytest.mark.parametrize("name", ACCELERATIONS)
def test_every_request_is_answered_as_by_a_fresh_pipeline(name):
    options = ACCELERATIONS[name]
    case = wan()
    accelerate(case.pipe, **options)
    requests: list[dict[str, Any]] = [
        {},
        {"width": 32},
        {"prompt_embeds": embeds(7)},
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_frames": 5, "num_inference_steps": 9},
        {},
    ]
    for request in requests:
        fresh = wan()
        accelerate(fresh.pipe, **options)
        assert torch.equal(case.run(**request), fresh.run(**request)), request


def test_two_pipelines_on_two_threads_answer_as_one_after_the_other():
    """The threads wait for each other before every step, so their calls interleave."""

    def cases() -> list[Case]:
        made = [wan(), wan(), hunyuan()]
        for case, name in zip(made, ("plan", "cache", "cache"), strict=True):
            accelerate(case.pipe, **ACCELERATIONS[name])
        return made

    seeds = range(3)
    alone = cases()
    expected = [[case.run(seed) for _ in range(2)] for seed, case in zip(seeds, alone, strict=True)]
    together = cases()
    outputs: list[list[torch.Tensor]] = [[] for _ in together]
    barrier = threading.Barrier(len(together), timeout=60)

    def wait(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()
        return kwargs

    def serve(index: int) -> None:
        torch.set_num_threads(1)
        for _ in range(2):
            outputs[index].append(together[index].run(index, callback_on_step_end=wait))

    threads = [threading.Thread(target=serve, args=(index,)) for index in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in seeds:
        assert [
            torch.equal(a, b) for a, b in zip(outputs[index], expected[index], strict=True)
        ] == [
            True,
            True,
        ]
        shown, wanted = (report(made[index].pipe).transformers[0] for made in (together, alone))
        assert shown.timeline == wanted.timeline and shown.generations == 2


def test_an_engine_keeps_only_the_last_generations_calls():
    case = wan()
    accelerate(case.pipe, **ACCELERATIONS["plan"])
    (engine,) = engines_of(case.pipe).values()
    for _ in range(3):
        case.run()
        assert len(engine.stats.calls) == 2 * STEPS
        assert len(engine.trajectories.all()) == 1
