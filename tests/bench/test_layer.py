"""The prediction of a whole layer: turns counted by hand, and one real compile."""

import json
import os
import subprocess
import sys

import pytest

from vidaccel.bench.kernels import Shape
from vidaccel.bench.layer import attention_turns, launches, layer, layer_table
from vidaccel.errors import VidaccelError

SHAPE = Shape(heads=2, tokens=1024, head_dim=128, query_clusters=1, key_clusters=1)


def test_one_cluster_of_everything_is_dense():
    turns = attention_turns(SHAPE, 1.0, 128, 128)
    assert turns == (2 * 8, 2 * 8 * 8, 0)


def test_a_rest_is_cut_into_pieces_that_fill_tiles():
    turns = attention_turns(Shape(1, 128 + 17, 128, 1, 1), 1.0, 64, 128)
    assert turns == (3, 3, 3)  # 17 keys are two pieces of 16, in one tile


def test_a_share_of_the_clusters_takes_about_that_share_of_the_turns():
    shape = Shape(1, 64_000, 128, 50, 500)
    dense = attention_turns(shape, 1.0, 128, 128)
    some = attention_turns(shape, 0.25, 128, 128)
    assert dense.tiles == some.tiles
    keys = 128 * (some.full + some.partial) / some.tiles
    assert 0.25 * 64_000 <= keys <= 0.35 * 64_000, "what is more is the waste of partial blocks"


def test_the_launches_are_those_of_the_layer():
    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_MEANS": 32}
    constants = dict.fromkeys(("assign", "mass", "attend_means"), tile)
    turns = attention_turns(SHAPE, 1.0, 128, 128)
    plain = launches(SHAPE, turns, constants, mass=False, means=False)
    whole = launches(SHAPE, turns, constants, mass=True, means=True)
    assert sum(launch.times for launch in plain) == 12
    assert [launch.kernel for launch in whole][-4:] == [
        "mass", "threshold", "lists", "attend_means",
    ]  # fmt: skip
    assigned = plain[1]
    assert assigned.turns == (2 * 8 * 2,), "both sides have one cluster: one tile of centroids"


def test_a_chip_without_rates_is_refused():
    with pytest.raises(VidaccelError, match="rates of sm_80, sm_90, sm_120, not sm_100"):
        layer(SHAPE, 0.3, 100)


@pytest.mark.slow
def test_a_layer_is_predicted_from_its_generated_code(tmp_path):
    out = tmp_path / "layer.json"
    command = [sys.executable, "-m", "vidaccel", "bench", "layer", "--shapes", "CogVideoX"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--json", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["layers"]
    assert layer_table(found) in done.stdout
    rows = {row["kernel"]: row for row in found["launches"]}
    attention = rows["attend_means"]
    assert attention["warp_instructions"] > 0.5 * sum(r["warp_instructions"] for r in rows.values())
    fast, slow = attention["microseconds"]
    assert 0 < fast < slow
    assert found["layer_us"][0] < found["dense_us"][0], "at 30 % of the pairs"
    assert rows["update"]["microseconds"][0] == rows["update"]["microseconds"][1]
