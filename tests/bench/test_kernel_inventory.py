"""The list of kernels is that of chips that can run them."""

import json
import os
import subprocess
import sys

import pytest

from vidaccel.kernels.common import KernelError


@pytest.mark.parametrize("chip", [60, 70, 75])
def test_there_is_nothing_to_compile_for_chips_that_cannot_run_it(chip):
    from vidaccel.bench.kernel_inventory import Shipped, shipped

    message = f"need compute capability 8.0, and this GPU has {chip // 10}.{chip % 10}"
    with pytest.raises(KernelError, match=message):
        shipped(chip)  # at once, not when it is walked
    with pytest.raises(KernelError, match=message):
        Shipped("attend", 64, "fp16", None, {}, {}, frozenset()).compile(chip)


def test_all_kernels_are_listed_for_the_others():
    """In a process of its own: kernels that another test has had interpreted are none to list."""
    code = """
import json
from vidaccel.bench.kernel_inventory import shipped
print(json.dumps({c: sorted({s.kernel for s in shipped(c)}) for c in (80, 86, 89, 90, 100, 120)}))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = {"attend", "attend_int8", "attend_means", "mass", "assign", "threshold", "rank"}
    listed = json.loads(done.stdout)
    assert len(listed) == 6
    for chip, names in listed.items():
        assert wanted <= set(names), chip
