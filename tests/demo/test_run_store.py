"""The folder of saved runs."""

from tiny.demo import ME, PROMPT, YOU, progress_of, saved_run, settings
from vidaccel.demo.settings import Settings


def test_the_clip_carries_the_settings_that_make_it_again(queue, tmp_path):
    cache = {"threshold": 0.2, "max_consecutive": None}
    run = saved_run(
        queue, compare=False, seed=7, cache=cache, policy="all", prompt=PROMPT + ' = "é; #\\'
    )
    assert set(run.clips) == {"accelerated"}
    for path in (run.clips["accelerated"], run.path("run.json")):
        assert Settings.from_file(path) == run.settings
    assert queue.store.load(ME, run.id).settings == run.settings


def test_jobs_and_runs_belong_to_one_browser(queue):
    job = queue.submit(ME, settings(compare=False))
    run = progress_of(queue, job)[-1].saved
    assert queue.job(ME, job.id) is job and queue.job(YOU, job.id) is None
    assert [r.id for r in queue.store.of(ME)] == [run.id] and queue.store.of(YOU) == []
    assert queue.store.load(YOU, run.id) is None
    assert ME not in str(run.folder)
    for name in ("..", "../..", f"../{run.folder.parent.name}/{run.id}", "/etc", "", "a" * 99):
        assert queue.store.load(ME, name) is None


def test_old_runs_make_room(queue):
    queue.store.keep = 2
    for seed in range(3):
        saved_run(queue, compare=False, steps=2, seed=seed, policy="all")
    assert [r.settings.seed for r in queue.store.of(ME)] == [2, 1]
    assert len(list(queue.store.folder(ME).iterdir())) == 2
