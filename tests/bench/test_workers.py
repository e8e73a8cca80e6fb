"""Work side by side in processes of their own, and its end."""

import multiprocessing
import os
import select
import subprocess
import time

import pytest
import torch

from bench.harness.workers import results, run_within


def test_every_job_runs_and_one_that_fails_costs_no_other(tmp_path):
    (tmp_path / "b").mkdir()
    run_within(60, os.mkdir, [(tmp_path / name,) for name in "abc"], count=2)  # of which b is there already
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_after_a_job_that_fails_no_other_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    jobs = [(tmp_path,), *((tmp_path / str(index),) for index in range(40))]  # the first is there already
    ended = []
    with pytest.raises(FileExistsError):
        results(make_slowly, jobs, torch.device("cpu"), ended.append)
    assert ended == []
    assert not (tmp_path / "39").exists()


def make_slowly(folder):
    time.sleep(0.05)
    folder.mkdir()


def test_what_runs_too_long_is_ended(tmp_path):
    begin = time.perf_counter()
    run_within(0.2, time.sleep, [(120,), (120,)], count=1)
    assert time.perf_counter() - begin < 60
    assert multiprocessing.active_children() == []


def test_with_a_process_ends_what_it_has_started(monkeypatch, tmp_path):
    fifo, later = tmp_path / "fifo", tmp_path / "later"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def wait_for_its_child(*_):
        assert select.select([reading], [], [], 60)[0]
        return []  # as when the time is over

    monkeypatch.setattr("bench.harness.workers.connection.wait", wait_for_its_child)
    jobs = [(["sh", "-c", f"exec >{fifo}; echo begun; sleep 120"],), (["touch", str(later)],)]
    run_within(60, subprocess.run, jobs, count=1)
    assert multiprocessing.active_children() == []
    assert not later.exists()
    assert os.read(reading, 100) == b"begun\n"
    poll = select.poll()
    poll.register(reading, 0)
    assert poll.poll(10_000) == [(reading, select.POLLHUP)]  # nobody holds the other end any more
    os.close(reading)


def test_an_interrupt_ends_the_processes_too(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.harness.workers.connection.wait", interrupt)
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_within(60, time.sleep, [(120,)], count=1)
    assert time.perf_counter() - begin < 60
    assert multiprocessing.active_children() == []
