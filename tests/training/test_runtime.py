import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator

from phreg.backbones import resolve
from phreg.config import DistillConfig
from phreg.errors import (
    PhregError,
)
from phreg.progress import told_to
from phreg.training import runtime
from phreg.training.checkpoint import RunFolder


def test_signals_outside_the_main_thread_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with runtime.stop_signals() as event:
            seen.append(event.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_sets_the_event_while_it_lasts_and_its_handler_comes_back(number):
    before = signal.getsignal(number)
    with runtime.stop_signals() as event:
        assert not event.is_set()
        os.kill(os.getpid(), number)
        assert event.wait(5)
    assert signal.getsignal(number) is before


@pytest.fixture
def told():
    """Counts how often it is told that the run will stop."""
    heard = []
    with told_to(lambda *_: None, lambda: heard.append("stopping")):
        yield heard


def test_the_first_signal_is_told_at_once_and_a_second_ctrl_c_interrupts(told, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    with runtime.stop_signals() as event:
        signal.raise_signal(signal.SIGINT)
        assert event.is_set()
        assert told == ["stopping"]
        now[0] += runtime.AGAIN / 2  # a launcher sends the first one on
        signal.raise_signal(signal.SIGINT)
        now[0] += runtime.AGAIN
        signal.raise_signal(signal.SIGTERM)  # which is no second Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert told == ["stopping"]


def test_a_reader_process_that_was_forked_leaves_signals_to_the_run(told):
    with runtime.stop_signals() as event:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(int(event.is_set()) + 2 * len(told))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# What an accelerator is started with, by what is asked for and what there is.
STARTS = [
    ({}, {"gpu": False, "bf16": "cuda"}, {"cpu": True, "mixed_precision": "no"}),
    ({}, {"gpu": False, "bf16": "cpu"}, {"cpu": True, "mixed_precision": "bf16"}),
    ({}, {"gpu": True, "bf16": "cuda"}, {"cpu": False, "mixed_precision": "bf16"}),
    ({}, {"gpu": True, "bf16": "cpu"}, {"cpu": False, "mixed_precision": "no"}),
    ({"device": "cpu"}, {"gpu": True, "bf16": "cuda"}, {"cpu": True, "mixed_precision": "no"}),
    ({"device": "cuda:1"}, {"gpu": False, "bf16": "cuda"}, {"cpu": False, "mixed_precision": "bf16"}),
    ({"precision": "fp32"}, {"gpu": True, "bf16": "cuda"}, {"cpu": False, "mixed_precision": "no"}),
    ({"precision": "bf16"}, {"gpu": False, "bf16": None}, {"cpu": True, "mixed_precision": "bf16"}),
    ({"trackers": ("tensorboard",)}, {"gpu": False, "bf16": None}, {"log_with": ["tensorboard"]}),
    ({}, {"gpu": False, "bf16": None}, {"log_with": None, "device": None}),
    ({"device": "cuda:1"}, {"gpu": True, "bf16": None}, {"device": "cuda:1"}),
]


@pytest.mark.parametrize(("asked", "there", "expected"), STARTS, ids=str)
def test_device_and_precision_are_those_asked_for_or_the_best_there_are(
    asked, there, expected, tmp_path, monkeypatch
):
    started, one = {}, Accelerator(cpu=True)

    def accelerator(**arguments):
        started.update(arguments, device=os.environ.get("ACCELERATE_TORCH_DEVICE"))
        return one

    kept = []
    monkeypatch.setattr(runtime, "Accelerator", accelerator)
    monkeypatch.setattr(runtime, "computes_bf16", lambda device: device == there["bf16"])
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there["gpu"])
    runtime.start_accelerator(DistillConfig(**asked), RunFolder(tmp_path))
    assert {key: started[key] for key in expected} == expected
    assert started["project_dir"] == tmp_path
    assert bool(kept) == started["cpu"], "a CPU's memory is kept"
    kept.clear()
    runtime.start_accelerator(DistillConfig(**asked, keep_freed_memory=False), RunFolder(tmp_path))
    assert kept == []


@pytest.mark.parametrize(
    ("launched", "asked", "expected"),
    [("bf16", {}, "bf16"), ("bf16", {"precision": "fp32"}, "no"), ("no", {"precision": "bf16"}, "bf16")],
    ids=str,
)
def test_accelerates_precision_is_honoured_where_no_flag_asks_for_another(
    launched, asked, expected, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(runtime, "computes_bf16", lambda _device: False)
    config = DistillConfig(device="cpu", keep_freed_memory=False, **asked)
    assert runtime.start_accelerator(config, RunFolder(tmp_path)).mixed_precision == expected


def test_deterministic_runs_ask_for_it_everywhere_while_they_last(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with runtime.deterministic_kernels(wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with runtime.deterministic_kernels(wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # as cuBLAS documents it
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_tracker_that_is_not_installed_is_an_error_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PhregError, match=r'asks for wandb, .* pip install "phreg\[wandb\]"'):
        runtime.start_accelerator(DistillConfig(trackers=("wandb",)), RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(True, False, True), (False, True, True), (False, False, False), (True, True, True)],
)
def test_a_cpu_computes_bf16_by_either_of_its_extensions_and_a_gpu_without_emulation(
    avx512, amx, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert runtime.computes_bf16("cpu") == expected
    assert runtime.computes_bf16("cuda") is False


class Libc:
    """A C library that notes what it is told."""

    def __init__(self, **functions):
        self.options = []
        self.__dict__ |= functions

    def mallopt(self, option, value):
        self.options.append((option, value))
        return 1


def test_keeping_freed_memory_tells_glibc_so_and_no_other_library(monkeypatch):
    glibc, musl = Libc(gnu_get_libc_version=lambda: b"2.39"), Libc()
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _name: glibc)
    assert runtime.keep_freed_memory() is True
    # M_TRIM_THRESHOLD never; M_TOP_PAD half a gigabyte; M_MMAP_MAX none (malloc.h, mallopt(3)).
    assert glibc.options == [(-1, -1), (-2, 2**29), (-4, 0)]
    glibc.mallopt = lambda option, _value: int(option != -2)
    assert runtime.keep_freed_memory() is False, "one of them was refused"
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _name: musl)
    assert runtime.keep_freed_memory() is False
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _name: glibc)
    assert runtime.keep_freed_memory() is False
    assert musl.options == []


def test_blocks_are_compiled_while_it_lasts_but_for_those_with_hooks_inside(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: ("compiled", forward))
    first, second = resolve.adapt(tiny()), resolve.adapt(tiny())
    blocks = [*first.blocks, *second.blocks]
    blocks[0].register_forward_pre_hook(lambda *_: None)  # on the block itself, not inside
    blocks[1].mlp.register_forward_hook(lambda *_: None)
    blocks[2].mlp.register_forward_pre_hook(lambda *_: None)
    own = blocks[3].forward = blocks[3].forward
    with runtime.compiled(True, first, second):
        compiled = [isinstance(block.forward, tuple) for block in blocks]
        assert compiled == [True, False, False, True, True, True]
    assert blocks[3].forward is own
    assert ["forward" in block.__dict__ for block in blocks] == [False, False, False, True, False, False]
    with runtime.compiled(False, first, second):
        assert not any(isinstance(block.forward, tuple) for block in blocks)


def test_blocks_are_as_they_were_after_an_error_too(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward: ("compiled", forward))
    backbone = resolve.adapt(tiny())
    with pytest.raises(KeyError), runtime.compiled(True, backbone):
        raise KeyError
    assert not any("forward" in block.__dict__ for block in backbone.blocks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_keeping_freed_memory_saves_page_faults():
    probe = (
        "import resource, torch; from phreg.training.runtime import keep_freed_memory\n"
        "assert {keep} is False or keep_freed_memory()\n"
        "def allocate(times):\n"
        "    for _ in range(times): torch.ones(16_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "print(-allocate(10) + allocate(10))"
    )
    faults = []
    for keep in (False, True):
        python = [sys.executable, "-c", probe.format(keep=keep)]
        faults.append(int(subprocess.run(python, check=True, capture_output=True, text=True).stdout))
    # 10 tensors of 64 MB fault in their pages anew each time; kept, once more at most.
    assert faults[0] > 250
    assert faults[1] <= 0.2 * faults[0]
