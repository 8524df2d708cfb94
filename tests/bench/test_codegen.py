"""Generated code of the kernels that matter most, compiled for chips that are not here."""

import json
import os
import subprocess
import sys

import pytest

from vidaccel.bench import codegen
from vidaccel.errors import VidaccelError


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Rows of a run in a process of its own: here the kernels are interpreted."""
    out = tmp_path_factory.mktemp("codegen") / "codegen.json"
    command = [sys.executable, "-m", "vidaccel", "bench", "codegen", "--chips", "90"]
    command += ["--kernels", "d128 bf16", "--json", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    rows = json.loads(text)["rows"]
    assert text.count("\n") < len(rows) + 50, "a row takes a line"
    return rows


def test_nothing_spills_and_the_fast_units_are_used(result):
    assert codegen.problems(result) == []
    expected = {"attend", "attend_means", "mass", "assign", "prepare", "update", "update_sort"}
    expected |= {"attend_int8", "update_sort_int8", "quantise", "move"}
    expected |= {"attend_hopper", "attend_hopper_means"}
    assert {row["kernel"] for row in result} == expected
    for row in result:
        assert row["spills"] == 0 and row["stack_bytes"] == 0
        assert row["blocks_per_multiprocessor"] >= 1
        assert ("HGMMA" in row["matrix_instructions"]) == row["matrix"]
        assert ("IGMMA" in row["matrix_instructions"]) == (row["kernel"] == "attend_int8")


def test_loops_are_found_and_share_is_predicted(result):
    attend = next(row for row in result if row["kernel"] == "attend")
    assert attend["loop"]["tensor"] >= 8 and attend["loop"]["exponent"] >= 32
    assert 0.2 < attend["predicted"]["serial"] <= attend["predicted"]["overlapped"] <= 1.0
    int8 = next(row for row in result if row["kernel"] == "attend_int8")
    assert int8["shared_bytes"] < attend["shared_bytes"]
    assert int8["predicted"]["tensor_cycles"] == 0.75 * attend["predicted"]["tensor_cycles"]
    assert int8["warnings"] == ["C7515"], "cured? then it need not be accepted any more"
    assert int8["predicted"]["overlapped"] == int8["predicted"]["serial"]
    means = next(row for row in result if row["kernel"] == "attend_means")
    assert len(attend["loops"]) == 2 and len(means["loops"]) == 3
    assert all(loop["copies"] > 0 and loop["pending_copies"] for loop in means["loops"])
    table = codegen.codegen_table({"rows": result, "problems": []})
    assert "attend d128 bf16" in table and "predictions" in table


def test_problems_are_named():
    row = {"name": "attend d128 bf16", "chip": 90, "spills": 3, "shared_bytes": 300_000}
    row |= {"matrix": True, "dtype": "bf16", "matrix_instructions": ["HMMA"], "constants": {}}
    row |= {"kernel": "attend", "warnings": ["C7515"]}
    found = "; ".join(codegen.problems([row]))
    assert "attend d128 bf16 on sm_90: ptxas warns of lost speed (C7515)" in found
    int8 = row | {"constants": {"INT8": True}, "matrix_instructions": ["HGMMA", "IMMA"]}
    int8["kernel"] = "attend_int8"
    assert "C7515" not in "; ".join(codegen.problems([int8]))
    assert codegen.notes([int8]) == [
        "attend_int8 bf16 on sm_90: products wait (C7515); scores in int8 gain nothing there"
    ]
    assert "no IGMMA instructions, only HGMMA, IMMA" in "; ".join(codegen.problems([int8]))
    assert "spills registers: 3" in found and "300000 bytes" in found and "no HGMMA" in found


def test_a_loop_in_disassembly():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
    """
    code = codegen.instructions(text)
    assert [name for _, name, _ in code] == ["MOV", "HGMMA.64x64x16.F32", "MUFU.EX2", "BRA", "EXIT"]
    (loop,) = codegen.matrix_loops(code)
    assert [name for name, _ in loop] == ["HGMMA.64x64x16.F32", "MUFU.EX2", "BRA"]


def test_ptxas_is_asked_for_asynchronous_products_alone():
    assert codegen.ptxas_warnings(".target sm_80\nmma.sync") == []
    with pytest.raises(VidaccelError, match="ptxas failed"):
        codegen.ptxas_warnings(".version 8.0\n.target sm_90a\nwgmma")
