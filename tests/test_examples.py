"""The examples as a reader would start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_torchrun_runs_on_two_ranks(tmp_path):
    # Diffusers takes the rank modulo the number of accelerators, of which there may be none here.
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import runpy, torch\n"
        "torch.set_num_threads(1)\n"
        "torch.cuda.is_available = lambda: False\n"
        "torch.accelerator.device_count = lambda: 2\n"
        f"runpy.run_path({str(EXAMPLES / 'torchrun.py')!r}, run_name='__main__')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, "--standalone", str(runner)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "WanPipeline.transformer" in result.stdout
    assert result.stdout.count("generations") == 1  # one rank prints
    assert (tmp_path / "torchrun.mp4").stat().st_size > 0
