"""SVG2: its settings, and what it does in the blocks that run."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiny import CASES, STEPS, Case, embeds, generator
from tiny.base import LAYERS
from tiny.hunyuan import hunyuan, hunyuan15
from tiny.looking import transformers_of
from tiny.others import mochi
from tiny.wan import wan, wan22, wan_v2v
from vidaccel import SVG2, DBCache, accelerate, report, restore
from vidaccel.api import engines_of
from vidaccel.errors import AttentionError
from vidaccel.hosts.registry import find_transformers
from vidaccel.kernels.semantic_attention import semantic_attention

SMALL = {
    "query_clusters": 4,
    "key_clusters": 8,
    "min_tokens": 0,
    "mass_averaging": False,
    "compensation": False,
}
ALWAYS = {"dense_steps": 0, "dense_layers": 0}
SIZE = {"height": 64, "width": 64}


def attend(case: Case, config: SVG2, policy: Any = None, cache: Any = None) -> Case:
    accelerate(case.pipe, policy=policy, cache=cache, attention=config)
    return case


def found(case: Case) -> Any:
    return report(case.pipe).transformers[0].attention


# The settings.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, r"top_p takes in \(0, 1\], found 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"top_p": "0.9"}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"refresh_top_p": 0}, "refresh_top_p"),
        ({"min_ratio": -0.1}, "min_ratio"),
        ({"query_clusters": 0}, "query_clusters takes a whole number from 1"),
        ({"key_clusters": 2.0}, "key_clusters"),
        ({"dense_steps": 1.5}, "dense_steps"),
        ({"dense_steps": -1}, "dense_steps"),
        ({"dense_layers": -0.1}, "dense_layers"),
        ({"kmeans_iters": -1}, "kmeans_iters"),
        ({"init_iters": 0}, "init_iters"),
        ({"recluster_every": 0}, "recluster_every"),
        ({"reselect_every": 1.0}, "reselect_every"),
        ({"compensation": 1}, "compensation takes True or False"),
        ({"int8_qk": "yes"}, "int8_qk takes True or False"),
        ({"min_tokens": None}, "min_tokens"),
        ({"recall_rows": -1}, "recall_rows"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(wrong, message):
    with pytest.raises(AttentionError, match=message):
        SVG2(**wrong)


def test_cluster_counts_follow_the_tokens_and_never_exceed_them():
    config = SVG2()
    assert config.clusters(75_600) == (147, 472)
    assert config.clusters(32_760) == (63, 204)
    assert config.clusters(1_000_000) == (256, 1000)
    assert config.clusters(3) == (1, 1)
    assert SVG2(query_clusters=300, key_clusters=1000).clusters(75_600) == (300, 1000)
    assert SVG2(query_clusters=300, key_clusters=1000).clusters(48) == (48, 48)
    for tokens in range(1, 300):
        query, key = config.clusters(tokens)
        assert 1 <= query <= tokens and 1 <= key <= tokens


def test_dense_shares_are_rounded_down_as_published():
    config = SVG2(dense_steps=0.2, dense_layers=0.03)
    assert [config.is_dense_step(step, 50) for step in (0, 9, 10, 49)] == [True, True, False, False]
    assert [config.is_dense_layer(0, layers) for layers in (30, 40, 60)] == [False, True, True]
    assert not config.is_dense_layer(1, 40)
    assert SVG2(dense_steps=0.29).is_dense_step(28, 100)
    assert SVG2(dense_steps=3).is_dense_step(2, 50) and not SVG2(dense_steps=3).is_dense_step(3, 50)
    assert SVG2(dense_steps=1.0).is_dense_step(49, 50) and not SVG2(dense_steps=1).is_dense_step(
        1, 50
    )


def test_faithful_settings_are_the_published_ones():
    wan14 = SVG2.faithful("Wan2.1-T2V-14B-720P")
    assert (wan14.query_clusters, wan14.key_clusters, wan14.top_p) == (300, 1000, 0.9)
    assert (wan14.min_ratio, wan14.init_iters, wan14.kmeans_iters) == (0.10, 50, 2)
    assert [wan14.is_dense_step(s, 50) for s in (9, 10)] == [True, False]
    assert not wan14.cluster_while_dense
    hunyuan480 = SVG2.faithful("hunyuanvideo-t2v-480p")
    assert (hunyuan480.query_clusters, hunyuan480.dense_layers) == (200, 0.0)
    assert hunyuan480.cluster_while_dense
    for name in SVG2.published():
        config = SVG2.faithful(name)
        assert not (config.mass_averaging or config.compensation or config.query_metric)
        assert not config.int8_qk and not SVG2().int8_qk
        assert config.recluster_every == config.reselect_every == 1
        assert config.refresh_top_p is None
    with pytest.raises(AttentionError, match="known are wan2"):
        SVG2.faithful("sora")


def test_a_setting_shows_what_differs():
    assert str(SVG2(top_p=0.8, dense_steps=3)) == "SVG2(top_p=0.8, dense_steps=3)"


# Invariant 1: at top_p 1 it is dense attention.


def test_top_p_of_one_is_as_exact_as_dense_attention(case: Case):
    """Every call is held against float64, and may err twice as much as torch's own attention."""
    size = {"height": 32, "width": 32}
    baseline = case.run(**size)
    attend(case, SVG2(top_p=1.0, **SMALL, **ALWAYS))
    errors: list[tuple[float, float]] = []

    def checked(q, k, v, state, config, *, video, text_mask):
        out = semantic_attention(q, k, v, state, config, video=video, text_mask=text_mask)
        seen = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
        if text_mask is not None:
            seen[:, : video[0]] = text_mask[:, : video[0]]
            seen[:, video[1] :] = text_mask[:, video[0] :]
        attention = torch.nn.functional.scaled_dot_product_attention
        mask = seen[:, None, None, :]
        exact = attention(q.double(), k.double(), v.double(), attn_mask=mask)
        plain = attention(q, k, v, attn_mask=mask)
        rows = seen[:, None, :, None]
        errors.append(
            tuple(float(((x - exact) * rows).abs().max()) for x in (out, plain))  # type: ignore[arg-type]
        )
        return out

    for engine in engines_of(case.pipe).values():
        engine.attention.method = checked
    out = case.run(**size)
    assert errors
    assert max(ours for ours, _ in errors) <= 2 * max(plain for _, plain in errors)
    torch.testing.assert_close(out, baseline, rtol=1e-3, atol=1e-3)
    assert not torch.equal(out, baseline) or len(errors) == 0


def test_every_family_is_dense_at_top_p_one_or_says_why_not(family: Case):
    """Families beyond those of the other tests, with the settings that are on by default."""
    baseline = family.run()
    config = SVG2(top_p=1.0, query_clusters=2, key_clusters=3, min_tokens=0, **ALWAYS)
    rows = [row for _, row in find_transformers(family.pipe).values()]
    if any(row.attention is None for row in rows):
        with pytest.raises(AttentionError, match=re.escape(rows[0].attention_note)):
            attend(family, config)
        return
    attend(family, config)
    torch.testing.assert_close(family.run(), baseline, rtol=1e-3, atol=1e-3)
    for part in report(family.pipe).transformers:
        assert part.attention.sparse_calls and not part.attention.dense_calls


def test_sparse_attention_changes_the_result_a_little(case: Case):
    baseline = case.run(**SIZE)
    attend(case, SVG2(top_p=0.5, **SMALL, **ALWAYS))
    error = (case.run(**SIZE) - baseline).abs().max()
    assert 0 < error < 0.5 * baseline.abs().max()
    for part in report(case.pipe).transformers:
        assert 0 < part.attention.density < 1
        assert not part.attention.dense_calls
    restore(case.pipe)
    assert torch.equal(case.run(**SIZE), baseline)


@pytest.mark.parametrize(
    "option",
    [
        {"mass_averaging": True},
        {"compensation": True},
        {"query_metric": True},
        {"mass_averaging": True, "compensation": True, "query_metric": True},
        {"int8_qk": True},
        {"int8_qk": True, "mass_averaging": True, "compensation": True},
        {"recluster_every": 2},
        {"recluster_every": 4, "reselect_every": 2},
        {"kmeans_iters": 0},
        {"cluster_while_dense": True, "dense_steps": 2},
    ],
    ids=str,
)
def test_every_option_does_something_and_nothing_random(option):
    config = {**SMALL, **ALWAYS, "top_p": 0.5}
    plain = attend(wan(), SVG2(**config)).run(**SIZE)
    first = attend(wan(), SVG2(**{**config, **option})).run(**SIZE)
    assert not torch.equal(plain, first)
    assert torch.equal(first, attend(wan(), SVG2(**{**config, **option})).run(**SIZE))


def test_int8_scores_change_the_result_far_less_than_sparsity_and_are_named():
    dense = wan().run(**SIZE)
    config = {**SMALL, **ALWAYS, "top_p": 0.5}
    plain = attend(wan(), SVG2(**config)).run(**SIZE)
    case = attend(wan(), SVG2(**config, int8_qk=True))
    seen = []

    def look(q, k, v, state, config, **text):
        seen.append(config.int8_qk)
        return semantic_attention(q, k, v, state, config, **text)

    engines_of(case.pipe)["transformer"].attention.method = look
    rounded = case.run(**SIZE)
    assert seen and all(seen)
    assert 0 < (rounded - plain).norm() < 0.2 * (plain - dense).norm()
    assert "int8_qk=True" in found(case).settings and "int8_qk=True" in str(report(case.pipe))


@pytest.mark.parametrize(
    "reuse",
    [
        {"policy": [0, 1, 4]},
        {"cache": DBCache(threshold=10.0, probe_blocks=1, warmup_steps=2)},
    ],
    ids=["plan", "cache"],
)
def test_int8_scores_go_with_plans_caches_and_padding(reuse):
    config = SVG2(top_p=0.5, int8_qk=True, **SMALL, **ALWAYS)
    outs = []
    for _ in range(2):
        case = attend(masked(hunyuan), config, **reuse)
        outs.append(case.run(**SIZE))
        part = report(case.pipe).transformers[0]
        assert set(part.timeline) > {"C"}
        assert part.attention.sparse_calls == sum(branch.blocks_run for branch in part.branches)
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_int8_scores_in_compiled_blocks_are_those_in_eager_ones():
    config = SVG2(top_p=0.5, int8_qk=True, **SMALL, **ALWAYS)
    eager, case = attend(wan(), config), attend(wan(), config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(case.run(**SIZE), eager.run(**SIZE), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# Which calls are sparse.


def test_first_steps_and_layers_stay_dense():
    case = attend(wan(), SVG2(dense_steps=2, dense_layers=1, **SMALL))
    case.run(**SIZE)
    shown = found(case)
    assert shown.dense_calls == {"first layers": STEPS * 2, "first steps": 2 * (LAYERS - 1) * 2}
    assert shown.sparse_calls == (STEPS - 2) * (LAYERS - 1) * 2
    assert list(shown.layers) == [1, 2]
    dense = sum(shown.dense_calls.values())
    expected = (shown.density * shown.sparse_calls + dense) / (shown.sparse_calls + dense)
    assert shown.density_with_dense == pytest.approx(expected)
    assert f"density {shown.density:.1%}" in str(report(case.pipe))


def test_dense_steps_keep_their_place_when_others_are_skipped():
    case = attend(wan(), SVG2(dense_steps=2, dense_layers=0, **SMALL), policy=[0, 3])
    case.run(**SIZE)
    assert found(case).dense_calls == {"first steps": LAYERS * 2}
    assert found(case).sparse_calls == LAYERS * 2


def test_the_second_expert_goes_on_where_the_first_ends():
    case = attend(wan22(), SVG2(dense_steps=2, dense_layers=0, **SMALL))
    case.run(**SIZE)
    high, low = (part.attention for part in report(case.pipe).transformers)
    assert high.dense_calls == {"first steps": 2 * LAYERS * 2}
    assert low.dense_calls == {} and low.sparse_calls == 3 * LAYERS * 2


def test_control_hints_have_depths_of_their_own():
    case = attend(CASES["wan_vace"](), SVG2(dense_steps=0, dense_layers=1, **SMALL))
    case.run(**SIZE)
    # Two hint blocks run before the three main ones: the first of each is dense.
    assert list(found(case).layers) == [1, 3, 4]


def test_short_sequences_stay_dense_and_say_so():
    case = wan()
    baseline = case.run()
    attend(case, SVG2())
    assert torch.equal(case.run(), baseline)
    assert found(case).dense_calls == {"short sequence": STEPS * LAYERS * 2}
    assert "all dense (36 short sequence)" in str(report(case.pipe))


def test_a_model_whose_attention_cannot_be_sparse_is_refused(monkeypatch):
    import dataclasses

    from vidaccel.hosts.registry import HOSTS

    row = dataclasses.replace(
        HOSTS["WanTransformer3DModel"], attention=None, attention_note="it is linear"
    )
    monkeypatch.setitem(HOSTS, "WanTransformer3DModel", row)
    case = wan()
    with pytest.raises(AttentionError, match="cannot be made sparse: it is linear"):
        attend(case, SVG2())
    accelerate(case.pipe, attention=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    attend(case, "auto")
    assert "attention: dense, since it is linear" in str(report(case.pipe))


def test_a_mask_that_says_more_is_dense_and_said():
    """SkyReels-V2 with causal blocks."""
    case = CASES["skyreels"]()
    case.pipe.transformer._set_ar_attention(3)
    baseline = case.run(**SIZE)
    attend(case, SVG2(**SMALL, **ALWAYS))
    assert torch.equal(case.run(**SIZE), baseline)
    assert found(case).dense_calls == {"attention mask": STEPS * LAYERS * 2}


# Text beside the video.


def masked(build: Callable[[], Case], kept: int = 11) -> Case:
    """A case whose prompt is followed by padding."""
    case = build()
    for name, value in list(case.kwargs.items()):
        if "mask" in name:
            mask = value.clone()
            mask[:, kept:] = 0
            case.kwargs[name] = mask
    return case


@pytest.mark.parametrize("build", [hunyuan, hunyuan15, mochi])
def test_padding_reaches_nothing_but_itself(build):
    """Other keys and values of the padding leave the video as it is, to the bit."""
    case = masked(build)
    attend(case, SVG2(top_p=0.5, **SMALL, **ALWAYS))
    calls = {"padded": 0, "calls": 0}

    def disturbed(q, k, v, state, config, *, video, text_mask):
        calls["calls"] += 1
        out = semantic_attention(q, k, v, state, config, video=video, text_mask=text_mask)
        if text_mask is None:
            return out
        calls["padded"] += 1
        assert video[0] == 0
        padding = torch.zeros(q.shape[0], 1, q.shape[2], 1, dtype=torch.bool)
        padding[:, 0, video[1] :, 0] = ~text_mask
        assert padding.any()
        state.calls -= 1
        state.query = state.key = state.selection = None
        again = semantic_attention(
            q,
            torch.where(padding, 9.0, k),
            torch.where(padding, -7.0, v),
            state,
            config,
            video=video,
            text_mask=text_mask,
        )
        state.query = state.key = state.selection = None
        fresh = semantic_attention(q, k, v, state, config, video=video, text_mask=text_mask)
        state.calls -= 1
        assert torch.equal(again[:, :, : video[1]], fresh[:, :, : video[1]])
        assert torch.equal(torch.where(padding, 0, again), torch.where(padding, 0, fresh))
        return out

    engines_of(case.pipe)["transformer"].attention.method = disturbed
    case.run(**SIZE)
    # Mochi takes its padding out before it attends.
    assert calls["calls"] and calls["padded"] == (0 if build is mochi else calls["calls"])


@pytest.mark.parametrize("build", [hunyuan, hunyuan15, mochi])
def test_with_padding_top_p_of_one_is_dense_attention(build):
    case = masked(build)
    baseline = case.run(**SIZE)
    unmasked = build().run(**SIZE)
    attend(case, SVG2(top_p=1.0, **SMALL, **ALWAYS))
    torch.testing.assert_close(case.run(**SIZE), baseline, rtol=1e-3, atol=1e-3)
    assert (unmasked - baseline).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "cogvideox", "mochi"])
def test_every_query_sees_all_text(name):
    """A large value at one text token reaches every video token, however sparse it is."""
    case = CASES[name]()
    attend(case, SVG2(top_p=0.01, min_ratio=0.0, **SMALL, **ALWAYS))
    seen = []

    def marked(q, k, v, state, config, *, video, text_mask):
        text = video[1] if video[0] == 0 else 0  # the first text token
        shown = torch.zeros_like(v)
        shown[:, :, text] = 1e6
        out = semantic_attention(q, k, shown, state, config, video=video, text_mask=text_mask)
        seen.append(bool((out[:, :, video[0] : video[1]] > 0).all()))
        assert q.shape[2] > video[1] - video[0]
        return semantic_attention(q, k, v, state, config, video=video, text_mask=text_mask)

    engines_of(case.pipe)["transformer"].attention.method = marked
    case.run(**SIZE)
    assert seen and all(seen)


# Invariants 4 and 5: nothing mixes, every generation starts fresh.


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi", "ltx"])
def test_a_batch_of_two_equals_two_batches_of_one(name):
    case = CASES[name]()
    attend(case, SVG2(top_p=0.6, **SMALL, **ALWAYS))
    texts = {key: value for key, value in case.kwargs.items() if key.endswith("prompt_embeds")}
    masks = {key: value for key, value in case.kwargs.items() if key.endswith("_mask")}
    more = {key: torch.cat([value, embeds(20 + i)]) for i, (key, value) in enumerate(texts.items())}
    masks = {key: value.repeat(2, 1) for key, value in masks.items()}
    both = case.run(**SIZE, **{**more, **masks})  # one generator draws for both
    noise = {}

    def keep(module, args, kwargs):
        noise.setdefault("latents", kwargs.get("hidden_states", args[0] if args else None))

    handle = case.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    case.run(**SIZE, **{**more, **masks})
    handle.remove()
    latents = noise["latents"][:2]
    for i in range(2):
        one = case.run(
            **SIZE,
            latents=latents[i : i + 1].clone(),
            **{key: value[i : i + 1] for key, value in {**more, **masks}.items()},
        )
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [wan, wan_v2v], ids=["named branches", "nameless branches"])
def test_branches_keep_their_own_clusters(build):
    """With the same prompt in both branches guidance cancels, unless the branches mix."""
    case = attend(build(), SVG2(top_p=0.5, **SMALL, **ALWAYS))
    same = {"negative_prompt_embeds": case.kwargs["prompt_embeds"]}
    size = SIZE if build is wan else {}
    guided = case.run(**size, **same)
    unguided = case.run(**size, guidance_scale=1.0)
    torch.testing.assert_close(guided, unguided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{}, {"recluster_every": 3, "reselect_every": 3}], ids=str)
def test_every_generation_starts_fresh_also_after_an_error(option):
    config = SVG2(top_p=0.5, **SMALL, **ALWAYS, **option)
    case = attend(wan(), config)
    expected = case.run(**SIZE)
    assert torch.equal(case.run(**SIZE), expected)
    for changes in ({"height": 32, "width": 32}, {"num_inference_steps": 4}, {"num_frames": 5}):
        fresh = attend(wan(), config)
        assert torch.equal(case.run(**{**SIZE, **changes}), fresh.run(**{**SIZE, **changes}))
    left = {"calls": 5}

    def fail(module, args):
        left["calls"] -= 1
        if not left["calls"]:
            raise RuntimeError("stop")

    handle = case.pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        case.run(**SIZE)
    handle.remove()
    assert torch.equal(case.run(**SIZE), expected)


def test_a_shape_that_changes_within_a_generation_starts_other_clusters():
    pipe = attend(wan(), SVG2(top_p=0.5, **SMALL, **ALWAYS)).pipe
    pipe.scheduler.set_timesteps(4)
    sizes = [8, 8, 4, 4]
    for step, side in enumerate(sizes):
        x = torch.randn(1, 16, 3, side, side, generator=generator(3))
        with torch.no_grad(), pipe.transformer.cache_context("cond"):
            pipe.transformer(x, pipe.scheduler.timesteps[step : step + 1], embeds(1))
    assert report(pipe).transformers[0].attention.sparse_calls == len(sizes) * LAYERS


# What is kept.


def test_only_centroids_are_kept_between_steps():
    case = attend(wan(), SVG2(top_p=0.5, **SMALL, **ALWAYS))
    held = []

    def look(pipe, step, timestep, kwargs):
        held.append(report(pipe).transformers[0].attention.bytes_held)
        return kwargs

    case.run(**SIZE, callback_on_step_end=look)
    # branches x layers x heads x (query and key clusters) x width x fp32, and 8 scalars a layer at
    # most that keep the shapes of the rest
    centroids = 2 * LAYERS * 2 * (4 + 8) * 12 * 4
    assert len(set(held[:-1])) == 1
    assert centroids <= held[0] <= centroids + 2 * LAYERS * 8 * 4
    assert held[-1] == 0
    assert found(case).bytes_held == 0


# With caches.


def test_with_a_plan_only_the_computed_steps_are_executed():
    case = attend(wan(), SVG2(top_p=0.5, **SMALL, **ALWAYS), policy=[0, 1, 4])
    case.run(**SIZE)
    assert report(case.pipe).transformers[0].timeline == "CC--C-"
    assert found(case).sparse_calls == 3 * LAYERS * 2


def test_refresh_steps_take_their_own_top_p():
    """Step 1 is kept for 2 and 3, step 4 for 5; step 0 is not."""
    config = SVG2(top_p=0.3, refresh_top_p=1.0, min_ratio=0.0, **SMALL, **ALWAYS)
    case = attend(wan(), config, policy=[0, 1, 4])
    seen = []

    def look(q, k, v, state, config, **text):
        seen.append(config.top_p)
        return semantic_attention(q, k, v, state, config, **text)

    engines_of(case.pipe)["transformer"].attention.method = look
    case.run(**SIZE)
    calls = LAYERS * 2
    assert seen == [0.3] * calls + [1.0] * calls + [1.0] * calls


def test_a_selection_of_another_top_p_is_not_used_again():
    config = SVG2(
        top_p=0.3,
        refresh_top_p=1.0,
        min_ratio=0.0,
        recluster_every=6,
        reselect_every=6,
        **SMALL,
        **ALWAYS,
    )
    case = attend(wan(), config, policy=[0, 1, 4])
    densities = []

    def look(q, k, v, state, config, **text):
        out = semantic_attention(q, k, v, state, config, **text)
        densities.append(float(state.density().mean()))
        return out

    engines_of(case.pipe)["transformer"].attention.method = look
    case.run(**SIZE)
    assert max(densities[: LAYERS * 2]) < 1 and min(densities[LAYERS * 2 :]) == 1


def test_with_a_block_cache_the_blocks_that_run_are_sparse():
    cache = DBCache(threshold=10.0, probe_blocks=1, warmup_steps=2)
    case = attend(wan(), SVG2(top_p=0.5, **SMALL, **ALWAYS), cache=cache)
    case.run(**SIZE)
    part = report(case.pipe).transformers[0]
    assert part.timeline.count("p")
    assert part.attention.sparse_calls == sum(branch.blocks_run for branch in part.branches)


@pytest.mark.parametrize("policy", [[0, 1, 4], None])
def test_a_cache_on_top_of_top_p_one_is_the_cache_alone(policy):
    alone = wan()
    accelerate(alone.pipe, policy=policy, cache=None, attention=None)
    both = attend(wan(), SVG2(top_p=1.0, **SMALL, **ALWAYS), policy=policy)
    torch.testing.assert_close(both.run(**SIZE), alone.run(**SIZE), rtol=1e-3, atol=1e-4)


# Reports.


def test_recall_is_measured_when_asked_for():
    full = attend(wan(), SVG2(top_p=1.0, recall_rows=16, **SMALL, **ALWAYS))
    full.run(**SIZE)
    assert found(full).recall == pytest.approx(1.0)
    part = attend(wan(), SVG2(top_p=0.5, min_ratio=0.0, recall_rows=16, **SMALL, **ALWAYS))
    part.run(**SIZE)
    assert 0.3 < found(part).recall < 1
    assert set(found(part).layers) == set(range(LAYERS))
    assert all(0 < layer["recall"] < 1 for layer in found(part).layers.values())
    silent = attend(wan(), SVG2(top_p=0.5, **SMALL, **ALWAYS))
    silent.run(**SIZE)
    assert found(silent).recall is None


@pytest.mark.parametrize("kept", [1, 11, 16])
@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "mochi", "cogvideox"])
def test_padding_counts_neither_for_recall_nor_for_density(name, kept):
    """HunyuanVideo has a mask of keys, HunyuanVideo 1.5 one of pairs; Mochi takes padding out."""
    options = {"recall_rows": 8, **SMALL, **ALWAYS}
    case = masked(CASES[name], kept)
    attend(case, SVG2(top_p=1.0, **options)).run(**SIZE)
    assert found(case).recall == pytest.approx(1.0, abs=1e-5)
    assert found(case).density == found(case).density_with_dense == 1.0
    attend(case, SVG2(top_p=0.3, min_ratio=0.0, **options)).run(**SIZE)
    part = found(case)
    assert 0.1 < part.recall < 0.999 and 0.1 < part.density < 0.9
    assert all(0 < layer["density"] < 1 for layer in part.layers.values())


def test_text_and_padding_are_no_clusters_that_came_out_empty():
    for kept in (1, 16):
        case = masked(hunyuan, kept)
        attend(case, SVG2(top_p=0.9, **SMALL, **ALWAYS))

        def alike(q, k, v, state, config, **text):
            same = torch.ones_like(q)
            return semantic_attention(same, same, v, state, config, **text)

        engines_of(case.pipe)["transformer"].attention.method = alike
        case.run(**SIZE)
        assert found(case).empty_query_clusters == pytest.approx(3 / 4)
        assert found(case).empty_key_clusters == pytest.approx(7 / 8)


def test_time_is_split_by_phase_when_asked_for():
    config = {**SMALL, "top_p": 0.5, "dense_steps": 2, "dense_layers": 0}
    silent = attend(wan(), SVG2(**config))
    expected = silent.run(**SIZE)
    assert found(silent).seconds == {}
    case = attend(wan(), SVG2(**config, timed=True))
    assert torch.equal(case.run(**SIZE), expected)
    first = found(case)
    assert set(first.seconds) == {"dense", "clustering", "selection", "attention"}
    assert all(seconds > 0 for seconds in first.seconds.values())
    computing = sum(
        branch.seconds_computed for branch in report(case.pipe).transformers[0].branches
    )
    assert sum(first.seconds.values()) < computing
    assert f"selection {first.seconds['selection']:.2f} s" in str(report(case.pipe))
    case.run(**SIZE)
    assert all(found(case).seconds[name] > value for name, value in first.seconds.items())


def test_phases_are_told_in_order_and_a_layer_that_clusters_while_dense_has_both():
    options = {"dense_steps": 1, "dense_layers": 0, "cluster_while_dense": True, "timed": True}
    case = attend(wan(), SVG2(top_p=0.5, **SMALL, **options))
    seen: list[str] = []

    def look(q, k, v, state, config, **text):
        tell, state.on_phase_end = state.on_phase_end, seen.append
        out = semantic_attention(q, k, v, state, config, **text)
        state.on_phase_end = tell
        return out

    engines_of(case.pipe)["transformer"].attention.method = look
    case.run(**SIZE)
    calls = (STEPS - 1) * LAYERS * 2
    assert seen == ["clustering", "selection", "attention"] * calls
    assert set(found(case).seconds) == {"clustering", "dense"}  # of the first step


def test_clusters_that_came_out_empty_are_counted():
    """All tokens alike fill one cluster of each side."""
    case = attend(wan(), SVG2(top_p=0.9, **SMALL, **ALWAYS))

    def alike(q, k, v, state, config, **text):
        same = torch.ones_like(q)
        return semantic_attention(same, same, v, state, config, **text)

    engines_of(case.pipe)["transformer"].attention.method = alike
    case.run(**SIZE)
    assert found(case).empty_query_clusters == pytest.approx(3 / 4)
    assert found(case).empty_key_clusters == pytest.approx(7 / 8)


def test_reports_add_up_over_generations_and_are_plain_data():
    import json

    case = attend(wan(), SVG2(top_p=0.5, dense_steps=1, dense_layers=0, **SMALL))
    case.run(**SIZE)
    first = found(case)
    case.run(**SIZE)
    assert found(case).sparse_calls == 2 * first.sparse_calls
    assert found(case).dense_calls == {"first steps": 2 * LAYERS * 2}
    assert found(case).density == pytest.approx(first.density)
    json.dumps(report(case.pipe).to_dict())


def test_every_transformer_reports(case: Case):
    attend(case, SVG2(top_p=0.5, **SMALL, **ALWAYS))
    case.run()
    assert len(transformers_of(case.pipe)) == len(report(case.pipe).transformers)
    for part in report(case.pipe).transformers:
        assert part.attention.sparse_calls
