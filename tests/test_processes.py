"""Two processes on one machine (gloo), launched without a launcher that would watch over them."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from phreg import processes

PRELUDE = """
import os, sys, time, logging
logging.basicConfig(format="%(message)s")
import torch, torch.distributed as dist
from phreg import processes
from phreg.processes import in_shares, on_main, watched
dist.init_process_group("gloo", timeout=processes.TIMEOUT)
rank = dist.get_rank()
"""


def start(code, *arguments, number=2):
    """Starts a program in several processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(number)
    ]  # fmt: skip


def ends(started, seconds=60):
    """Waits for all processes; returns their exit statuses and errors."""
    try:
        outputs = [one.communicate(timeout=seconds) for one in started]
    finally:
        for one in started:
            one.kill()
    return [(one.returncode, out, error) for one, (out, error) in zip(started, outputs, strict=True)]


def test_one_process_makes_everything_itself():
    assert processes.on_main(lambda: 3) == 3
    assert processes.in_shares(3, lambda index: index**2) == [0, 1, 4]
    with pytest.raises(KeyError), processes.watched("go on"):
        raise KeyError


def test_what_one_makes_all_get_and_shares_come_together_in_order():
    code = """
    made = []
    assert torch.equal(on_main(lambda: made.append("main") or torch.arange(3)), torch.arange(3))
    squares = in_shares(5, lambda index: made.append(index) or (index, torch.tensor(index ** 2)))
    assert [index for index, _ in squares] == [0, 1, 2, 3, 4]
    assert [int(square) for _, square in squares] == [0, 1, 4, 9, 16]
    assert made == (["main", 0, 2, 4] if rank == 0 else [1, 3]), made
    assert in_shares(1, lambda index: index) == [0]  # fewer things than processes
    dist.destroy_process_group()  # as a run does; gloo may abort a process that outlives the other without it
    """
    assert [(status, error) for status, _, error in ends(start(code))] == [(0, ""), (0, "")]


def test_a_process_that_fails_ends_the_one_that_waits_for_it_with_its_reason():
    code = """
    with watched("go on: phreg distill --resume"):
        if rank == 1:
            time.sleep(2)
            raise ValueError("no such thing")
        time.sleep(1000)  # stands for a collective that nothing interrupts
    """
    began = time.monotonic()
    (waiting, _, told), (failing, _, own) = ends(start(code))
    assert time.monotonic() - began < 60
    assert (waiting, failing) == (1, 1)
    assert "process 1 failed: ValueError: no such thing" in told
    assert "go on: phreg distill --resume" in told
    assert "Traceback" not in told
    assert "ValueError: no such thing" in own


def test_a_process_that_is_killed_is_missed_by_its_silence(monkeypatch):
    code = """
    processes.SILENT, processes.GRACE, processes.BEAT = 4, 1, .5
    with watched("go on: phreg distill --resume"):
        print("ready", flush=True)
        time.sleep(1000)
    """
    waiting, killed = started = start(code)
    try:
        for one in started:
            assert one.stdout.readline() == "ready\n"
        time.sleep(1.5)  # for a heartbeat
        killed.send_signal(signal.SIGKILL)
        (status, _, told), _ = ends(started)
    finally:
        waiting.kill()
    assert status == 1
    assert "process 1 has given no sign of life for 4 s" in told
    assert processes.SILENT + processes.GRACE + 2 * processes.BEAT < 60, "as it is outside of this test"


def test_a_broken_collective_says_that_another_process_has_ended():
    code = """
    with watched("go on: phreg distill --resume"):
        if rank == 1:
            os._exit(9)
        dist.barrier()
    """
    (status, _, told), (died, _, _) = ends(start(code))
    assert (status, died) == (1, 9)
    assert "PhregError: process 0 of 2 lost the others" in told
    assert "go on: phreg distill --resume" in told


def test_errors_of_all_at_once_and_quiet_ends_are_left_to_each_process():
    code = """
    for failing in (False, True):
        with watched("go on"):
            if failing:
                raise ValueError("met by all")
        with watched("go on"):  # the next run of the same processes
            dist.barrier()
    """
    for status, _, told in ends(start(code)):
        assert status == 1
        assert "ValueError: met by all" in told
        assert "see that process's own message" not in told


def test_tensors_of_another_gpu_arrive_on_this_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    restored = []
    monkeypatch.setattr(
        torch.serialization,
        "default_restore_location",
        lambda storage, where: restored.append(where) or storage,
    )
    packed = processes._pack({"a": torch.ones(2)})
    load = torch.load

    def from_gpu(file, map_location, weights_only):
        return load(
            file, map_location=lambda storage, _: map_location(storage, "cuda:0"), weights_only=weights_only
        )

    monkeypatch.setattr(torch, "load", from_gpu)
    assert torch.equal(processes._unpack(packed)["a"], torch.ones(2))
    assert restored == ["cuda:1"]
