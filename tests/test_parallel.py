"""Context parallelism: two processes give what one gives, and take the same decisions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import wan
from torch import multiprocessing

from vidaccel import DBCache, accelerate, report

PLAN = [0, 1, 4]
EAGER = DBCache(threshold=1e9, warmup_steps=1, max_consecutive=2, forecast_order=1)
# Reuses some steps of the tiny model and computes others.
CHOOSY = DBCache(threshold=0.1, warmup_steps=1, max_consecutive=None)
SIZE = {"height": 32, "width": 32}  # 12 tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "every step": {"policy": None},
    "plan": {"policy": PLAN},
    "cache": {"policy": None, "cache": EAGER},
    "corrector": {"policy": None, "cache": DBCache(1e9, corrector_blocks=1, warmup_steps=1)},
    "decisions": {"policy": None, "cache": CHOOSY},
    "plan and guard": {"policy": PLAN, "cache": CHOOSY},
}


def run_all(case: Any) -> dict[str, tuple[torch.Tensor, str]]:
    """Latents and timeline under each setting."""
    results = {}
    for name, acceleration in SETTINGS.items():
        accelerate(case.pipe, **acceleration)
        latents = case.run(**SIZE)
        results[name] = (latents, report(case.pipe).transformers[0].timeline)
    return results


def one_of_two(rank: int, folder: str, first: str) -> None:
    """A process of a group of two."""
    torch.set_num_threads(1)
    from diffusers import ContextParallelConfig

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Diffusers divides by the number of devices, of which a machine with only a CPU has none.
    torch.accelerator.device_count = lambda: 2
    case = wan()
    if first == "accelerate":
        accelerate(case.pipe, policy=PLAN)
    case.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    results = run_all(case)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "parallelism"])
def test_two_processes_give_what_one_gives(tmp_path, first):
    multiprocessing.spawn(one_of_two, (str(tmp_path), first), nprocs=2)
    expected = run_all(wan())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (latents, timeline) in expected.items():
        for result in results:
            assert result[name][1] == timeline, name
            torch.testing.assert_close(result[name][0], latents, rtol=1e-4, atol=1e-5, msg=name)
    kinds = expected["decisions"][1]
    assert "p" in kinds and "C" in kinds[1:]


def test_the_example_runs(tmp_path):
    example = Path(__file__).parent.parent / "examples" / "torchrun.py"
    out = tmp_path / "clip.mp4"
    options = ["--size", "64", "--frames", "5", "--steps", "8", "--out", str(out)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(example), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WanPipeline.transformer" in done.stdout
    assert out.stat().st_size > 1000
