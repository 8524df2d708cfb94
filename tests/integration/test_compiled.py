"""Blocks compiled by torch: with inductor, and with outputs that lie in the memory of CUDA graphs.

There are no CUDA graphs on a CPU, so what they do to a tensor is done here by a compiler of the
tests' own: all that a compiled block computes lies in memory that the next call of the transformer
takes again.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tiny.base import STEPS, Case
from tiny.hunyuan import hunyuan
from tiny.wan import wan
from vidaccel import SVG2, DBCache, Plan, accelerate, report, restore

PLAN = {"policy": Plan((0, 1, 4), STEPS, orders=(0, 1, 1)), "cache": None}
CACHE = {
    "policy": None,
    "cache": DBCache(
        threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1, forecast_order=1
    ),
}
SPARSE = {
    "policy": Plan((0, 1, 4), STEPS),
    "cache": None,
    # Clusters and the selection of blocks are kept for the next step.
    "attention": SVG2(
        top_p=0.5,
        query_clusters=2,
        key_clusters=3,
        min_tokens=0,
        dense_steps=0,
        dense_layers=0,
        recluster_every=2,
    ),
}
SETTINGS = {"plan": PLAN, "cache": CACHE, "sparse": SPARSE}
KEPT = {"plan": "CC--C-", "cache": "CppCpp", "sparse": "CC--C-"}


class GraphMemory:
    """Compiles blocks whose tensors are gone when the transformer is called again."""

    def __init__(self) -> None:
        self._taken: list[torch.Tensor] = []

    def compile(self, transformer: Any) -> None:
        torch._dynamo.reset()
        transformer.compile_repeated_blocks(fullgraph=True, backend=self._compiled)
        transformer.register_forward_pre_hook(self._take_again)

    def _compiled(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *inputs: _Computed(graph, self._taken, inputs).run(*inputs)

    def _take_again(self, *_: Any) -> None:
        """As torch.compiler.cudagraph_mark_step_begin, called before each call of the model."""
        for tensor in self._taken:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self._taken.clear()


class _Computed(torch.fx.Interpreter):
    """Runs a graph and remembers each tensor that it has made."""

    def __init__(self, graph: Any, taken: list[torch.Tensor], inputs: tuple[Any, ...]) -> None:
        super().__init__(graph)
        self._taken = taken
        held = [*graph.parameters(), *graph.buffers(), *tree_leaves(inputs)]
        self._given = {_storage(tensor) for tensor in held if isinstance(tensor, torch.Tensor)}

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        made = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        self._taken += [tensor for tensor in made if _storage(tensor) not in self._given]
        return value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_a_compiled_block_gave_is_gone_at_the_next_call():
    case, outputs = wan(), []
    GraphMemory().compile(case.pipe.transformer)
    head = case.pipe.transformer.norm_out  # what it gets is the output of the last block
    head.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    case.run()
    *earlier, last = outputs
    assert last.isfinite().all()
    assert len(outputs) == 2 * STEPS and all(output.isnan().all() for output in earlier)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("build", [wan, hunyuan], ids=lambda build: build.__name__)
def test_nothing_that_is_kept_lies_in_the_memory_of_a_graph(build: Callable[[], Case], name: str):
    eager, graphs = build(), build()
    plain = eager.run()
    accelerate(eager.pipe, **SETTINGS[name])
    GraphMemory().compile(graphs.pipe.transformer)
    assert torch.equal(graphs.run(), plain)
    accelerate(graphs.pipe, **SETTINGS[name])
    for seed in (0, 1):
        assert torch.equal(graphs.run(seed=seed), eager.run(seed=seed))
    assert report(graphs.pipe).transformers[0].timeline == KEPT[name]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor has no C++ compiler"
)
def test_blocks_compiled_with_inductor_give_what_they_give_without_acceleration():
    """In the mode that means CUDA graphs on a GPU: accelerate first or last, one graph for all."""
    first, last = wan(), wan()
    accelerate(first.pipe, policy=None, cache=DBCache(threshold=0))
    torch._dynamo.reset()
    for case in (first, last):
        case.pipe.transformer.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    baseline = last.run()
    assert torch.equal(first.run(), baseline)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("plan", "cache"):
            accelerate(first.pipe, **SETTINGS[name])
            accelerate(last.pipe, **SETTINGS[name])
            reused = last.run()
            assert report(last.pipe).transformers[0].timeline == KEPT[name]
            assert torch.equal(first.run(), reused) and not torch.equal(reused, baseline)
        restore(last.pipe)
        assert torch.equal(last.run(), baseline)
