"""The Gluon kernel of attention for sm_90: on a model of its operations, and compiled for it."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tiny.gluon_model import kernel_source, run_on_model
from tiny.selections import to
from vidaccel.kernels import block_sparse_attention as sparse
from vidaccel.kernels import reference
from vidaccel.kernels.block_lists import BlockLists, fill_block_lists
from vidaccel.kernels.hopper_attention import hopper_config

KERNELS = ("attend_hopper", "attend_hopper_means")
SMALL = hopper_config(64, torch.bfloat16)
LARGE = hopper_config(128, torch.bfloat16)
CONFIGS = {
    "shipped-d64": (64, SMALL),
    "shipped-d128": (128, LARGE),
    "2-stages": (64, SMALL | {"STAGES": 2}),
    "2-stages-late": (64, LARGE | {"STAGES": 2}),
    "4-stages": (64, SMALL | {"STAGES": 4}),
    "128x128": (64, LARGE | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}),
}


def ends_of(sizes):
    """[1, 2, K + 1]: two heads, the second with the sizes in reverse."""
    sizes = torch.tensor(sizes)
    return pad(torch.stack([sizes, sizes.flip(0)]).cumsum(-1), (1, 0)).int()[None]


def arguments(head_dim, config, device, *, with_means=False):
    """Return what the kernel takes, and the result of the reference.

    Query clusters select nothing, one cluster, all of them, and some.
    """
    torch.manual_seed(0)
    q_sizes, k_sizes = (70, 131, 5, 0, 1, 66), (300, 0, 17, 90, 1, 16, 40, 150)
    q_ends, k_ends = ends_of(q_sizes), ends_of(k_sizes)
    num_queries, num_keys = sum(q_sizes), sum(k_sizes)
    q = torch.randn(1, num_queries, 2, head_dim).transpose(1, 2)
    k, v = (torch.randn(1, 2, num_keys, head_dim) for _ in range(2))
    mask = torch.rand(1, 2, len(q_sizes), len(k_sizes)) < 0.5
    mask[:, :, 0] = torch.arange(len(k_sizes)) == 3
    mask[:, :, 1] = True
    mask[:, :, 2] = False
    selection = reference.selection_from_mask(mask, k_ends.diff())
    order = means = None
    extra = {}
    if with_means:
        order = torch.rand(1, 2, num_queries).argsort(-1).int()
        k_means, v_means = (torch.randn(1, 2, len(k_sizes), head_dim) for _ in range(2))
        means = sparse.ClusterMeans(k_means, v_means, len(q_sizes) - 1)
        extra = {"q_order": order, "k_means": k_means, "v_means": v_means}
        extra["compensated_rows"] = means.num_compensated
    lists = BlockLists.empty(
        1,
        2,
        num_queries,
        num_keys,
        len(q_sizes),
        len(k_sizes),
        block_m=config["BLOCK_M"],
        block_n=config["BLOCK_N"],
        num_means=len(k_sizes) if with_means else None,
        device=device,
    )
    for x in lists.tensors():
        if x is not None:  # what is read beyond the ends of lists does harm
            x.fill_(float("nan") if x.is_floating_point() else 0x3FFFFFFF)
    moved = to((q, k, v, q_ends, k_ends, selection), device)
    fill_block_lists(lists, moved[5], *moved[3:5], len(q_sizes) - 1)
    named = {field.name: getattr(lists, field.name) for field in fields(lists)}
    lists = replace(lists, **{n: x.cpu() for n, x in named.items() if isinstance(x, Tensor)})
    scale = head_dim**-0.5
    expected = reference.block_sparse_attention(
        q, k, v, q_ends, k_ends, selection, scale=scale, **extra
    )
    options = {"scale": scale, "sorted_idx": order, "means": means, "config": config}
    return (q, k, v, q_ends, k_ends, lists), options, expected


@pytest.mark.parametrize("with_means", [False, True], ids=["exact", "means-and-order"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_the_reference(name, with_means, device):
    tensors, options, (out, lse) = arguments(*CONFIGS[name], device, with_means=with_means)
    found, found_lse = run_on_model(*tensors, **options)
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)
    alone = lse.isinf()
    assert torch.equal(found_lse.isinf(), alone) and alone.any() == (not with_means)


SCORES = "scores = warpgroup_mma_wait(1, deps=[scores])"
SUM = "acc, weights = warpgroup_mma_wait(0, deps=[acc_later, weights])"


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        ("wait_group(STAGES - 2)", "wait_group(STAGES - 1)", "not been copied"),
        ("wait_group(0)", "wait_group(STAGES - 1)", "not been copied"),
        ("wait_group(0)", "wait_group(STAGES - 2)", "left under way"),
        (SCORES, "", "before it has ended"),
        (SCORES, SCORES.replace("1", "2"), "before it has ended"),
        (SUM, SUM.replace("0", "1"), "before it has ended"),
        ("k, k_start, turn + STAGES - 1", "k, k_start, turn + STAGES", "reads what is written"),
        ("v, v_start, turn + STAGES - 2", "v, v_start, turn + STAGES - 1", "reads what is written"),
        ("offs_m < end", "offs_m < end + BLOCK_M", "out of bounds"),
    ],
)
def test_the_model_finds_faults(right, wrong, fault, device):
    """One change to the kernel each, that a GPU might not show."""
    source = kernel_source()
    assert right in source
    tensors, options, _ = arguments(*CONFIGS["shipped-d128"], device)
    with pytest.raises(AssertionError, match=fault):
        run_on_model(*tensors, **options, source=source.replace(right, wrong))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(80, torch.bfloat16), (96, torch.float16), (64, torch.float32), (128, torch.float32)],
)
def test_other_head_sizes_and_types_have_no_config(head_dim, dtype):
    assert hopper_config(head_dim, dtype) is None


def on_chip(monkeypatch, chip, head_dim=64, dtype=torch.bfloat16):
    """Return what stands for queries on a GPU, where kernels are compiled."""
    monkeypatch.setattr(sparse, "chip", lambda device: chip)
    monkeypatch.setattr(sparse, "interpreting", lambda: False)
    device = SimpleNamespace(type="cuda")
    return SimpleNamespace(device=device, shape=(1, 2, 300, head_dim), dtype=dtype)


@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_it_runs_on_one_chip_alone(chip, monkeypatch):
    q = on_chip(monkeypatch, chip)
    assert sparse._hopper_config(q, False) == (SMALL if chip == 90 else None)
    assert sparse._hopper_config(q, True) is None, "not with int8"


def test_it_does_not_run_elsewhere(monkeypatch):
    assert sparse._hopper_config(on_chip(monkeypatch, 90, head_dim=80), False) is None
    assert sparse._hopper_config(on_chip(monkeypatch, 90, dtype=torch.float32), False) is None
    q = on_chip(monkeypatch, 90)
    monkeypatch.setattr(sparse, "interpreting", lambda: True)
    assert sparse._hopper_config(q, False) is None
    q = on_chip(monkeypatch, 90)
    q.device.type = "cpu"
    assert sparse._hopper_config(q, False) is None


@pytest.fixture
def fresh_import():
    """The kernel is looked for once in a process."""
    sparse._hopper_module.cache_clear()
    yield
    sparse._hopper_module.cache_clear()


def test_without_gluon_it_says_so_once(monkeypatch, fresh_import):
    q = on_chip(monkeypatch, 90)
    monkeypatch.delitem(sys.modules, "vidaccel.kernels.hopper_attention")
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    with pytest.warns(UserWarning, match="no Gluon as vidaccel knows it") as told:
        assert sparse._hopper_config(q, False) is None
        assert sparse._hopper_config(q, False) is None
    assert len(told) == 1


@pytest.fixture(scope="module")
def compiled():
    """What is compiled for sm_90, by a process of its own: here the kernels are interpreted.

    Each row has the order of products and waits of each of its loops.
    """
    code = """
import json
from vidaccel.bench.codegen import _row, disassembled, instructions, matrix_loops
from vidaccel.bench.kernel_inventory import shipped
for config in shipped(90):
    if config.kernel.startswith("attend_hopper") and config.dtype == "bf16":
        compiled = config.compile(90)
        row = _row(config, 90, compiled)
        loops = matrix_loops(instructions(disassembled(compiled.asm["cubin"])[1]))
        row["orders"] = [
            ["product" if "HGMMA" in name else operands.split(", ")[-1] for name, operands in loop
             if "HGMMA" in name or name.startswith("WARPGROUP.DEPBAR")]
            for loop in loops
        ]
        print(json.dumps(row))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_compiled_nothing_spills_or_is_serialised(compiled):
    names = [f"{kernel} d{d} bf16" for d in (64, 128) for kernel in KERNELS]
    assert [row["name"] for row in compiled] == names
    for row in compiled:
        assert row["spills"] == row["stack_bytes"] == 0 and row["warnings"] == [], row["name"]
        assert row["blocks_per_multiprocessor"] >= 2, row["name"]


@pytest.mark.slow
def test_compiled_both_products_of_a_turn_are_under_way_together(compiled):
    for row in compiled:
        assert len(row["orders"]) == (3 if row["kernel"] == "attend_hopper_means" else 2)
        for order in row["orders"]:
            assert order == ["product"] * (len(order) - 2) + ["0x1", "0x0"], row["name"]
            # 16 channels of the queries, or 16 keys, at a time.
            assert len(order) - 2 == row["head_dim"] // 16 + row["constants"]["BLOCK_N"] // 16
