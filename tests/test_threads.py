"""How many threads compute, beside other processes and alone."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from srlm_cli import threads
from srlm_cli.threads import ThreadCount


def run(shares: list[ThreadCount], cores: float, looks: int) -> None:
    """Let processes compute for some looks as a fair system schedules them."""
    for _ in range(looks):
        part = min(1.0, cores / sum(share.threads for share in shares))
        used = [share.threads * part for share in shares]
        for share, cores_used in zip(shares, used, strict=True):
            share.look(cores_used, max(0.0, cores - sum(used)))


@pytest.mark.parametrize("cores, processes, each", [(2, 2, 1), (16, 2, 8), (16, 3, 5), (2, 3, 1), (64, 4, 16)])
def test_processes_at_once_divide_the_cores(cores, processes, each):
    shares = [ThreadCount(cores) for _ in range(processes)]
    run(shares, cores, 20)
    assert [share.threads for share in shares] == [each] * processes


def test_a_process_alone_keeps_all_cores_and_gets_them_back():
    first, second = ThreadCount(16), ThreadCount(16)
    run([first], 16, 10)
    assert first.threads == 16
    run([first, second], 16, 10)
    assert first.threads == 8
    run([first], 16, 10)
    assert first.threads == 16


def test_work_between_the_products_does_not_cost_a_thread():
    share = ThreadCount(2)
    for _ in range(20):
        share.look(used=1.6, idle=0.4)
    assert share.threads == 2


def test_one_that_gets_hardly_any_core_keeps_a_thread():
    count = ThreadCount(4)
    assert [count.look(used=0.1, idle=0.0) for _ in range(4)] == [2, 1, 1, 1]


def test_one_that_waited_for_rows_comes_back_to_a_part_of_the_cores():
    first, waiting = ThreadCount(16), ThreadCount(16)
    waiting.look(used=0.0, idle=0.0)
    assert waiting.threads == 8
    run([first, waiting], 16, 20)
    assert first.threads + waiting.threads == 16
    assert waiting.threads >= 5


def test_a_core_that_is_idle_for_a_moment_is_left():
    share = ThreadCount(2)
    share.look(used=1.0, idle=0.0)
    for _ in range(5):
        share.look(used=1.0, idle=0.9)
        share.look(used=1.0, idle=0.9)
        share.look(used=1.0, idle=0.0)
    assert share.threads == 1


@pytest.mark.parametrize("own, autogroup, free", [(0, "0", 7), (-5, None, 7), (10, "0", 2), (0, "1", 2)])
def test_a_core_of_a_process_of_lower_priority_is_free(own, autogroup, free, monkeypatch, tmp_path):
    if autogroup:
        (tmp_path / "autogroup").write_text(f"{autogroup}\n")
    core = SimpleNamespace(user=9.0, system=9.0, nice=5.0, idle=1.5, iowait=0.5)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [core])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "nice", lambda by: own)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(threads, "AUTOGROUP", tmp_path / "autogroup")
    assert threads._now()[2] == free


BUSY = "while True: pass"
COMPUTE = """
import sys, time, torch
from srlm_cli import threads

net = torch.nn.Linear(64, 64)
net.get_input_embeddings = lambda: net
threads.share_cores(net)
started = most = torch.get_num_threads()
big = torch.ones(512, 512)
lowest, end = most, time.monotonic() + 60
while lowest == started and time.monotonic() < end:
    net(torch.ones(1, 64)), big @ big
    lowest = torch.get_num_threads()
print(started, lowest, flush=True)
"""
COME_BACK = """
end = time.monotonic() + 60
while torch.get_num_threads() < most and time.monotonic() < end:
    net(torch.ones(1, 64)), big @ big
print(torch.get_num_threads(), flush=True)
"""


@pytest.mark.slow  # it takes all cores for seconds
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to share")
def test_threads_make_way_for_busy_processes_unless_they_were_chosen():
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0) for _ in range(2)]
    try:
        out = subprocess.run([sys.executable, "-c", COMPUTE], env=free, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    started, lowest = map(int, out.stdout.split())
    assert started > 1
    assert lowest < started


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to share")
def test_threads_come_back_when_the_others_have_ended():
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0) for _ in range(2)]
    try:
        argv = [sys.executable, "-c", COMPUTE + COME_BACK]
        with subprocess.Popen(argv, env=free, stdout=subprocess.PIPE, text=True) as computing:
            started, lowest = map(int, computing.stdout.readline().split())
            for process in busy:
                process.kill()
            back = int(computing.stdout.readline())
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert lowest < started == back


def test_a_second_model_is_watched_too_when_one_thread_is_left(monkeypatch):
    import torch

    class Net(torch.nn.Linear):
        def get_input_embeddings(self):
            return self

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_watch", threads.Watch(2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    net = Net(2, 2)
    threads.share_cores(net)
    assert net._forward_pre_hooks


def test_threads_that_were_chosen_stay(monkeypatch):
    import torch

    class Net(torch.nn.Linear):
        def get_input_embeddings(self):
            return self

    net = Net(2, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.share_cores(net)
    assert not net._forward_pre_hooks
