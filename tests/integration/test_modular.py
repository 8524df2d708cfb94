"""Modular pipelines: components that come and go, guiders, workflows, and what is refused."""

import warnings
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version

from tiny import STEPS, Case, embeds
from tiny.base import LAYERS
from tiny.looking import count_blocks, snapshot
from tiny.modular import (
    ModularCase,
    minimax_h3,
    minimax_h3_blocks,
    minimax_h3_call,
    minimax_h3_keyframe,
    minimax_h3_parts,
    minimax_h3_references,
    modular_case,
    references,
    wan22_modular,
    wan_modular,
)
from tiny.setups import block_offload, compiled, leaf_offload, lora
from tiny.wan import wan, wan_transformer
from vidaccel import SVG2, DBCache, accelerate, build_policy, report, restore
from vidaccel.clips.calling import parameters_of
from vidaccel.clips.compare import compare
from vidaccel.clips.generate import generate, latents_of
from vidaccel.clips.load import load_pipeline
from vidaccel.engine.engine import engine_of
from vidaccel.errors import ModelError, UnsupportedPipelineError
from vidaccel.kernels.semantic_attention import semantic_attention

PLAN = [0, 1, 4]
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=None)

newest = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="needs diffusers 0.42"
)


def timelines(pipe: Any) -> dict[str, str]:
    return {part.component: part.timeline for part in report(pipe).transformers}


def branches(pipe: Any) -> set[str]:
    return {row.branch for part in report(pipe).transformers for row in part.branches}


# Guiders.


def guiders() -> dict[str, tuple[Any, list[str]]]:
    """A guider, and the conditions of each of the six steps of a run."""
    both, alone = ["pred_cond", "pred_uncond"], ["pred_cond"]
    layer = diffusers.LayerSkipConfig([1])
    return {
        "classifier-free": (diffusers.ClassifierFreeGuidance(guidance_scale=5.0), [both] * STEPS),
        "off": (diffusers.ClassifierFreeGuidance(guidance_scale=1.0), [alone] * STEPS),
        "first half": (
            diffusers.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5),
            [both] * 3 + [alone] * 3,
        ),
        "adaptive projected": (
            diffusers.AdaptiveProjectedGuidance(
                guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5
            ),
            [both] * STEPS,
        ),
        "auto": (
            diffusers.AutoGuidance(guidance_scale=5.0, auto_guidance_config=layer),
            [both] * STEPS,
        ),
        "skip layer": (
            diffusers.SkipLayerGuidance(
                guidance_scale=5.0,
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=0.5,
                skip_layer_config=layer,
            ),
            # By its own rule, from the second step on.
            [both, *[[*both, "pred_cond_skip"]] * 2, both, both, both],
        ),
        "skip layer alone": (
            diffusers.SkipLayerGuidance(
                guidance_scale=1.0,
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0,
                skip_layer_config=layer,
            ),
            [alone, *[["pred_cond", "pred_cond_skip"]] * 5],
        ),
    }


@pytest.mark.parametrize("name", guiders())
def test_each_condition_of_a_guider_is_a_branch(name: str):
    guider, conditions = guiders()[name]
    case = wan_modular()
    case.pipe.update_components(guider=guider)
    plain = case.run()
    accelerate(case.pipe, policy=None, cache=DBCache(threshold=0, warmup_steps=0))
    assert torch.equal(case.run(), plain)
    accelerate(case.pipe, policy=PLAN, cache=None)
    reused = case.run()
    shown = report(case.pipe).transformers[0]
    steps = [[call.branch for call in shown.steps if call.step == i] for i in range(STEPS)]
    assert steps == [list(names) for names in conditions]
    assert shown.timeline == "CC--C-" and not shown.notes
    assert not torch.equal(reused, plain) and torch.equal(case.run(), reused)
    restore(case.pipe)
    assert torch.equal(case.run(), plain)


def test_a_guider_that_changes_between_generations_is_followed():
    case = wan_modular()
    accelerate(case.pipe, policy=PLAN, cache=None)
    for name in ("classifier-free", "off", "skip layer", "classifier-free"):
        guider, conditions = guiders()[name]
        case.pipe.update_components(guider=guider)
        case.run()
        shown = report(case.pipe).transformers[0]
        assert [call.branch for call in shown.steps] == [n for names in conditions for n in names]
        assert shown.timeline == "CC--C-"


def test_a_block_that_calls_the_transformer_for_reasons_of_its_own_is_told_apart():
    """What a guider has not prepared has no name, and with the prompt of another call none can
    be found: nothing is reused then, and the report says so."""
    from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser

    class Twice(WanLoopDenoiser):
        def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
            found = super().__call__(components, block_state, i=i, t=t)
            for _ in range(2):
                components.transformer(
                    hidden_states=block_state.latents,
                    timestep=t.expand(1),
                    encoder_hidden_states=block_state.prompt_embeds,
                )
            return found

    case = rebuilt(wan_modular(), Twice())
    plain = case.run()
    accelerate(case.pipe, policy=PLAN, cache=None)
    assert torch.equal(case.run(), plain)
    shown = report(case.pipe).transformers[0]
    assert shown.timeline == "CCCCCC"
    assert any("cannot be told apart" in note for note in shown.notes)


def rebuilt(case: Case, denoiser: Any) -> ModularCase:
    """The case with another denoiser in its loop."""
    blocks = case.pipe.blocks
    blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoiser"] = denoiser
    call = {"num_frames": 9}
    return modular_case("WanModularPipeline", blocks, case.pipe.components, call)


# Components.


def test_a_pipeline_without_its_denoiser_is_refused_and_accelerated_once_it_is_loaded():
    case = wan_modular()
    model = case.pipe.transformer
    case.pipe.update_components(transformer=None)
    with pytest.raises(UnsupportedPipelineError, match="no denoiser of this WanModularPipeline is"):
        accelerate(case.pipe)
    case.pipe.update_components(transformer=model)
    accelerate(case.pipe, policy=PLAN, cache=None)
    case.pipe.update_components(transformer=None)
    assert not engines_of_model(model)
    case.pipe.update_components(transformer=model)
    case.run()
    assert timelines(case.pipe) == {"transformer": "CC--C-"}


def engines_of_model(model: Any) -> list[Any]:
    return [value for name, value in vars(model).items() if "vidaccel" in name]


def test_another_transformer_is_accelerated_in_the_place_of_the_first():
    case = wan_modular()
    first, second = case.pipe.transformer, wan_transformer(seed=1)
    before = snapshot(first)
    attributes = set(vars(case.pipe))
    accelerate(case.pipe, policy=PLAN, cache=None)
    mine = case.run()
    case.pipe.update_components(transformer=second)
    assert snapshot(first) == before
    other = case.run()
    assert timelines(case.pipe) == {"transformer": "CC--C-"}
    case.pipe.update_components(transformer=first)
    assert torch.equal(case.run(), mine) and not torch.equal(mine, other)
    restore(case.pipe)
    assert snapshot(first) == before and set(vars(case.pipe)) == attributes


def test_another_scheduler_is_followed():
    case = wan_modular()
    accelerate(case.pipe, policy=PLAN, cache=None)
    case.run()
    case.pipe.update_components(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    reused = case.run()
    assert timelines(case.pipe) == {"transformer": "CC--C-"}
    restore(case.pipe)
    assert not torch.equal(case.run(), reused)


def test_what_cannot_be_accelerated_does_not_take_its_place():
    case = wan_modular()
    accelerate(case.pipe, policy=PLAN, cache=None)
    expected = case.run()
    with pytest.raises(UnsupportedPipelineError, match=r"transformer \(Linear\)"):
        case.pipe.update_components(transformer=torch.nn.Linear(2, 2))
    assert torch.equal(case.run(), expected)


def test_two_denoisers_of_which_one_has_no_row_are_refused_by_name():
    case = wan22_modular()
    case.pipe.update_components(transformer_2=torch.nn.Linear(2, 2))
    message = (
        r"a denoiser that vidaccel does not support beside transformer: transformer_2 \(Linear"
    )
    with pytest.raises(UnsupportedPipelineError, match=message):
        accelerate(case.pipe)
    assert not engines_of_model(case.pipe.transformer)


def test_pipelines_that_share_a_transformer_take_turns():
    one, other = wan_modular(), wan_modular()
    other.pipe.update_components(transformer=one.pipe.transformer)
    plain = [case.run() for case in (one, other)]
    accelerate(one.pipe, policy=PLAN, cache=None)
    accelerate(other.pipe, policy=PLAN, cache=None)
    first, second = one.run(), other.run()
    assert torch.equal(first, one.run()) and torch.equal(second, other.run())
    assert timelines(one.pipe) == {"transformer": "CC--C-"}
    # It stays accelerated for the one that still has it.
    other.pipe.update_components(transformer=wan_transformer(seed=1))
    assert torch.equal(first, one.run())
    restore(one.pipe)
    restore(other.pipe)
    assert torch.equal(one.run(), plain[0])


def test_a_transformer_that_is_assigned_is_noticed():
    """Past `update_components`, which is followed."""
    case, plain = wan_modular(), wan_modular()
    accelerate(case.pipe, policy=PLAN, cache=None)
    blocks = case.pipe.blocks  # a copy, as those are that another pipeline is made of
    case.pipe.transformer = plain.pipe.transformer
    with pytest.warns(UserWarning, match="transformer of this WanModularPipeline is another"):
        assert torch.equal(case.run(), plain.run())
    again = modular_case("WanModularPipeline", blocks, plain.pipe.components, plain.kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(again.run(), plain.run())


def test_an_interrupted_run_frees_what_is_held():
    case = wan_modular()
    accelerate(case.pipe, policy=PLAN, cache=None)
    expected = case.run()
    step, calls = case.pipe.scheduler.step, []

    def third(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    case.pipe.scheduler.step = third
    with pytest.raises(KeyboardInterrupt):
        case.run()
    assert report(case.pipe).transformers[0].bytes_held == 0
    del vars(case.pipe.scheduler)["step"]
    assert torch.equal(case.run(), expected)


# With what else is done to a pipeline.


@pytest.mark.parametrize("setup", [block_offload, leaf_offload, lora, compiled])
@pytest.mark.parametrize("build", [wan_modular, pytest.param(minimax_h3, marks=newest)])
def test_accelerate_may_stand_before_and_after(build: Any, setup: Any):
    outputs = []
    for order in (0, 1):
        case: Case = build()
        if order:
            setup(case.pipe)
        accelerate(case.pipe, policy=PLAN, cache=None)
        if not order:
            setup(case.pipe)
        outputs.append(case.run())
        assert timelines(case.pipe) == {"transformer": "CC--C-"}
    torch.testing.assert_close(*outputs)


# From a prompt to a clip, and to a policy.


def prompted() -> ModularCase:
    """With a block that takes embeddings from a table for a text encoder, and with a decoder."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

    tensor = {"type_hint": torch.Tensor, "kwargs_type": "denoiser_input_fields"}

    class Table(ModularPipelineBlocks):
        model_name = "wan"
        description = "embeddings of prompts, by their length"
        inputs = (InputParam("prompt", required=True),)
        intermediate_outputs = (
            OutputParam("prompt_embeds", **tensor),
            OutputParam("negative_prompt_embeds", **tensor),
        )

        def __call__(self, components: Any, state: Any) -> Any:
            block_state = self.get_block_state(state)
            block_state.prompt_embeds = embeds(len(block_state.prompt))
            block_state.negative_prompt_embeds = embeds(99)
            self.set_block_state(state, block_state)
            return components, state

    blocks = getattr(diffusers, diffusers.WanModularPipeline.default_blocks_name)()
    blocks.sub_blocks["text_encoder"] = Table()
    case = modular_case("WanModularPipeline", blocks, wan().pipe.components, {"num_frames": 9})
    case.kwargs = {name: case.kwargs[name] for name in ("height", "width", "num_frames")}
    return case


def test_its_call_is_known_by_the_inputs_of_its_blocks():
    known = parameters_of(prompted().pipe)
    assert {"prompt", "num_inference_steps", "height"} <= known.keys()


def test_a_clip_and_its_comparison():
    case = prompted()
    call = case.kwargs | {"prompt": "ab", "num_inference_steps": STEPS}
    seen: list[int] = []
    plain = generate(case.pipe, call, progress=False, on_step=lambda step, _: seen.append(step))
    assert plain.frames.shape == (9, 16, 16, 3) and seen == list(range(STEPS))
    accelerate(case.pipe, policy=PLAN, cache=None)
    fast = generate(case.pipe, call, progress=False)
    assert fast.report["transformers"][0]["timeline"] == "CC--C-"
    assert latents_of(case.pipe, call).shape == (1, 16, 3, 2, 2)
    restore(case.pipe)
    found = compare(case.pipe, call, policy=PLAN)
    assert found is not None


def test_a_policy_is_built_for_it():
    case = prompted()
    policy = build_policy(
        case.pipe,
        ["a", "bb"],
        num_inference_steps=5,
        max_skip=3,
        call_kwargs=case.kwargs,
        validate=False,
        progress=False,
    )
    accelerate(case.pipe, policy=policy, cache=None)
    case.run(prompt="a", num_inference_steps=5)
    assert "-" in timelines(case.pipe)["transformer"]


def test_blocks_that_decode_nothing_are_told():
    with pytest.raises(ModelError, match="make none of frames, videos, video, images, image, but"):
        generate(wan_modular().pipe, wan_modular().kwargs, progress=False)


def test_a_folder_that_holds_a_modular_pipeline_is_loaded(tmp_path):
    case = wan_modular()
    case.pipe.save_pretrained(str(tmp_path / "model"))
    loaded = load_pipeline(str(tmp_path / "model"), device="cpu")
    assert type(loaded).__name__ == "WanModularPipeline"
    assert loaded.transformer is not None and loaded.scheduler is not None


# MiniMax-H3.


@newest
def test_references_pick_the_other_transformer_when_it_is_called():
    parts = minimax_h3_parts()
    case = modular_case(
        "MiniMaxH3ModularPipeline",
        minimax_h3_blocks(),
        {name: part for name, part in parts.items() if name != "transformer_ref"},
        minimax_h3_call(),
        outputs=("latents", "audio_latents"),
    )
    case.pipe.update_components(reference_image_short_edge=32)
    counts = count_blocks(case.pipe)
    accelerate(case.pipe, policy=PLAN, cache=None)
    text = case.run()
    assert timelines(case.pipe) == {"transformer": "CC--C-"}
    assert counts["blocks"] == 3 * LAYERS
    # Loaded later, and accelerated as the pipeline is.
    case.pipe.update_components(transformer_ref=parts["transformer_ref"])
    referred = case.run(**references())
    assert timelines(case.pipe) == {"transformer": "", "transformer_ref": "CC--C-"}
    assert torch.equal(case.run(), text) and not torch.equal(text, referred)
    ran = {part.component: part.generations for part in report(case.pipe).transformers}
    assert ran == {"transformer": 1, "transformer_ref": 1}


@newest
def test_sound_and_video_are_both_in_the_residual():
    """A reused step moves both, and each block runs in the computed steps alone."""
    case = minimax_h3()
    accelerate(case.pipe, policy=PLAN, cache=None)
    counts = count_blocks(case.pipe)
    found = case.pipe(**case.kwargs, output=["latents", "audio_latents"])
    assert counts["blocks"] == 3 * LAYERS
    plain = [torch.isfinite(found[name]).all() for name in ("latents", "audio_latents")]
    assert all(plain)


@newest
@pytest.mark.parametrize("build", [minimax_h3, minimax_h3_keyframe])
def test_sparse_attention_takes_the_generated_rows_alone_for_the_video(build: Any):
    case = build()
    few = {"query_clusters": 4, "key_clusters": 6, "min_tokens": 0}
    exact = SVG2(top_p=1.0, dense_steps=0, dense_layers=0, **few)
    plain = case.run()
    accelerate(case.pipe, policy=None, cache=None, attention=exact)
    seen = []
    from vidaccel.svg2 import runner

    genuine = runner.tokens_of

    def look(*args: Any) -> Any:
        seen.append(genuine(*args))
        return seen[-1]

    runner.tokens_of, kept = look, runner.tokens_of
    try:
        torch.testing.assert_close(case.run(), plain, rtol=1e-3, atol=1e-3)
    finally:
        runner.tokens_of = kept
    # 37 latent frames of one row each, after text, keyframe and sound.
    assert {(found.start, found.stop) for found in seen} == {(seen[0].total - 37, seen[0].total)}
    attention = report(case.pipe).transformers[0].attention
    assert attention.sparse_calls == LAYERS * STEPS and not attention.dense_calls


@newest
@pytest.mark.parametrize("build", [minimax_h3, minimax_h3_keyframe, minimax_h3_references])
def test_sparse_attention_leaves_out_nothing_but_video(build: Any):
    """Each row of text, keyframe, reference or sound reaches every row, and sees every one."""
    case = build()
    few = {"query_clusters": 4, "key_clusters": 6, "min_tokens": 0}
    sparse = SVG2(top_p=0.05, dense_steps=0, dense_layers=0, min_ratio=0.0, **few)
    plain = case.run()
    accelerate(case.pipe, policy=None, cache=None, attention=sparse)
    engine = engine_of(getattr(case.pipe, case.component))
    rows = set()

    def marked(q: Any, k: Any, v: Any, state: Any, config: Any, **places: Any) -> Any:
        others = range(places["video"][0])
        for row in () if rows else others:  # once, since it is one call for each
            shown = torch.zeros_like(v)
            shown[:, :, row] = 1e6
            assert (semantic_attention(q, k, shown, state, config, **places) > 0).all()
        shown = torch.ones_like(v)
        shown[:, :, places["video"][0] :] = 2.0
        out = semantic_attention(q, k, shown, state, config, **places)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, shown)
        torch.testing.assert_close(out[:, :, : len(others)], dense[:, :, : len(others)])
        rows.add(len(others))
        return semantic_attention(q, k, v, state, config, **places)

    engine.attention.method = marked
    error = (case.run() - plain).abs().max()
    assert rows and min(rows) > 16  # the words, and what else there is
    assert 0 < error < 0.5 * plain.abs().max()
    attention = next(p for p in report(case.pipe).transformers if p.generations).attention
    assert attention is not None and 0 < attention.density < 1 and not attention.dense_calls


@newest
@pytest.mark.parametrize("method", ["exact", "gain"])
def test_a_policy_for_a_schedule_that_counts_its_end_is_of_one_step_less(method, caplog):
    case = minimax_h3()
    plain = case.run()
    call = {name: value for name, value in case.kwargs.items() if name != "num_inference_steps"}
    policy = build_policy(
        case.pipe,
        ["a"],
        num_inference_steps=STEPS + 1,
        max_skip=3,
        method=method,
        call_kwargs=call,
        validate=False,
        progress=False,
    )
    assert policy.num_inference_steps == STEPS and not caplog.records
    accelerate(case.pipe, policy=policy, cache=None)
    fast = case.run()
    assert "-" in timelines(case.pipe)["transformer"]
    assert 0 < (fast - plain).abs().max() < 0.5 * plain.abs().max()
