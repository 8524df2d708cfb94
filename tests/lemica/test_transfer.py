"""Policies that can or cannot be carried over to another noise grid."""

import numpy as np
import pytest

from tiny.policies import forecasting, parse, run_settings, valid
from vidaccel.errors import PolicyError
from vidaccel.lemica.transfer import transferred


def test_what_cannot_be_transferred():
    other = run_settings(num_inference_steps=9, sigmas=tuple(np.linspace(1, 0.1, 9)))
    assert transferred(parse(forecasting()), other).num_inference_steps == 9
    for change, message in (
        ({"edges": []}, "edges: found none"),
        ({"scheduler": {}}, "edges: found none"),
        ({"scheduler": {"sigmas": [1, 1, 0.8, 0.6, 0.4, 0.1]}}, "of the policy do not fall"),
    ):
        with pytest.raises(PolicyError, match=message):
            transferred(parse(valid() | change), other)
    with pytest.raises(PolicyError, match=r"scheduler.sigmas: this run has none"):
        transferred(parse(valid()), run_settings(num_inference_steps=9, sigmas=None))
    with pytest.raises(PolicyError, match=r"model.id: the policy is for org/tiny-wan"):
        transferred(parse(valid()), run_settings(model_id="org/other"))
