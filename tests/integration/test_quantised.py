"""Quantised transformers: their blocks are run or not as those of any other.

They are loaded as a program loads them, from a folder or a file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers.torchao import TorchAoHfQuantizer

from tiny.base import STEPS, Case
from tiny.setups import compiled, leaf_offload, lora
from tiny.wan import wan, wan_transformer
from vidaccel import SVG2, DBCache, Plan, accelerate, report, restore

DTYPE = torch.bfloat16
INT8, FLOAT8 = "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"
PLAN = Plan((0, 1, 4), STEPS)
CACHE = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, corrector_blocks=1)
SPARSE = SVG2(
    top_p=0.9, query_clusters=2, key_clusters=3, min_tokens=0, dense_steps=0, dense_layers=0
)

Load = Callable[[Path, pytest.MonkeyPatch], Any]


def quantize(model: Any, config: str) -> None:
    """Replaces the weights of the blocks where they are."""
    from torchao.quantization import quantize_

    quantize_(model.blocks, torchao(config))


def gguf(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """One file with the matrices of the blocks in 8 bits."""
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    kind = package.GGMLQuantizationType.Q8_0
    writer = package.GGUFWriter(folder / "model.gguf", "wan")
    for name, tensor in whole().state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            writer.add_tensor(name, package.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return diffusers.WanTransformer3DModel.from_single_file(
        str(folder / "model.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=DTYPE),
        torch_dtype=DTYPE,
    )


def loaded(folder: Path, quantization_config: Any = None, **options: Any) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(
        folder, quantization_config=quantization_config, torch_dtype=DTYPE, **options
    )


def torchao(config: str) -> Any:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed, or not for this torch"
    )
    return getattr(quantization, config)()


def int8(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return loaded(folder, diffusers.TorchAoConfig(torchao(INT8)))


def float8(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return loaded(folder, diffusers.TorchAoConfig(torchao(FLOAT8)))


def bitsandbytes(folder: Path, patch: pytest.MonkeyPatch, **config: Any) -> Any:
    """Diffusers asks for a GPU before it loads these, though their layers run on a CPU too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        patch.setattr(getattr(bnb_quantizer, name), "validate_environment", lambda *_, **__: None)
    # Blocks of 64 weights: the embedder's rows are shorter.
    config["llm_int8_skip_modules"] = ["condition_embedder"]
    return loaded(folder, diffusers.BitsAndBytesConfig(**config), device_map={"": "cpu"})


def nf4(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPE}
    return bitsandbytes(folder, patch, load_in_4bit=True, **config)


def llm_int8(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    return bitsandbytes(folder, patch, load_in_8bit=True)


LOADS = (gguf, int8, float8, nf4, llm_int8)


def whole() -> Any:
    """Widths that are whole blocks of 64, which the formats ask for."""
    return wan_transformer(attention_head_dim=32, ffn_dim=64)


def case(transformer: Any) -> Case:
    case = wan()
    case.pipe.transformer = transformer
    return case


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first.float() - second.float()).abs().mean().item()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_quantised_weights_change_nothing_but_the_weights(
    load: Load, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    exact, quantised = case(loaded(folder)), case(load(folder, monkeypatch))
    outputs, baseline = exact.run(), quantised.run()
    lost = distance(baseline, outputs)
    assert lost > 0
    # Every step computed: the output of the quantised model itself.
    accelerate(quantised.pipe, policy=None, cache=DBCache(threshold=0))
    assert torch.equal(quantised.run(), baseline)
    for settings, kept in (
        ({"policy": PLAN, "cache": None}, "CC--C-"),
        ({"policy": None, "cache": CACHE}, "CppCpp"),
        ({"policy": None, "cache": None, "attention": SPARSE}, "CCCCCC"),
    ):
        accelerate(quantised.pipe, **settings)
        reused = quantised.run()
        assert report(quantised.pipe).transformers[0].timeline == kept
        accelerate(exact.pipe, **settings)
        # As far from the model in full precision as its weights are.
        away = distance(reused, exact.run())
        assert 0 < away < 2 * lost
        json.dumps(report(quantised.pipe).to_dict())
    restore(quantised.pipe)
    assert torch.equal(quantised.run(), baseline)


@pytest.mark.parametrize("setups", [(lora, compiled), (leaf_offload,)], ids=["compiled", "offload"])
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_accelerate_stands_anywhere_among_setups_of_a_quantised_transformer(
    load: Load, setups: tuple[Any, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """And compiled blocks are compiled once."""
    outputs = []
    for place in (0, len(setups)):
        made = case(load(folder, monkeypatch))
        for setup in setups[:place]:
            setup(made.pipe)
        accelerate(made.pipe, policy=None, cache=CACHE)
        for setup in setups[place:]:
            setup(made.pipe)
        outputs.append(made.run())
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs.append(made.run())
        assert report(made.pipe).transformers[0].timeline == "CppCpp"
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("config", [INT8, FLOAT8])
def test_weights_are_quantised_in_place_after_accelerate(config: str):
    from_quantised, to_quantised = case(whole().to(DTYPE)), case(whole().to(DTYPE))
    accelerate(to_quantised.pipe, policy=PLAN)
    exact = to_quantised.run()
    for made in (from_quantised, to_quantised):
        quantize(made.pipe.transformer, config)
    accelerate(from_quantised.pipe, policy=PLAN)
    outputs = to_quantised.run()
    assert torch.equal(outputs, from_quantised.run())
    assert not torch.equal(outputs, exact)


def test_a_quantised_transformer_is_saved_while_accelerated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    if not hasattr(TorchAoHfQuantizer, "get_state_dict_and_metadata"):
        pytest.skip(f"diffusers {diffusers.__version__} saves no torchao weights as safetensors")
    made = case(float8(folder, monkeypatch))
    accelerate(made.pipe, policy=PLAN)
    outputs = made.run()
    made.pipe.transformer.save_pretrained(folder / "saved")
    again = case(loaded(folder / "saved"))
    accelerate(again.pipe, policy=PLAN)
    assert torch.equal(again.run(), outputs)
