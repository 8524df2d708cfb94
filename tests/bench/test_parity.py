"""DBCache beside that of cache-dit: the same steps, the same latents."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tiny.wan import wan, wan22
from vidaccel.bench.parity import parity, parity_table
from vidaccel.bench.parity_cases import Case, differences, sweep
from vidaccel.dbcache import DBCache
from vidaccel.errors import UnsupportedPipelineError

STEPS = 10
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.5)


@pytest.fixture
def case():
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    case = wan()
    case.kwargs["num_inference_steps"] = STEPS
    # Evenly spaced noise levels: there a line over the step is one over the noise level.
    case.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return case


def run(case, cases):
    return parity(case.pipe, case.kwargs, cases, progress=False)


def test_the_same_steps_and_latents_at_every_threshold(case):
    cases = [c for c in sweep(THRESHOLDS) if c.cache.corrector_blocks < 2]  # it has 3 blocks
    plain = case.run()
    result = run(case, cases)
    rows = result.agree
    assert [row.name for row in rows if not row.same_steps] == []
    assert result.summary.same_latents == result.summary.cases == len(cases)
    reused = {len(row.vidaccel.reused[0]) for row in rows}
    assert len(reused) > 3, "the sweep has to cover more than everything and nothing"
    assert not result.part
    written = json.loads(json.dumps(result.to_dict()))
    assert written["agree"][0]["cache_dit"] == {"reused": rows[0].cache_dit.reused}
    assert f"{len(cases)} of {len(cases)} cases reuse the same steps" in parity_table(result)
    assert torch.equal(case.run(), plain)


def test_where_the_two_part(case):
    blocks = len(case.pipe.transformer.blocks)
    cases = differences(blocks)
    result = run(case, cases)
    assert not result.agree and result.summary.largest_difference is None
    overlapping = result.part[-1]
    assert "leave at least one" in overlapping.vidaccel.refused
    unguided = result.part[1]
    assert unguided.vidaccel.reused != unguided.cache_dit.reused
    assert all(row.why for row in result.part)
    assert "where they part" in parity_table(result)


def test_a_difference_is_not_hidden(case):
    ours = DBCache(threshold=0.5, branches="separate", warmup_steps=2)

    class Wrong(Case):
        def for_cache_dit(self):
            return super().for_cache_dit() | {"max_warmup_steps": 6}

    result = run(case, [Wrong(ours)])
    assert result.summary.same_steps == 0
    assert "NOT THE SAME STEPS" in parity_table(result)


def test_refuses_what_it_cannot_compare(case, monkeypatch):
    with pytest.raises(UnsupportedPipelineError, match="one transformer"):
        parity(wan22().pipe, {}, progress=False)
    monkeypatch.setattr("vidaccel.bench.baselines.find_spec", lambda name: None)
    with pytest.raises(UnsupportedPipelineError, match="cache_dit is not installed"):
        parity(case.pipe, {}, progress=False)
