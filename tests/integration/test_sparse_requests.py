"""Several requests at once through one transformer with sparse attention, and other blocks."""

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from tiny import STEPS, embeds, generator
from tiny.base import LAYERS
from tiny.wan import wan
from vidaccel import SVG2, DBCache, accelerate, report, restore
from vidaccel.api import engines_of

SPARSE = SVG2(
    top_p=0.4, query_clusters=3, key_clusters=5, min_tokens=0, min_ratio=0.0,
    dense_steps=0, dense_layers=0, refresh_top_p=0.8,
)  # fmt: skip
KEPT = replace(SPARSE, recluster_every=3, reselect_every=3)
WARMING = replace(SPARSE, dense_steps=2, cluster_while_dense=True)


def sharing(config: SVG2, **arguments: Any) -> list[Any]:
    """Two pipelines with one transformer and a scheduler each."""
    one = wan().pipe
    other = WanPipeline(**(one.components | {"scheduler": copy.deepcopy(one.scheduler)}))
    for pipe in (one, other):
        accelerate(pipe, attention=config, **({"policy": None, "cache": None} | arguments))
    return [one, other]


def walk(pipe: Any, seed: int, names: tuple[str, ...] = ("cond", "uncond")):
    """A request, one call of the transformer at a time; returns its latents."""
    pipe.scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator(seed))
    for t in pipe.scheduler.timesteps:
        velocity = []
        for i, name in enumerate(names):
            with torch.no_grad(), pipe.transformer.cache_context(name):
                prompt = embeds(10 * seed + i)
                velocity.append(pipe.transformer(latents, t.expand(1), prompt)[0])
            yield
        guided = velocity[0] + 3 * (velocity[0] - velocity[-1])
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


def to_its_end(request: Any) -> torch.Tensor:
    try:
        while True:
            next(request)
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("config", [SPARSE, KEPT, WARMING], ids=["plain", "kept", "warming"])
@pytest.mark.parametrize(
    "reuse", [{}, {"policy": "every 2"}, {"cache": DBCache(threshold=0.5, probe_blocks=1)}], ids=str
)
def test_two_requests_in_turns_are_each_alone(config, reuse):
    alone = [to_its_end(walk(sharing(config, **reuse)[i], i + 1)) for i in range(2)]
    pipes = sharing(config, **reuse)
    requests = [walk(pipe, i + 1) for i, pipe in enumerate(pipes)]
    found: dict[int, torch.Tensor] = {}
    turn = 0
    while len(found) < 2:
        # The second one begins later, and they swap in the middle of a step too.
        i = 0 if turn < 3 else turn % 2
        turn += 1
        try:
            next(requests[i])
        except StopIteration as end:
            found[i] = end.value
            requests[i] = iter(lambda: None, 0)
    assert all(torch.equal(found[i], alone[i]) for i in range(2))
    assert report(pipes[0]).transformers[0].attention.bytes_held == 0


@pytest.mark.parametrize("config", [SPARSE, KEPT], ids=["plain", "kept"])
def test_two_threads_are_each_alone(config):
    alone = [to_its_end(walk(sharing(config)[i], i + 1)) for i in range(2)]
    pipes = sharing(replace(config, recall_rows=4, timed=True))
    together = threading.Barrier(2)
    found: dict[int, Any] = {}

    def serve(i: int) -> None:
        try:
            request = walk(pipes[i], i + 1)
            while True:
                together.wait(60)
                next(request)
                report(pipes[i])
        except StopIteration as end:
            found[i] = end.value
        except Exception as error:
            found[i] = error
            together.abort()

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(2)), found
    part = report(pipes[0]).transformers[0].attention
    assert part.sparse_calls == 2 * STEPS * LAYERS * 2


def test_one_request_that_fails_takes_nothing_from_the_other():
    pipes = sharing(KEPT)
    alone = to_its_end(walk(sharing(KEPT)[0], 1))
    request, failing = walk(pipes[0], 1), walk(pipes[1], 2)
    for _ in range(5):
        next(request)
        next(failing)
    held = engines_of(pipes[0])["transformer"].attention.bytes_held
    handle = pipes[0].transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(failing)
    handle.remove()
    assert engines_of(pipes[0])["transformer"].attention.bytes_held == held / 2
    assert torch.equal(to_its_end(request), alone)


def test_blocks_that_come_in_the_place_of_others_are_sparse_and_given_back():
    case, other = wan(), wan()
    model = case.pipe.transformer
    blocks = nn.ModuleList([*other.pipe.transformer.blocks, copy.deepcopy(model.blocks[0])])
    old = [block.attn1.processor for block in model.blocks]
    new = [block.attn1.processor for block in blocks]
    accelerate(case.pipe, policy=None, cache=None, attention=replace(SPARSE, dense_layers=1))
    first = model.blocks[0].attn1
    model.blocks = blocks
    case.run()
    part = report(case.pipe).transformers[0].attention
    assert part.sparse_calls == STEPS * LAYERS * 2 and list(part.layers) == [1, 2, 3]
    assert first.processor is old[0]
    restore(case.pipe)
    assert [block.attn1.processor for block in model.blocks] == new
