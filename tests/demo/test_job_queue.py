"""The queue of jobs: order, limits, and what becomes of a job that fails."""

import threading
import time

import pytest

from tiny.demo import ME, YOU, progress_of, saved_run, settings, until
from vidaccel.demo import job_queue
from vidaccel.demo.job_queue import JobQueue
from vidaccel.demo.run_store import RunStore
from vidaccel.demo.settings import Limits, with_one_plan
from vidaccel.demo.worker import Worker
from vidaccel.errors import ModelError, QueueFullError
from vidaccel.plans.policy import CachePolicy
from vidaccel.plans.shipped import shipped_policies


def test_the_queue_is_bounded_and_keeps_its_order(queue):
    running = queue.submit(ME, settings(steps=60))
    until(lambda: running.progress.state == "running")
    first, second = queue.submit(YOU, settings(seed=1)), queue.submit(ME, settings(seed=2))
    assert (first.progress.ahead, second.progress.ahead) == (1, 2)
    with pytest.raises(QueueFullError, match="2 runs are waiting already"):
        queue.submit(YOU, settings())
    queue.stop(first)
    assert first.progress.message == "taken out of the queue"
    assert second.progress.ahead == 1
    queue.stop(running)
    assert progress_of(queue, running)[-1].state == "stopped"
    assert progress_of(queue, second)[-1].state == "done"


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ({"steps": None}, "50 steps: this page takes 8 at most"),
        ({"frames": None}, "81 frames: this page takes 9 at most"),
        ({"width": None, "height": None}, "832x480 has more pixels than 64x64"),
    ],
    ids=str,
)
def test_what_is_left_to_the_model_is_bounded_too(queue, left_out, message):
    queue.limits = Limits(width=64, height=64, frames=9, steps=8)
    progress = progress_of(queue, queue.submit(ME, settings(**left_out)))
    assert progress[-1].state == "failed" and message in progress[-1].message
    assert all(p.step == 0 for p in progress)


def test_a_run_that_nobody_waits_for_is_dropped(queue, monkeypatch):
    monkeypatch.setattr(job_queue, "ABANDONED_AFTER", -1.0)
    progress = progress_of(queue, queue.submit(ME, settings()))
    assert progress[-1].state == "stopped" and "nobody was waiting" in progress[-1].message


def test_a_run_that_somebody_asks_for_is_not(queue, monkeypatch):
    monkeypatch.setattr(job_queue, "ABANDONED_AFTER", 0.5)
    running = queue.submit(YOU, settings(steps=60))
    until(lambda: running.progress.step >= 1)
    waiting = queue.submit(ME, settings(compare=False))
    submitted = time.monotonic()
    until(lambda: queue.look(waiting) and time.monotonic() > submitted + 1)
    queue.stop(running)
    assert progress_of(queue, waiting)[-1].state == "done"


def test_each_change_has_a_number_and_each_clip_too(queue):
    progress = progress_of(queue, queue.submit(ME, settings()))
    numbers = [p.number for p in progress]
    assert numbers == sorted(set(numbers))
    assert (progress[-1].saves, len(progress[-1].saved.clips)) == (2, 2)


def test_the_words_of_a_refusal_are_shown_and_the_next_run_works(queue):
    progress = progress_of(queue, queue.submit(ME, settings(width=50)))
    assert progress[-1].state == "failed" and "divisible by" in progress[-1].message
    policy = CachePolicy.load(shipped_policies()["vidaccel--tiny-wan/50-steps.json"])
    text = with_one_plan(policy, 16).to_json()
    progress = progress_of(queue, queue.submit(ME, settings(policy=text)))
    assert progress[-1].state == "failed"
    assert "num_inference_steps: the policy is for 50, this run has 6" in progress[-1].message
    assert saved_run(queue, compare=False).clips


def test_a_model_that_does_not_load_is_reported_and_tried_again(pipe, tmp_path):
    answers = [ModelError("the disk is asleep"), ModelError("the disk is asleep"), pipe]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    queue = JobQueue(Worker(load, "some"), RunStore(tmp_path), Limits())
    progress = progress_of(queue, queue.submit(ME, settings(compare=False)))
    assert (progress[-1].state, progress[-1].message) == ("failed", "the disk is asleep")
    assert saved_run(queue, compare=False).clips
    queue.close()


def test_closing_stops_what_runs(pipe, tmp_path):
    queue = JobQueue(Worker(lambda: pipe, "tiny-wan"), RunStore(tmp_path), Limits())
    job = queue.submit(ME, settings(steps=90))
    until(lambda: job.progress.step >= 1)
    queue.close()
    assert job.progress.state == "stopped"
    assert queue._thread not in threading.enumerate()
