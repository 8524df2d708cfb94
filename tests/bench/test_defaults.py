"""The grid of settings: every setting is measured once, auto beside others at equal time."""

import json

import pytest

from tiny.building import prompted
from tiny.wan import wan
from vidaccel.api import engines_of
from vidaccel.bench import defaults as module
from vidaccel.bench.defaults import (
    AUTO,
    EVEN,
    DefaultsResult,
    defaults,
    defaults_table,
)
from vidaccel.bench.grid import GRID, SCHEDULERS, Setting, scheduler_of
from vidaccel.cli.main import main
from vidaccel.errors import BenchError

SMALL = [Setting("Euler", 1.0, 8, 1.0), Setting("UniPC", 3.0, 8, 5.0)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small grid, its folder, and the pipeline."""
    case, folder = prompted(wan()), tmp_path_factory.mktemp("grid")
    for name in ("num_inference_steps", "guidance_scale", "generator", "output_type"):
        case.call.pop(name, None)
    options = {"workdir": folder, "methods": ["FirstBlockCache"], "progress": False}
    before = case.pipe.scheduler
    result = defaults(case.pipe, case.call, ["a", "bb"], SMALL, **options)
    assert case.pipe.scheduler is before and not engines_of(case.pipe)
    return case, folder, options, result


def test_the_grid_is_a_balanced_subset():
    for steps in (16, 30, 50, 100):
        block = [setting for setting in GRID if setting.steps == steps]
        assert {s.scheduler for s in block} == set(SCHEDULERS) and len(block) == 3
        assert {s.shift for s in block} == {1.0, 3.0, 7.0}
        assert {s.guidance for s in block} == {1.0, 5.0, 9.0}
    assert len({(s.scheduler, s.shift) for s in GRID[:9]}) == 9
    assert len({str(setting) for setting in GRID}) == 12


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_takes_its_shift(name):
    levels = []
    for shift in (1.0, 7.0):
        scheduler = scheduler_of(Setting(name, shift, 10, 1.0))
        scheduler.set_timesteps(10)
        levels.append(float(scheduler.sigmas[5]))
    assert levels[0] < 0.6 < 0.8 < levels[1]


def test_every_setting_has_auto_beside_others(measured):
    *_, result = measured
    assert [cell.setting for cell in result.cells] == [str(setting) for setting in SMALL]
    for cell in result.cells:
        assert cell.budgets == {"2": 4, "3": 3} and cell.cpu_speedups.keys() == {"2", "3"}
        for found in cell.at_equal_time.values():
            assert AUTO in found and found[AUTO].psnr >= found[AUTO].worst_psnr
        assert {point.method for point in cell.points} >= {AUTO, EVEN, "FirstBlockCache"}
    for rows in result.standings().values():
        assert rows[AUTO].settings == 2
        means = [row.psnr for row in rows.values()]
        assert means == sorted(means, reverse=True)
    table = defaults_table(result)
    assert AUTO in table and str(SMALL[1]) in table
    file = json.dumps(result.to_dict(), allow_nan=False)
    assert DefaultsResult.from_dict(json.loads(file)) == result


def test_a_finished_grid_is_read_again(measured, monkeypatch):
    case, _, options, result = measured

    def never(*args, **arguments):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(module, "quality", never)
    again = defaults(case.pipe, case.call, ["a", "bb"], SMALL, **options)
    assert again.cells == result.cells


def test_the_folder_of_another_grid_is_refused(measured):
    case, _, options, _ = measured
    with pytest.raises(BenchError, match="its seed differs"):
        defaults(case.pipe, case.call, ["a"], SMALL, **options, seed=1)
    with pytest.raises(BenchError, match="needs a prompt and a setting"):
        defaults(case.pipe, case.call, [], SMALL)


def test_the_figure(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from vidaccel.bench.figures import draw_defaults

    *_, result = measured
    assert isinstance(result, DefaultsResult)
    draw_defaults(result, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_the_command(capsys):
    code = main(["bench", "defaults", "--list", "--only", "16 steps"])
    assert code == 0 and len(capsys.readouterr().out.splitlines()) == 3
    code = main(["bench", "defaults", "--only", "17 steps"])
    assert code == 2 and "no setting holds '17 steps'" in capsys.readouterr().err
