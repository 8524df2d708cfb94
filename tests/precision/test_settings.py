"""Settings of low precision: what can be chosen, and one message for each thing that cannot."""

from typing import Any

import pytest

from vidaccel.errors import PrecisionError
from vidaccel.precision.settings import PRESETS, LowPrecision, settings_of


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"format": "int7"}, "format is one of 'int8'"),
        ({"rotation": "random"}, "rotation is one of None, 'hadamard'"),
        ({"group": 32}, "group is one of None, 4, 16, 64, 256"),
        ({"group": 16.0}, "group is one of"),
        ({"sequence": "dct"}, "sequence is one of None, 'haar'"),
        ({"keep_weights": "gpu"}, "keep_weights is one of 'cpu', 'disk', 'drop'"),
        ({"gptq": 1}, "gptq is one of False, True"),
        ({"high_tokens": -1}, "high_tokens takes a share"),
        ({"high_tokens": 1.5, "sequence": "haar"}, "high_tokens takes a share"),
        ({"high_tokens": True}, "high_tokens takes a share"),
        ({"high_tokens": float("nan"), "sequence": "haar"}, "high_tokens takes a share"),
        ({"high_tokens": 8}, "picks the coarsest tokens of sequence='haar'"),
        ({"max_error": 0}, "max_error takes a number above 0"),
        ({"skip": "blocks.0."}, "skip takes a tuple"),
        ({"skip": ("",)}, "skip takes a tuple"),
        ({"calibration": 5}, "calibration takes the name of a file"),
        ({"rotation": "wush"}, "needs a calibration"),
        ({"rotation": "dart"}, "needs a calibration"),
        ({"gptq": True}, "needs a calibration"),
        ({"rotation": "wush", "calibration": "x", "group": 16}, "that of the calibration"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], told: str):
    with pytest.raises(PrecisionError, match=told):
        LowPrecision(**wrong)


def test_names_are_presets_and_settings_are_themselves():
    assert settings_of(None) is None
    assert settings_of("int8") == LowPrecision()
    assert settings_of("int4") is PRESETS["int4"]
    own = LowPrecision(format="mxint8")
    assert settings_of(own) is own


@pytest.mark.parametrize("wrong", ["int2", 8, True, {"format": "int8"}])
def test_what_is_no_precision_is_refused(wrong: Any):
    with pytest.raises(PrecisionError, match="precision is None, 'int8', 'int4' or a LowPrecision"):
        settings_of(wrong)


def test_high_tokens_are_a_share_or_a_number():
    share = LowPrecision(format="nvint4", sequence="haar", high_tokens=0.29)
    assert share.high_of(100) == 29
    number = LowPrecision(format="nvint4", sequence="haar", high_tokens=64)
    assert (number.high_of(320), number.high_of(10)) == (64, 10)


def test_shown_is_what_differs_from_the_defaults():
    assert str(LowPrecision()) == "LowPrecision(format='int8')"
    shown = str(LowPrecision(format="nvint4", sequence="haar", high_tokens=8))
    assert shown == "LowPrecision(format='nvint4', sequence='haar', high_tokens=8)"


def test_bits_are_those_of_a_weight():
    assert {name: LowPrecision(format=name).bits for name in ("int8", "mxfp8", "nvint4")} == {
        "int8": 8,
        "mxfp8": 8,
        "nvint4": 4,
    }
