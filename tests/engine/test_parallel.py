"""Context parallelism: two processes over gloo against one process with the same settings."""

import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch

import vidaccel
from tiny.base import Case, generator
from tiny.hunyuan import hunyuan
from tiny.wan import wan, wan22
from vidaccel import SVG2, DBCache, accelerate, report
from vidaccel.engine.parallel import relative_change
from vidaccel.errors import AttentionError, PrecisionError, UnsupportedPipelineError
from vidaccel.hosts.registry import find_transformers

RANKS = 2
# Their tokens can be divided over the ranks: 3 frames of 2 x 2 patches for Wan.
SIZE = {"height": 32, "width": 32}
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=None)
# In the middle of the differences that the tiny models show, so that steps of both kinds occur.
MIXED = DBCache(threshold=0.0, warmup_steps=1, max_consecutive=None)


@dataclass(frozen=True)
class Scenario:
    """A way to run a pipeline on several ranks.

    Attributes:
        build: the pipeline.
        kind: "ulysses" or "ring".
        settings: of `accelerate`.
        order: what is done to the pipeline, in this order.
        close: how far latents may be off; in low precision a number that attention rounds in its
            last bit may become another code.
    """

    build: Any = wan
    kind: str = "ulysses"
    settings: dict[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ("parallel", "accelerate")
    close: float = 1e-4


SPARSE = SVG2(
    top_p=0.6, query_clusters=3, key_clusters=4, min_tokens=0, dense_steps=1, dense_layers=0
)
PLAN = {"policy": [0, 1, 4], "cache": None}
ALONE = {"policy": None, "cache": EAGER}
REVERSED = ("accelerate", "parallel")
SCENARIOS = {
    "plain": Scenario(order=("parallel",)),
    "plan": Scenario(settings=PLAN),
    "plan, other order": Scenario(settings=PLAN, order=REVERSED),
    "plan, ring": Scenario(kind="ring", settings=PLAN),
    "plan, ring, other order": Scenario(kind="ring", settings=PLAN, order=REVERSED),
    "plan, two experts": Scenario(wan22, settings={"policy": "every 2", "cache": None}),
    "plan, joint attention": Scenario(hunyuan, settings=PLAN),
    "plan and guard": Scenario(settings={"policy": [0, 1, 4], "cache": MIXED}),
    "plan and corrector": Scenario(
        settings={"policy": [0, 1, 4], "cache": DBCache(probe_blocks=0, corrector_blocks=1)}
    ),
    "cache": Scenario(settings=ALONE),
    "cache, other order": Scenario(settings=ALONE, order=REVERSED),
    "cache, mixed": Scenario(settings={"policy": None, "cache": MIXED}),
    "cache, mixed, ring": Scenario(kind="ring", settings={"policy": None, "cache": MIXED}),
    "cache, mixed, joint attention": Scenario(hunyuan, settings={"policy": None, "cache": MIXED}),
    "sparse attention": Scenario(settings={"policy": None, "cache": None, "attention": SPARSE}),
    "sparse attention and plan": Scenario(settings={**PLAN, "attention": SPARSE}, order=REVERSED),
    "low precision": Scenario(settings={**PLAN, "precision": "int8"}),
    "low precision, other order": Scenario(settings={**PLAN, "precision": "int8"}, order=REVERSED),
    "low precision, ring": Scenario(
        kind="ring", settings={**PLAN, "precision": "int8"}, close=0.02
    ),
    "low precision, joint attention": Scenario(
        hunyuan, settings={**PLAN, "precision": "int8"}, close=0.02
    ),
    "compiled first": Scenario(settings=ALONE, order=("compile", "parallel", "accelerate")),
    "compiled last": Scenario(settings=ALONE, order=("accelerate", "parallel", "compile")),
    "offloaded first": Scenario(settings=ALONE, order=("offload", "accelerate", "parallel")),
    "offloaded last": Scenario(settings=ALONE, order=("accelerate", "parallel", "offload")),
    "adapted first": Scenario(settings=ALONE, order=("lora", "accelerate", "parallel")),
    "adapted last": Scenario(settings=ALONE, order=("parallel", "accelerate", "lora")),
}


def prepare(case: Case, scenario: Scenario, threshold: float | None) -> None:
    """Do to the pipeline what `scenario` says, all of it but `parallel` on a single rank."""
    for action in scenario.order:
        if action == "accelerate":
            settings = dict(scenario.settings)
            if settings["cache"] is MIXED and threshold is not None:
                settings["cache"] = DBCache(
                    threshold=threshold, warmup_steps=1, max_consecutive=None
                )
            accelerate(case.pipe, **settings)
        elif action == "compile":
            torch._dynamo.reset()
            case.pipe.transformer.compile_repeated_blocks(fullgraph=False, backend="eager")
        elif action == "offload":
            case.pipe.enable_model_cpu_offload(device="cpu")
        elif action == "lora":
            add_lora(case.pipe.transformer)
        elif action == "parallel" and torch.distributed.is_initialized():
            for transformer, _ in find_transformers(case.pipe).values():
                parallelise(transformer, scenario.kind)


def add_lora(transformer: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(config)


def parallelise(transformer: Any, kind: str) -> None:
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    plan = None
    if type(transformer).__name__ == "HunyuanVideoTransformer3DModel":  # has none of its own
        split = ContextParallelInput(split_dim=1, expected_dims=3)
        angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
        plan = {
            "transformer_blocks.0": {"hidden_states": split, "encoder_hidden_states": split},
            "rope": {0: angles, 1: angles},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }
    degree = {f"{kind}_degree": RANKS}
    transformer.enable_parallelism(config=ContextParallelConfig(**degree), cp_plan=plan)


def outcome(case: Case, scenario: Scenario, threshold: float | None = None) -> dict[str, Any]:
    """The latents of two generations, and what the report says of the second."""
    prepare(case, scenario, threshold)
    result: dict[str, Any] = {"latents": [case.run(**SIZE), case.run(seed=1, **SIZE)]}
    if "accelerate" in scenario.order:
        parts = report(case.pipe).transformers
        result["timelines"] = [part.timeline for part in parts]
        result["differences"] = [step.difference for part in parts for step in part.steps]
        result["held"] = sum(part.bytes_held for part in parts)
        result["peaks"] = [part.peak_bytes for part in parts]
    return result


def middle(scenario: Scenario) -> float:
    """A threshold that some of the steps reach and some do not."""
    alone = DBCache(threshold=1e-12, warmup_steps=1, max_consecutive=None)
    settings = {"policy": None, "cache": alone}
    found = outcome(scenario.build(), Scenario(scenario.build, settings=settings))["differences"]
    return sorted(d for d in found if d is not None)[len(found) // 2]


def attend(ctx, query, key, value, *args, return_lse=False, _save_ctx=True, **kwargs):
    """Dense attention on [B, S, H, D] that gives its log-sum-exp, which torch's on a CPU does not,
    and ring attention needs."""
    scores = torch.einsum("bshd,bthd->bhst", query, key) * query.shape[-1] ** -0.5
    output = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value)
    return output, scores.logsumexp(-1).transpose(1, 2)


def work(rank: int, folder: str) -> None:
    """One rank: runs every scenario and saves what came out."""
    from diffusers.models import attention_dispatch

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", RANKS)
    limit = timedelta(seconds=300)
    native = attention_dispatch._native_attention_forward_op
    # Diffusers takes the rank modulo the number of accelerators, of which there are none here.
    torch.accelerator.device_count = lambda: RANKS
    references = {}
    for name, scenario in SCENARIOS.items():
        threshold = middle(scenario) if scenario.settings.get("cache") is MIXED else None
        references[name] = (threshold, outcome(scenario.build(), scenario, threshold))
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=limit
    )
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        ring = scenario.kind == "ring"
        attention_dispatch._native_attention_forward_op = attend if ring else native
        threshold, expected = references[name]
        try:
            found = outcome(scenario.build(), scenario, threshold)
        except Exception as error:  # the other rank has it too, and the rest is still of use
            found = {"error": "".join(traceback.format_exception(error))}
        results[name] = (found, expected)
    # Kinds of context parallelism in which no rank has whole sequences of video tokens.
    whole = {"policy": None, "cache": None, "attention": SPARSE}
    haar = {"policy": None, "cache": None, "precision": "int4"}
    kinds = (("ring", wan, "ring", whole), ("joint", hunyuan, "ulysses", whole))
    for name, build, kind, settings in (*kinds, ("haar", wan, "ulysses", haar)):
        try:
            results[name] = (outcome(build(), Scenario(build, kind, settings)), {})
        except (AttentionError, PrecisionError) as error:
            results[name] = ({"refused": str(error)}, {})
    # Replicas that share nothing but the default group, and decide differently.
    cache = DBCache(threshold=1e9 * rank, warmup_steps=1, max_consecutive=None)
    alone = Scenario(settings={"policy": None, "cache": cache}, order=("accelerate",))
    results["replica"] = (outcome(wan(), alone), {})
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_give_what_one_process_gives(ranks, name):
    for results in ranks:
        found, expected = results[name]
        assert "error" not in found, found["error"]
        for latents, wanted in zip(found["latents"], expected["latents"], strict=True):
            close = SCENARIOS[name].close
            torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=close)
            assert wanted.std() > 10 * close
        if "timelines" not in found:
            continue
        assert found["timelines"] == expected["timelines"]
        assert found["held"] == 0
        # Each rank holds the tokens of its own.
        assert found["peaks"] == [peak // RANKS for peak in expected["peaks"]]
        for difference, wanted in zip(found["differences"], expected["differences"], strict=True):
            assert difference == (wanted if wanted is None else pytest.approx(wanted, rel=1e-3))


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "mixed" in name])
def test_ranks_decide_as_one(ranks, name):
    first, second = (results[name][0] for results in ranks)
    assert first["timelines"] == second["timelines"]
    assert first["differences"] == second["differences"]
    assert set("".join(first["timelines"])) == {"C", "p"}  # there was something to decide


@pytest.mark.parametrize(
    ("name", "reason", "instead"),
    [
        ("ring", "ring attention", "pass attention=None"),
        ("joint", "text beside", "pass attention=None"),
        ("haar", "a rank holds a part of them", "accelerate with LowPrecision(sequence=None)"),
    ],
)
def test_what_takes_whole_sequences_is_refused_without_them(ranks, name, reason, instead):
    for results in ranks:
        assert reason in results[name][0]["refused"]
        assert instead in results[name][0]["refused"]


def test_replicas_decide_for_themselves(ranks):
    timelines = [results["replica"][0]["timelines"] for results in ranks]
    assert timelines == [["CCCCCC"], ["Cppppp"]]


def test_the_change_is_that_of_all_tokens():
    last, now = (torch.randn(2, 7, 5, generator=generator(seed)) for seed in (0, 1))
    expected = (last - now).abs().mean() / last.abs().mean()
    before = last.clone(), now.clone()
    torch.testing.assert_close(relative_change(last, now), expected)
    assert torch.equal(last, before[0]) and torch.equal(now, before[1])
    halves = relative_change(last.bfloat16(), now.bfloat16())
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, expected, rtol=2e-2, atol=0.0)
    assert relative_change(last, last) == 0
    assert torch.isnan(relative_change(torch.zeros_like(last), torch.zeros_like(last)))


def test_tensor_parallelism_is_refused():
    from diffusers import TensorParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    case = wan()
    accelerate(case.pipe, policy=[0])
    config = ParallelConfig(tensor_parallel_config=TensorParallelConfig(2))
    case.pipe.transformer._parallel_config = config
    with pytest.raises(UnsupportedPipelineError, match="use context parallelism"):
        case.run()
    vidaccel.restore(case.pipe)
    with pytest.raises(UnsupportedPipelineError, match="use context parallelism"):
        accelerate(case.pipe)
