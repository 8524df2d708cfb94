"""`vidaccel policies`: what a user's own runs have left, listed, shown, moved and deleted."""

import json

import pytest

from tiny.policies import parse, valid
from vidaccel.plans import user_folder
from vidaccel.plans.measured import MeasuredClip
from vidaccel.plans.policy import CachePolicy


@pytest.fixture
def learned():
    """A learned policy in the user's folder."""
    policy = parse(valid()).model_copy(update={"provenance": "learned"})
    return user_folder.save(policy)


def test_an_empty_folder_says_how_to_fill_it(run):
    code, stdout, _ = run("policies")
    assert code == 0 and 'policy="learn"' in stdout


def test_list_and_show(run, learned):
    for action in ([], ["list"]):
        code, stdout, _ = run("policies", *action)
        assert code == 0 and learned.name in stdout and "learned" in stdout
    code, stdout, _ = run("policies", "show", learned.name[:12])
    assert code == 0 and "budget" in stdout


def test_what_was_measured_is_listed_shown_and_exported(run, learned, tmp_path):
    policy = CachePolicy.load(learned)
    budget = policy.budgets()[0]
    plan = policy.plan(budget=budget)
    for seed, psnr in ((0, 44.0), (1, 31.5)):
        record = MeasuredClip.of(plan, "a red circle", seed, psnr=psnr, ssim=0.912, speedup=2.25)
        user_folder.add_measured(policy, record)
    _, stdout, _ = run("policies")
    assert "measured on 2 clips" in stdout
    _, stdout, _ = run("policies", "show", learned.stem)
    assert "37.8 dB" in stdout  # their mean
    rows = stdout[stdout.index("beside plain clips") :].splitlines()[2:]
    assert [row.split()[0] for row in rows] == [str(budget)] * 2
    assert "31.5 dB" in rows[0] and "0.912" in rows[0] and "2.25x" in rows[0]
    out = tmp_path / "mine.json"
    run("policies", "export", learned.stem, str(out))
    (row,) = CachePolicy.load(out).validation
    assert (row.budget, row.psnr, row.worst_psnr) == (budget, 37.75, 31.5)
    run("policies", "delete", learned.stem)
    assert not list(user_folder.folder().glob("measured/*"))


def test_export_and_add(run, learned, tmp_path):
    out = tmp_path / "mine.json"
    code, _, _ = run("policies", "export", learned.stem, str(out))
    assert code == 0 and CachePolicy.load(out) == CachePolicy.load(learned)
    learned.unlink()
    code, _, _ = run("policies", "add", str(out))
    assert code == 0 and learned.exists()


def test_delete(run, learned):
    code, _, stderr = run("policies", "delete")
    assert code == 2 and "--all" in stderr and learned.exists()
    measured = user_folder.save(parse({**valid(), "width": 64}))
    damaged = learned.with_name("WanTransformer3DModel-broken.json")
    damaged.write_text("{")
    code, stdout, _ = run("policies", "delete", "--all")
    assert code == 0 and learned.name in stdout
    assert not learned.exists() and measured.exists() and damaged.exists()
    code, _, _ = run("policies", "delete", measured.stem)
    assert code == 0 and not measured.exists()


def test_what_cannot_be_used_is_told(run, learned):
    learned.with_name("WanTransformer3DModel-broken.json").write_text(json.dumps({"a": 1}))
    code, stdout, _ = run("policies")
    assert code == 0 and "cannot be used" in stdout and learned.name in stdout


@pytest.mark.parametrize(
    "words", [["show", "nothing"], ["export", "nothing", "x.json"], ["add", "nothing.json"]]
)
def test_what_is_not_there_is_one_line(run, words):
    code, _, stderr = run("policies", *words)
    assert code == 2 and stderr.count("\n") == 1
