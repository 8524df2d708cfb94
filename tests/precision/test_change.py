"""What changes of precision refuse."""

import pytest

from tiny.wan import wan
from vidaccel import accelerate, build_policy, restore, suggest_threshold
from vidaccel.api import engines_of
from vidaccel.errors import PrecisionError

STEPS = 4


@pytest.mark.parametrize("what", ["build_policy", "suggest_threshold"])
def test_a_pipeline_in_low_precision_is_not_measured(what):
    case = wan()
    call = {name: value for name, value in case.kwargs.items() if name != "num_inference_steps"}
    accelerate(case.pipe, policy=None, attention=None, precision="int8")
    with pytest.raises(PrecisionError, match=r"restore\(pipe\) first"):
        if what == "build_policy":
            build_policy(
                case.pipe,
                ["a", "b"],
                num_inference_steps=STEPS,
                max_skip=2,
                call_kwargs=call,
                validate=False,
                progress=False,
            )
        else:
            suggest_threshold(
                case.pipe,
                ["a"],
                num_inference_steps=STEPS,
                speedup=2.0,
                call_kwargs=call,
                progress=False,
            )
    (engine,) = engines_of(case.pipe).values()
    assert engine.transformer is case.pipe.transformer  # left as it was
    restore(case.pipe)
