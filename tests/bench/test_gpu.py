"""The bench of everything on a GPU: its order, its bounds, and what is left after a crash."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from vidaccel.bench import gpu as module
from vidaccel.bench.gpu import DEFAULT_PARTS, WEIGHTS, gpu
from vidaccel.bench.gpu_device import Device, GpuWatch
from vidaccel.bench.gpu_items import Item, Sizes
from vidaccel.bench.gpu_summary import TARGETS, summary_of, summary_table
from vidaccel.bench.gpu_tune import MOST
from vidaccel.bench.gpu_worker import BROKEN, PARTS, PartRecord, folder_of, items_of, work
from vidaccel.errors import BenchError

DRY = Sizes(dry=True)
NEVER = 1e18  # a deadline that does not come


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path / "out", DRY)


def record_of(folder, part="kernels", run="1"):
    return PartRecord(folder, part, run)


def silent(line):
    pass


def test_results_are_kept_and_failures_are_tried_in_the_next_run(folder):
    calls = []

    def item(name, fails=False):
        def run():
            calls.append(name)
            if fails and len(calls) < 4:
                raise ValueError("no luck")
            return {"value": float("inf")}

        return Item(name, run)

    items = [item("a"), item("b", fails=True), item("c")]
    assert work(record_of(folder), items, DRY, NEVER, silent) == 0
    kept = folder.read("kernels")["items"]
    assert {name: each["status"] for name, each in kept.items()} == {
        "a": "done", "b": "failed", "c": "done",
    }  # fmt: skip
    assert (
        kept["b"]["error"] == "ValueError: no luck" and "raise ValueError" in kept["b"]["traceback"]
    )
    assert kept["a"]["result"] == {"value": None}, "JSON knows no infinity"
    work(record_of(folder), items, DRY, NEVER, silent)
    assert calls == ["a", "b", "c"], "the same run tries nothing twice"
    work(record_of(folder, run="2"), items, DRY, NEVER, silent)
    assert calls == ["a", "b", "c", "b"]
    assert folder.read("kernels")["items"]["b"]["status"] == "done"


def test_what_does_not_fit_is_left_and_shorter_items_still_run(folder, monkeypatch):
    monkeypatch.setattr(Device, "free_bytes", lambda self: 2**30)
    monkeypatch.setattr(Device, "on_gpu", False)
    items = [
        Item("long", lambda: {}, seconds=60),
        Item("large", lambda: {}, seconds=1, gib=40),
        Item("short", lambda: {}, seconds=1, gib=0.5),
    ]
    work(record_of(folder), items, Sizes(), time.time() + 30, silent)
    kept = folder.read("kernels")["items"]
    assert [each["status"] for each in kept.values()] == ["left", "left", "done"]
    assert "about 60 s" in kept["long"]["reason"] and "40 GiB" in kept["large"]["reason"]


def test_a_device_that_refuses_all_work_ends_the_process(folder, monkeypatch):
    def illegal():
        monkeypatch.setattr(Device, "wait", refuse)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuse(self):
        raise RuntimeError("CUDA error")

    items = [Item("bad", illegal), Item("next", lambda: {})]
    assert work(record_of(folder), items, DRY, NEVER, silent) == BROKEN
    kept = folder.read("kernels")["items"]
    assert kept["bad"]["status"] == "failed" and "next" not in kept


@pytest.fixture
def processes(monkeypatch):
    """Put functions in the place of the processes of parts; each gets the record of its part."""
    commands = []

    def use(*runs):
        left = list(runs)

        def run_process(command, variables, limit):
            commands.append((command, variables, limit))
            part, path, run = command[3:6]
            return left.pop(0)(PartRecord(folder_of(module.Path(path), DRY), part, run))

        monkeypatch.setattr(module, "_run_process", run_process)
        return commands

    return use


def test_a_process_that_dies_costs_one_item(tmp_path, processes):
    def dies(record):
        record.note("a", "done", result={})
        record.note("b", "running")
        return -9

    def broken(record):
        assert not record.wanted("b")
        record.note("c", "failed", error="CUDA error")
        return BROKEN

    def ends(record):
        record.note("d", "done", result={})
        return 0

    def hangs(record):
        record.note("e", "running")
        return None

    lines = []
    commands = processes(dies, broken, ends, hangs)
    summary = gpu(["kernels", "train"], minutes=1, out=tmp_path, dry=True, log=lines.append)
    assert summary["parts"] == {
        "kernels": {"done": ["a", "d"], "failed": ["b", "c"], "left": []},
        "train": {"done": [], "failed": [], "left": ["e"]},
    }
    assert lines[0] == "kernels: the process ended with SIGKILL during b"
    assert lines[-1] == "train: its time was up during e"
    assert all(variables["TRITON_INTERPRET"] == "1" for _, variables, _ in commands)
    assert json.loads((tmp_path / "summary.json").read_text())["dry"] is True


def test_a_process_that_does_not_start_is_a_failure(tmp_path, processes):
    processes(lambda record: 1, lambda record: record.note("a", "done", result={}) or 0)
    for expected in ({"failed": ["start of the process"]}, {"done": ["a"], "failed": []}):
        summary = gpu(["train"], minutes=1, out=tmp_path, dry=True)
        assert expected.items() <= summary["parts"]["train"].items()


def test_a_process_and_what_it_started_end_at_the_limit(tmp_path):
    waits = "import threading; threading.Event().wait()"
    starts = (
        "import os, pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {waits!r}])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n" + waits
    )
    command = [sys.executable, "-c", starts]
    limit = 0.5
    while not (found := tmp_path / "child").exists() or not found.read_text():
        assert module._run_process(command, dict(os.environ), limit) is None
        limit *= 2  # a busy machine takes long to start two
    with pytest.raises(ProcessLookupError):
        while True:  # a process that was ended is gone once it is waited for
            os.kill(int(found.read_text()), 0)
            time.sleep(0.01)
    assert module._run_process([sys.executable, "-c", "raise SystemExit(3)"], {}, None) == 3


def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match="there is none here; --dry goes through all"):
        gpu(out=tmp_path)
    with pytest.raises(BenchError, match="no part is called 'kernel'; there are kernels, "):
        gpu(["kernel"], out=tmp_path, dry=True)
    with pytest.raises(BenchError, match="no part is named"):
        gpu([], out=tmp_path, dry=True)
    folder_of(tmp_path / "other", DRY)
    manifest = tmp_path / "other" / "task.json"
    manifest.write_text(manifest.read_text().replace('"kernels": "', '"kernels": "0'))
    with pytest.raises(BenchError, match="belongs to another run: its kernels differs"):
        gpu(out=tmp_path / "other", dry=True)


def test_the_summary_holds_targets_against_results():
    def sparse(clusters, rate, milliseconds):
        row = {"useful_tflops": rate, "milliseconds": milliseconds}
        result = {"query_clusters": clusters, "wanted_density": 0.3, "fastest_dense_ms": 10.0}
        return {"status": "done", "result": result | {"sparse": {"vidaccel": row}}}

    layer = {"layer_ms": 5.0, "options": {}, "share_of_dense": 0.05, "launches": 12, "waits": 0}
    items = {
        "few": sparse(100, 450.0, 4.0),
        "most": sparse(300, 300.0, 6.0),
        "layer": {"status": "done", "result": layer},
        "bad": {"status": "failed", "error": "x"},
        "stopped": {"status": "running"},
    }
    summary = summary_of({"attention": items})
    assert summary["parts"]["attention"]["left"] == ["stopped"]
    found = {name: (row["measured"], row["met"]) for name, row in summary["targets"].items()}
    assert found["sparse attention, useful TFLOP/s at 30 %"] == (450.0, True)
    assert found["sparse attention over the fastest dense one at 30 %"] == (2.5, True)
    assert found["clustering and sorting, share of dense attention"] == (0.05, False)
    assert found["launches of a layer"] == (12.0, True)
    assert found["idle cost, share of a step"] == (None, None)
    table = summary_table(summary)
    assert "MISSED" in table and "failed: bad" in table and "not measured" in table
    assert set(TARGETS) == set(summary["targets"])


def test_every_part_lists_real_items_that_fit_its_time():
    assert set(WEIGHTS) == set(PARTS) and set(DEFAULT_PARTS) < set(PARTS)
    for part in PARTS:
        items = items_of(part, Sizes())
        names = [item.name for item in items]
        assert len(set(names)) == len(names)
        dry = [item.name for item in items_of(part, DRY)]
        assert dry and set(dry) < set(names)
        # In the eight minutes that are the default, each part's first item gets its turn.
        if part in DEFAULT_PARTS:
            assert items[0].seconds < 8 * 60 * WEIGHTS[part]
    for item in items_of("tune", Sizes()):
        assert len(item.run.args[1].configs) < MOST


def test_short_items_run_through_on_a_cpu(folder):
    ceilings = [item for item in items_of("kernels", DRY) if item.name == "ceilings"]
    sixteen = [item for item in items_of("precision", DRY) if "16 bits" in item.name]
    assert work(record_of(folder), [*ceilings, *sixteen], DRY, NEVER, silent) == 0
    kept = folder.read("kernels")["items"]
    assert kept[ceilings[0].name]["result"]["product_tflops"] > 0
    assert kept[sixteen[0].name]["result"]["int8_by_torch"]["tera_operations"] > 0


def test_the_script_for_a_bare_machine_takes_along_what_the_parts_import():
    script = (Path(__file__).parents[2] / "examples" / "gpu_machine.sh").read_text()
    taken = set(re.search(r'^PACKAGES="(.*)"', script, re.MULTILINE)[1].split())
    code = f"""
import importlib.metadata, sys
for module in {sorted(PARTS.values())}:
    importlib.import_module(module)
found = importlib.metadata.packages_distributions()
tops = {{name.partition(".")[0] for name in sys.modules}}
print(*{{package for top in tops for package in found.get(top, ())}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ours = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    # torch and Triton are there, accelerate and what these bring come with them or by themselves.
    brought = {"torch", "triton", "accelerate", "numpy", "packaging", "huggingface-hub", "pillow"}
    assert ours & set(done.stdout.split()) <= taken | brought


def test_the_watch_keeps_what_a_card_tells_of_each_measurement(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = ("1000, 70.5, 40, 10", "[N/A], 1, 2, 3", "1980, 700, 50, 100")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{x}'\n" for x in lines) + "exec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = []
    with GpuWatch() as watch:
        while sum(each["samples"] for each in found) < 2:  # the test's limit ends it
            found += [each] if (each := watch.seen()) else []
        assert watch.seen() is None, "each measurement has its own"
    assert min(each["sm_mhz"][0] for each in found) == 1000
    assert max(each["power_w"][2] for each in found) == 700, (
        "and lines that are no numbers are left"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with GpuWatch() as watch:
        assert watch.seen() is None


def test_the_script_for_a_bare_machine_hands_its_options_on(tmp_path):
    script = str(Path(__file__).parents[2] / "examples" / "gpu_machine.sh")
    done = subprocess.run(["sh", script], capture_output=True, text=True)
    assert done.returncode == 2 and "gpu_machine.sh bench [options]" in done.stderr
    variables = os.environ | {"PYTHON": sys.executable, "SITE": str(tmp_path / "site")}
    command = ["sh", script, "bench", "--part", "kernel", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and "no part is called 'kernel'" in done.stderr


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(tmp_path, monkeypatch, capfd):
    from vidaccel.cli import main as cli

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "results"
    command = ["bench", "gpu", "--dry", "--out", str(out), "--part", ",".join(PARTS)]
    assert cli.main(command) == 0, capfd.readouterr().err[-3000:]
    for part in PARTS:
        items = json.loads((out / f"{part}.json").read_text())["items"]
        assert {each["status"] for each in items.values()} == {"done"}
        assert set(items) == {item.name for item in items_of(part, DRY)}
    assert "a dry run: its times say nothing" in capfd.readouterr().out
