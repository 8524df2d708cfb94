"""The types of arguments."""

import argparse

import pytest

from vidaccel.cli import argument_types
from vidaccel.cli.argument_types import number, seeds, size, whole_number
from vidaccel.plans import schema
from vidaccel.plans.policy import CachePolicy


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (whole_number(1, 1000), "100000000", "at most 1000"),
        (whole_number(1), "1.5", "a whole number of 1 or more"),
        (whole_number(0), "9" * 5000, "a whole number of 0 or more"),
        (number(), "nan", "a number: 'nan'"),
        (number(), "-inf", "a number: '-inf'"),
        (number(0), "-1", "a number of 0 or more"),
        (number(0, above=True), "0", "a number above 0"),
        (number(0, above=True), "fast", "a number above 0"),
        (size, "100000x100000", "at most 16384 pixels a side"),
        (size, "1x99999999999999999999", "at most 16384 pixels a side"),
        (size, "0x64", "width x height"),
        (size, "64x-64", "width x height"),
        (seeds, "0,1,0", "each seed once"),
        (seeds, "0,,1", "a whole number of 0 or more"),
        (seeds, str(2**64), "at most"),
    ],
)
def test_what_is_no_such_argument_is_told(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)


def test_arguments_are_read():
    assert whole_number(1, 1000)("1000") == 1000
    assert number()("-1.5") == -1.5 and number(0)("0") == 0 and number(0, above=True)("1e-3") > 0
    assert size("832x480") == size("0832x480") == (832, 480)
    assert seeds("3") == [3] and seeds(f"0,{2**64 - 1}") == [0, 2**64 - 1]


def test_the_limits_are_those_of_a_policy_file():
    assert argument_types.MAX_STEPS == schema.MAX_STEPS
    limits = CachePolicy.model_json_schema()["properties"]
    for name, limit in (
        ("width", argument_types.MAX_PIXELS),
        ("frames", argument_types.MAX_FRAMES),
    ):
        assert limits[name]["anyOf"][0]["maximum"] == limit
