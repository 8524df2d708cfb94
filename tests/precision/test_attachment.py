"""A pipeline put into low precision and back: exactly, whole, or refused with one message."""

import gc
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny.base import STEPS, Case
from tiny.setups import lora
from vidaccel import LowPrecision, accelerate, report, restore
from vidaccel.errors import PrecisionError
from vidaccel.precision.linear import QuantisedLinear

Load = Callable[..., Any]


def bits(case: Case) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in case.pipe.transformer.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def quantised(case: Case) -> int:
    return sum(isinstance(m, QuantisedLinear) for m in case.pipe.transformer.modules())


@pytest.mark.parametrize("keep", ["cpu", "disk"])
def test_restore_brings_the_very_same_modules_and_bits_back(wide: Case, keep: Any):
    transformer = wide.pipe.transformer
    exact, plain = wide.run(), bits(wide)
    modules, parameters = dict(transformer.named_modules()), dict(transformer.named_parameters())
    accelerate(wide.pipe, policy=None, precision=LowPrecision(keep_weights=keep))
    assert quantised(wide) == 30
    lossy = wide.run()
    lost = (lossy - exact).norm() / exact.norm()
    assert 0 < lost < 0.03
    assert same(bits(wide), plain)  # what is saved meanwhile is the plain model
    assert torch.equal(wide.run(), lossy)
    restore(wide.pipe)
    assert dict(transformer.named_modules()) == modules
    assert dict(transformer.named_parameters()) == parameters
    assert all(parameter is parameters[n] for n, parameter in transformer.named_parameters())
    assert same(bits(wide), plain)
    assert torch.equal(wide.run(), exact)
    assert not [name for name in vars(transformer) if "vidaccel" in name]
    assert not transformer._forward_pre_hooks


def test_the_precision_of_a_second_call_takes_the_place_of_the_first(wide: Case):
    exact = wide.run()
    accelerate(wide.pipe, policy=None, precision="int8")
    eight = wide.run()
    held = wide.pipe.transformer.blocks[0].attn1.to_q
    accelerate(wide.pipe, policy="every 2", precision="int8")
    assert wide.pipe.transformer.blocks[0].attn1.to_q is held  # nothing to do
    accelerate(wide.pipe, policy=None, precision="int4")
    four = wide.run()
    assert (four - exact).norm() > (eight - exact).norm() > 0
    accelerate(wide.pipe, policy=None)
    assert quantised(wide) == 0 and torch.equal(wide.run(), exact)


def test_a_pipeline_that_moves_to_another_type_comes_back_in_it(wide: Case):
    plain = bits(wide)
    accelerate(wide.pipe, policy=None, precision=LowPrecision(keep_weights="disk"))
    wide.pipe.transformer.to(torch.bfloat16)
    assert bits(wide)["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    restore(wide.pipe)
    assert same(bits(wide), {name: x.bfloat16() for name, x in plain.items()})


def test_dropped_weights_are_gone_and_that_is_told(wide: Case):
    with pytest.warns(UserWarning, match="will not be able to bring the weights back"):
        accelerate(wide.pipe, policy=None, precision=LowPrecision(keep_weights="drop"))
    output = wide.run()
    assert "nothing is kept for restore" in str(report(wide.pipe))
    for undo in (
        lambda: restore(wide.pipe),
        lambda: accelerate(wide.pipe, precision=None),
        lambda: accelerate(wide.pipe, precision="int4"),
        lambda: wide.pipe.transformer.state_dict(),
    ):
        with pytest.raises(PrecisionError, match="load the pipeline again"):
            undo()
    # The same precision with another plan is no change of it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_one = LowPrecision(keep_weights="drop")
        accelerate(wide.pipe, policy=None, precision=same_one)
    assert torch.equal(wide.run(), output)


def test_the_report_tells_layers_bytes_and_reasons(wide: Case):
    accelerate(wide.pipe, policy=None, precision=LowPrecision(skip=("blocks.0.", "ffn.net.2.")))
    told = report(wide.pipe).transformers[0].precision
    assert told is not None
    assert told.layers == 18
    assert told.left_alone == {"skipped (blocks.0.)": 10, "skipped (ffn.net.2.)": 2}
    assert told.bytes_before == 30 * 64 * 64 * 4
    # int8 codes and a scale per output channel for 18 layers of 64 by 64.
    assert told.bytes_after == 12 * 64 * 64 * 4 + 18 * (64 * 64 + 64 * 4)
    assert told.bytes_kept == 18 * 64 * 64 * 4
    assert "18 layers, 10 not (skipped (blocks.0.))" in str(report(wide.pipe))
    assert report(wide.pipe).to_dict()["transformers"][0]["precision"]["kept_in"] == "cpu"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_leaves_everything_as_it_was(wide: Case, value: float):
    wide.pipe.transformer.blocks[2].attn2.to_v.weight.data[1, 2] = value
    modules = dict(wide.pipe.transformer.named_modules())
    for keep in ("cpu", "disk", "drop"):
        with pytest.raises(PrecisionError, match=r"blocks\.2\.attn2\.to_v has a weight that is"):
            accelerate(wide.pipe, policy=None, precision=LowPrecision(keep_weights=keep))
        assert dict(wide.pipe.transformer.named_modules()) == modules
        assert wide.pipe.transformer.blocks[0].attn1.to_q.weight.numel() == 64 * 64


def test_a_disk_that_fills_up_leaves_everything_as_it_was(
    wide: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    plain, modules = bits(wide), dict(wide.pipe.transformer.named_modules())
    stock = tempfile.TemporaryFile

    class Filling:
        def __init__(self, **options: Any) -> None:
            self.file, self.left = stock(**options), 12

        def write(self, data: bytes) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(tempfile, "TemporaryFile", Filling)
    with pytest.raises(PrecisionError, match="No space left on device"):
        accelerate(wide.pipe, policy=None, precision=LowPrecision(keep_weights="disk"))
    assert dict(wide.pipe.transformer.named_modules()) == modules
    assert same(bits(wide), plain)
    assert os.listdir(tmp_path) == []


def test_groups_that_do_not_divide_the_channels_are_refused(wide: Case):
    for group, told in ((256, "64 channels, which are no whole groups of 256"),):
        with pytest.raises(PrecisionError, match=told):
            accelerate(wide.pipe, policy=None, precision=LowPrecision(group=group))
    assert quantised(wide) == 0


def test_a_format_that_fits_no_layer_is_refused(wide: Case):
    skip = ("blocks.",)
    with pytest.raises(PrecisionError, match="no layer of WanTransformer3DModel would be in int8"):
        accelerate(wide.pipe, policy=None, precision=LowPrecision(skip=skip))


def test_a_device_that_cannot_run_the_format_is_told(wide: Case, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no int8 on this chip\nand more")

    monkeypatch.setattr("vidaccel.precision.linear.rotate_quantise", refuse)
    with pytest.raises(PrecisionError, match=r"int8 does not run on cpu .*no int8 on this chip"):
        accelerate(wide.pipe, policy=None, precision="int8")
    assert quantised(wide) == 0


def test_a_running_pipeline_keeps_its_precision(wide: Case):
    raised: list[str] = []

    def change(pipe: Any, step: int, time: Any, kwargs: Any) -> dict[str, Any]:
        for wrong in (lambda: accelerate(pipe, precision="int8"), lambda: restore(pipe)):
            try:
                wrong()
            except PrecisionError as error:
                raised.append(str(error))
        return {}

    accelerate(wide.pipe, policy=None, precision="int4")
    before = quantised(wide)
    wide.run(callback_on_step_end=change)
    assert len(raised) == 2 * STEPS and "is running" in raised[0]
    assert quantised(wide) == before


def test_adapters_are_added_and_removed_on_top(wide: Case):
    exact = wide.run()
    accelerate(wide.pipe, policy=None, precision="int8")
    low = wide.run()
    lora(wide.pipe)
    adapted = wide.run()
    assert (adapted - low).norm() > 0.01 * low.norm()
    with pytest.raises(PrecisionError, match="fuse_lora"):
        wide.pipe.fuse_lora(["transformer"])
    restore(wide.pipe)
    plain_adapted = wide.run()
    assert (adapted - plain_adapted).norm() < 0.2 * (adapted - low).norm()
    wide.pipe.transformer.delete_adapters("default")
    assert torch.equal(wide.run(), exact)


def test_adapters_that_were_there_stay_on_top(wide: Case):
    lora(wide.pipe)
    exact = wide.run()
    accelerate(wide.pipe, policy=None, precision="int8")
    assert quantised(wide) == 30
    lossy = wide.run()
    assert 0 < (lossy - exact).norm() < 0.03 * exact.norm()
    restore(wide.pipe)
    assert torch.equal(wide.run(), exact)


def test_a_pipeline_that_is_dropped_frees_its_weights_at_once(wide: Case):
    accelerate(wide.pipe, policy=None, precision="int8")
    wide.run()
    del wide.pipe.transformer._diffusers_hook  # a cycle of Diffusers' own
    held = weakref.ref(wide.pipe.transformer)
    gc.disable()
    try:
        wide.pipe = None
        assert held() is None
    finally:
        gc.enable()
