"""Interception of self-attention: what is caught, what is not, and that it leaves no trace."""

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from tiny import CASES, CORE, STEPS, Case, embeds, generator
from tiny.base import LAYERS
from tiny.looking import snapshot, transformers_of
from tiny.wan import wan, wan_i2v
from vidaccel import SVG2, accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.engine.state import CallContext
from vidaccel.errors import AttentionError
from vidaccel.hosts.registry import HOSTS
from vidaccel.svg2 import interception
from vidaccel.svg2.interception import Interception, under
from vidaccel.svg2.runner import SparseAttention, SparseCall

SPARSE = SVG2(
    top_p=0.5, query_clusters=2, key_clusters=3, min_tokens=0, dense_steps=0, dense_layers=0
)


def modules_of(transformer: Any) -> list[Any]:
    """The self-attention modules."""
    host = HOSTS[type(transformer).__name__]
    return [
        block.get_submodule(host.attention)
        for blocks in host.blocks
        for block in transformer._modules[blocks.name]
    ]


def test_restore_puts_the_very_processors_back(case: Case):
    case.run()  # hooks of Diffusers' own are laid at the first call
    models = list(transformers_of(case.pipe).values())
    everything = [module for model in models for module in model.modules()]
    before = [snapshot(module) for module in everything]
    processors = [dict(vars(m.processor)) for model in models for m in modules_of(model)]
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    inside = [snapshot(module) for module in everything]
    assert inside != before
    case.run()
    restore(case.pipe)
    assert [snapshot(module) for module in everything] == before
    assert [dict(vars(m.processor)) for model in models for m in modules_of(model)] == processors


def test_only_self_attention_is_intercepted(case: Case):
    models = list(transformers_of(case.pipe).values())
    inside = {id(m) for model in models for m in modules_of(model)}
    before = {
        (name, model): vars(module).get("processor")
        for model in models
        for name, module in model.named_modules()
    }
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    for (name, model), processor in before.items():
        module = model.get_submodule(name)
        assert (vars(module).get("processor") is not processor) == (id(module) in inside), name


def test_cross_attention_on_as_many_keys_as_queries_is_left_alone():
    """Shapes do not tell the two apart: here the text is as long as the video."""
    case = wan()
    shown = {"prompt_embeds": torch.randn(1, 48, 32), "negative_prompt_embeds": embeds(2)}
    shown["negative_prompt_embeds"] = torch.randn(1, 48, 32)
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    case.run(height=64, width=64, **shown)
    found = report(case.pipe).transformers[0].attention
    assert found.sparse_calls == LAYERS * STEPS * 2
    assert not found.dense_calls


def test_an_intercepted_processor_looks_like_its_own_class(case: Case):
    model = case.pipe.transformer
    stock = [type(module.processor) for module in modules_of(model)]
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    for module, cls in zip(modules_of(model), stock, strict=True):
        routed = type(module.processor)
        assert isinstance(module.processor, cls) and routed is not cls
        assert routed.__name__ == cls.__name__ and routed.__module__ == cls.__module__
        assert signature(routed.__call__) == signature(cls.__call__)
        assert routed is type(modules_of(model)[stock.index(cls)].processor)


def test_a_backend_that_is_set_meanwhile_stays_set():
    case = wan()
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    attention = case.pipe.transformer.blocks[0].attn1
    attention.set_attention_backend("_native_math")
    assert attention.processor._attention_backend == "_native_math"
    restore(case.pipe)
    assert attention.processor._attention_backend == "_native_math"


def test_dense_calls_use_the_backend_that_was_chosen(monkeypatch):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    case = wan()
    used = {"calls": 0}
    backend = next(name for name in registry._backends if name.value == "_native_math")
    genuine = registry._backends[backend]

    def counted(**kwargs):
        used["calls"] += 1
        return genuine(**kwargs)

    monkeypatch.setitem(registry._backends, backend, counted)
    for block in case.pipe.transformer.blocks:
        block.attn1.set_attention_backend("_native_math")
    dense = SVG2(min_tokens=0, dense_steps=2, dense_layers=1, query_clusters=2, key_clusters=3)
    accelerate(case.pipe, policy=None, cache=None, attention=dense)
    case.run()
    assert used["calls"] == 2 * (LAYERS * 2 + (STEPS - 2))


def test_a_processor_that_was_put_in_meanwhile_is_caught_and_kept():
    case = wan()
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    module = case.pipe.transformer.blocks[1].attn1
    mine = type(modules_of(case.pipe.transformer)[0].processor).__mro__[1]()
    module.set_processor(mine)
    case.run()
    assert report(case.pipe).transformers[0].attention.sparse_calls == LAYERS * STEPS * 2
    restore(case.pipe)
    assert module.processor is mine
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    other = type(mine)()
    module.set_processor(other)
    restore(case.pipe)
    assert module.processor is other


def test_fused_projections_before_and_after():
    before, after = wan(), wan()
    size = {"height": 64, "width": 64}
    before.pipe.transformer.fuse_qkv_projections()
    accelerate(before.pipe, policy=None, cache=None, attention=SPARSE)
    accelerate(after.pipe, policy=None, cache=None, attention=SPARSE)
    after.pipe.transformer.fuse_qkv_projections()
    assert before.pipe.transformer.blocks[0].attn1.fused_projections
    assert torch.equal(before.run(**size), after.run(**size))
    assert report(after.pipe).transformers[0].attention.sparse_calls == LAYERS * STEPS * 2


def test_what_cannot_be_caught_is_refused_and_changes_nothing():
    class Linear:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    case = wan()
    case.pipe.transformer.blocks[2].attn1.set_processor(Linear())
    before = [snapshot(module) for module in case.pipe.transformer.modules()]
    with pytest.raises(AttentionError, match=r"Linear computes its attention .* attention=None"):
        accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    assert [snapshot(module) for module in case.pipe.transformer.modules()] == before
    with pytest.raises(AttentionError, match="found str"):
        accelerate(case.pipe, attention="sparse")


def test_what_is_no_self_attention_is_refused_inside_a_block():
    attend = lambda query, *others: query  # noqa: E731
    case = wan_i2v()
    attention = case.pipe.transformer.blocks[0].attn1
    catch = Interception([attention])
    catch.install()
    x, text = torch.randn(1, 5, 24), torch.randn(1, 7, 24)
    with torch.no_grad(), under(attend), pytest.raises(AttentionError, match="no self-attention"):
        attention(x, text)
    with torch.no_grad():
        alone = attention(x)
    catch.remove()
    with torch.no_grad():
        assert torch.equal(alone, attention(x))


# Gradients.


def trained(case: Case, block: Any) -> list[torch.Tensor]:
    """The result of a self-attention, and its gradients by input and by a weight."""
    x = torch.randn(1, 48, 24, generator=generator(0), requires_grad=True)
    out = block(x)
    weight = case.pipe.transformer.blocks[1].attn1.to_q.weight
    return [out, *torch.autograd.grad(out.square().sum(), [x, weight])]


def test_with_gradients_attention_is_dense_and_they_are_those_of_the_model():
    case = wan()
    block = case.pipe.transformer.blocks[1].attn1
    baseline = trained(case, block)
    config = replace(SPARSE, cluster_while_dense=True, dense_steps=1)
    for steps in (SPARSE, config):
        sparse = SparseAttention(case.pipe.transformer, HOSTS["WanTransformer3DModel"], steps)
        sparse.attach()
        call = SparseCall(sparse, {}, CallContext(0, 6, "cond", True), steps, "")
        with call.block(1, None, (), {}):
            torch.testing.assert_close(trained(case, block), baseline, rtol=0, atol=0)
            with torch.no_grad():
                sample = block(torch.randn(1, 48, 24))
        call.end()
        assert not sample.requires_grad
        assert sparse.report().dense_calls["gradients"] == 1
        assert sparse.report().sparse_calls == (1 if steps is SPARSE else 0)
        sparse.detach()


def test_nothing_is_refused_of_a_block_that_is_nobodys_layer(monkeypatch):
    """Such as a causal one, or one with arguments that only its backend knows."""
    q, k, v = (torch.randn(1, 12, 2, 8, generator=generator(i)) for i in range(3))
    seen = []

    def look(*args, **kwargs):
        seen.append(args[8])
        return dispatch_attention_fn(*args[:8], **kwargs)

    monkeypatch.setattr(interception, "dispatch_attention_fn", look)
    arguments = {"is_causal": True, "attention_kwargs": {"of": "a backend"}}
    out = interception._dispatch(q, k, v, **arguments)
    assert seen == [{"of": "a backend"}]
    assert torch.equal(out, dispatch_attention_fn(q, k, v, is_causal=True))
    with under(lambda *_: q):
        for name, message in (("is_causal", "causal: True"), ("attention_kwargs", "of its own")):
            with pytest.raises(AttentionError, match=message):
                interception._dispatch(q, k, v, **{name: arguments[name]})


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_compiled_blocks_have_gradients_too(name):
    """CogVideoX calls torch's attention, Wan that of Diffusers."""
    case = CASES[name]()
    model = case.pipe.transformer
    block = modules_of(model)[1]
    size = block.to_q.in_features
    x = torch.randn(1, 24, size, generator=generator(0), requires_grad=True)
    texts = [torch.randn(1, 4, size, generator=generator(1))] if name == "cogvideox" else []

    def run():
        out = block(x, *texts)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return [out, *torch.autograd.grad(out.square().sum(), [x, block.to_q.weight])]

    baseline = run()
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    torch._dynamo.reset()
    block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(), baseline)


# torch.compile.


def compiled(case: Case) -> Case:
    """The same with each of its blocks compiled, and nothing counted yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for model in transformers_of(case.pipe).values():
        host = HOSTS[type(model).__name__]
        for blocks in host.blocks:
            for block in model._modules[blocks.name]:
                block.compile(fullgraph=True, backend="eager")
    return case


@pytest.mark.parametrize("name", [name for name in CORE if name not in ("mochi", "wan_vace")])
def test_blocks_compiled_with_fullgraph_need_no_more_graphs(name):
    """Mochi reads its mask on the host, with or without this; VACE differs between its blocks."""
    plain = compiled(CASES[name]())
    baseline = plain.run()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager = CASES[name]()
    accelerate(eager.pipe, policy=None, cache=None, attention=SPARSE)
    case = CASES[name]()
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    torch.testing.assert_close(compiled(case).run(), eager.run(), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch.equal(eager.run(), baseline)
    sparse = [part.attention.sparse_calls for part in report(case.pipe).transformers]
    again = [part.attention.sparse_calls for part in report(eager.pipe).transformers]
    assert [2 * calls for calls in sparse] == again and all(sparse)


def test_repeated_blocks_stay_one_graph_over_dense_and_sparse_steps_and_skipped_ones():
    case = wan()
    config = SVG2(
        top_p=0.5, query_clusters=2, key_clusters=3, min_tokens=0, dense_steps=2, dense_layers=1
    )
    accelerate(case.pipe, policy=[0, 1, 2, 4], cache=None, attention=config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    case.run()
    case.run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    found = report(case.pipe).transformers[0].attention
    assert found.sparse_calls == 2 * 2 * (LAYERS - 1) * 2
    assert found.dense_calls == {"first layers": 2 * 2 * 4, "first steps": 2 * 2 * 2 * 2}


def test_the_compiled_operator_agrees_with_inductor():
    case, eager = wan(), wan()
    for one in (case, eager):
        accelerate(one.pipe, policy=None, cache=None, attention=SPARSE)
    torch._dynamo.reset()
    case.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(case.run(), eager.run(), rtol=1e-4, atol=1e-4)


def test_engines_are_still_found(case: Case):
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    accelerate(case.pipe, policy=None, cache=None, attention=SPARSE)
    assert engines_of(case.pipe)
    restore(case.pipe)
    assert not engines_of(case.pipe)
