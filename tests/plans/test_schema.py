"""The records of a policy file, and the edges and plans that they stand for."""

import pytest

from vidaccel.errors import PlanError
from vidaccel.plans.edge import Edge, edges_of, without_reuse
from vidaccel.plans.plan import Plan
from vidaccel.plans.schema import StoredEdge, StoredPlan, Validation


@pytest.mark.parametrize("edge", [Edge(0, 2, 0.5), Edge(3, 6, 0.25, 1, 0.75, 1)])
def test_an_edge_is_stored_and_read_again(edge):
    stored = StoredEdge.of(edge, spread=0.1, count=4)
    assert stored.to_edge() == edge
    assert (stored.mean, stored.spread, stored.count) == (edge.error, 0.1, 4)


@pytest.mark.parametrize(
    "plan",
    [
        Plan((0, 2, 5), 6),
        Plan((0, 2), 6, errors=(0.5, 0.25), orders=(0, 1), scales=(1.0, 0.5)),
    ],
)
def test_a_plan_is_stored_and_read_again(plan):
    stored = StoredPlan.of(plan, stability=(1.0 for _ in plan.steps), chosen_as="leximax")
    assert stored.to_plan(6) == plan
    assert (stored.stability, stored.chosen_as) == ((1.0,) * len(plan.steps), "leximax")
    with pytest.raises(PlanError, match="computes step"):
        stored.to_plan(2)


def test_the_edges_of_a_plan_are_its_path():
    plan = Plan((0, 2, 3), 6, errors=(0.5, 0.0, 0.25), orders=(0, 0, 1), scales=(1.0, 1.0, 0.5))
    assert edges_of(plan) == [Edge(0, 2, 0.5), Edge(2, 3, 0.0), Edge(3, 6, 0.25, 1, 0.5, 2)]
    assert edges_of(Plan((0, 2, 5), 6, errors=(0.5, 0.25))) == [Edge(0, 2, 0.5), Edge(2, 5, 0.25)]
    assert edges_of(Plan((0, 2, 5), 6)) == []
    assert [edge.action[:2] for edge in without_reuse(3)] == [(0, 1), (1, 2), (2, 3)]


def test_a_validation_of_before_is_read_and_written_as_it_was():
    old = {"budget": 4, "candidate": "sum", "kept": True, "psnr": 40.0, "worst_psnr": 38.0}
    old |= {"ssim": 0.9, "lpips": None, "speedup": 2.0}
    read = Validation.model_validate(old)
    assert read.vmaf is None and read.cvvdp is None and read.flicker is None
    assert read.model_dump() == old
    new = old | {"worst_frame_psnr": 35.0, "vmaf": 95.0, "cvvdp": 9.5, "flicker": 0.0}
    assert Validation.model_validate(new).model_dump() == new
