"""Other caches turn on, work, and leave nothing behind."""

from contextlib import suppress

import pytest
import torch

from tiny import STEPS
from tiny.looking import count_blocks
from tiny.wan import wan, wan22
from vidaccel.bench import baselines
from vidaccel.bench.baselines import BASELINES, Baseline, magnitude_ratios
from vidaccel.errors import UnsupportedPipelineError

RATIOS = {"mag_ratios": [1.0] * STEPS, "num_inference_steps": STEPS}
# Settings that reuse most steps of a run of 6.
SETTINGS = {
    "FirstBlockCache": {"threshold": 10.0},
    "MagCache": {"threshold": 10.0, "max_skip_steps": 5, "retention_ratio": 0.2, **RATIOS},
    "TaylorSeer": {"cache_interval": 3, "disable_cache_before_step": 2},
    "TaylorSeer lite": {"cache_interval": 3, "disable_cache_before_step": 2},
    "SeaCache": {"threshold": 10.0},
    "cache-dit": {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 1,
        "residual_diff_threshold": 0.9,
        "max_warmup_steps": 2,
        "taylorseer_order": 1,
    },
}


def attributes(pipe):
    """Every attribute that an enabled cache could have left somewhere."""
    named = dict(pipe.transformer.named_modules())
    owners = [vars(pipe), vars(type(pipe)), *map(vars, named.values())]
    return [list(named), *(dict(owner) for owner in owners)]


@pytest.fixture(params=BASELINES)
def baseline(request):
    if BASELINES[request.param].unavailable:
        pytest.skip(BASELINES[request.param].unavailable)
    return BASELINES[request.param], SETTINGS[request.param]


def test_works_and_leaves_no_trace(baseline):
    row, setting = baseline
    case = wan()
    plain = case.run()
    before, linear = attributes(case.pipe), _count_linear(case.pipe)
    case.run()
    whole = linear[0]
    for _ in range(2):  # one that is turned on again must find nothing of the first time
        linear[0] = 0
        with row.enabled(case.pipe, setting):
            reused = case.run()
        assert linear[0] < 0.8 * whole, "it computed everything"
        assert not torch.equal(reused, plain)
        assert attributes(case.pipe) == before
    assert torch.equal(case.run(), plain)


def test_leaves_no_trace_of_a_run_that_failed(baseline):
    row, setting = baseline
    case = wan()
    before = attributes(case.pipe)
    with suppress(ZeroDivisionError), row.enabled(case.pipe, setting):
        raise ZeroDivisionError
    assert attributes(case.pipe) == before


def _count_linear(pipe):
    """Calls of all linear layers of the blocks."""
    count = [0]

    def add(module, args):
        count[0] += 1

    for module in pipe.transformer.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add)
    return count


def test_magnitude_ratios_are_those_of_the_model():
    case = wan()
    blocks = count_blocks(case.pipe)
    ratios = magnitude_ratios(case.pipe, [case.kwargs, case.kwargs])
    assert blocks["blocks"] == 2 * 2 * STEPS * len(case.pipe.transformer.blocks)
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert all(0.2 < ratio < 5 for ratio in ratios)
    assert len(set(ratios)) > 2


def test_mag_cache_refuses_two_transformers():
    case = wan22()
    with (
        pytest.raises(UnsupportedPipelineError, match="two"),
        BASELINES["MagCache"].enabled(case.pipe, SETTINGS["MagCache"]),
    ):
        pass


def test_taylor_seer_refuses_what_it_would_silently_skip(monkeypatch):
    case = wan()
    blocks = case.pipe.transformer.blocks
    case.pipe.transformer.layers_of_another_name = blocks
    del case.pipe.transformer.blocks
    monkeypatch.setattr(baselines, "_transformers", lambda pipe: [pipe.transformer])
    with (
        pytest.raises(UnsupportedPipelineError, match="no attention"),
        BASELINES["TaylorSeer"].enabled(case.pipe, SETTINGS["TaylorSeer"]),
    ):
        pass


def test_a_library_that_is_not_there_is_named():
    row = Baseline("no_such_package", lambda pipe, setting: None, lambda pipe: None)
    with (
        pytest.raises(UnsupportedPipelineError, match="pip install no-such-package"),
        row.enabled(None, {}),
    ):
        pass
