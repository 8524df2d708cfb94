"""The list of kernels is that of chips that can run them."""

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


@pytest.mark.parametrize("chip", [80, 86, 89, 90, 100, 120])
def test_all_kernels_are_listed_for_the_others(chip):
    from vidaccel.bench.kernel_inventory import shipped

    names = {one.kernel for one in shipped(chip)}
    assert {"attend", "attend_int8", "add_means", "mass", "assign", "threshold", "rank"} <= names
