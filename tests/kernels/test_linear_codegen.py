"""Generated code of the products of linear layers, compiled for a chip that is not here."""

import json
import os
import subprocess
import sys

import pytest

from vidaccel.bench import codegen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "kernels", "unit"),
    [("90", "linear_int8 bf16", "IGMMA"), ("80", "linear_mxint8 bf16", "IMMA")],
)
def test_products_use_the_units_of_whole_numbers(chip, kernels, unit, tmp_path):
    """In a process of its own: here the kernels are interpreted."""
    out = tmp_path / "codegen.json"
    command = [sys.executable, "-m", "vidaccel", "bench", "codegen", "--chips", chip]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--kernels", kernels, "--json", str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert codegen.problems([row]) == [] and row["spills"] == row["stack_bytes"] == 0
    assert row["matrix_instructions"] == [unit]
    # The bytes of operands go to the tensor cores as they lie: nothing takes them apart.
    assert row["loop"]["tensor"] >= 8 and row["loop"].get("spill", 0) == 0
    other = codegen.problems([row | {"matrix_instructions": ["HGMMA"]}])
    assert f"has no {unit} instructions" in other[0]
