"""Where training runs: device, precision, processes, memory, signals and compilation."""

import ctypes
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from torch import nn

from phreg.backbones.base import Backbone
from phreg.config import DistillConfig
from phreg.errors import PhregError
from phreg.processes import TIMEOUT
from phreg.progress import tell_stopping
from phreg.training.checkpoint import RunFolder
from phreg.training.launch import launched_precision

logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Signals that end a run with a checkpoint. Slurm and submitit send SIGUSR1 or SIGUSR2."""


def start_accelerator(config: DistillConfig, run: RunFolder) -> Accelerator:
    """Sets up device, precision, processes and trackers as configured, and a CPU's memory.

    Raises:
        PhregError: A tracker's package is not installed, or frozen weights are to be in bf16 and the rest is
            not computed in it.
    """
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise PhregError(
                f'trackers asks for {tracker}, which is not installed; run: pip install "phreg[{tracker}]"'
            )
    on_cpu = config.device == "cpu" or not (torch.accelerator.is_available() or config.device)
    asked = launched_precision(config)
    precision = asked or ("bf16" if computes_bf16("cpu" if on_cpu else "cuda") else "fp32")
    if config.frozen_dtype == "bf16" and precision != "bf16":
        chosen = f"is {precision}" if asked else f"is {precision}, as this machine's hardware has it"
        raise PhregError(
            f"frozen_dtype = bf16 keeps weights as bf16 products round them, and precision {chosen}; "
            "use --precision bf16 too, or leave frozen_dtype at fp32"
        )
    # A process may distil more than once; accelerate would keep the first run's precision and device.
    AcceleratorState._reset_state(reset_partial_state=True)
    # The environment is the one place where accelerate takes a device such as cuda:1. phreg shards by itself.
    asked_of_accelerate = {"accelerate_use_fsdp": "false"}
    if config.device:
        asked_of_accelerate["accelerate_torch_device"] = config.device
    with patch_environment(**asked_of_accelerate):
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            project_dir=run.path,
        )
    if on_cpu and config.keep_freed_memory:
        keep_freed_memory()
    return accelerator


@contextmanager
def deterministic_kernels(*, wanted: bool) -> Iterator[None]:
    """Makes torch use only deterministic kernels inside the context, if wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def computes_bf16(device_type: str) -> bool:
    """Says whether a device multiplies matrices in bf16 natively. Emulation is slower than fp32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in the process, if glibc is the allocator.

    By default glibc returns large freed tensors to the kernel, and their pages are faulted in again. The cost
    grows with the size of the tensors (benchmarks/throughput). With this setting, the process holds its peak
    memory until it ends.

    Returns:
        Whether the setting was made.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # option numbers, from malloc.h
    made = [libc.mallopt(trim_threshold, -1), libc.mallopt(top_pad, 512 << 20), libc.mallopt(mmap_max, 0)]
    logger.debug("freed memory stays in the process (keep_freed_memory)")
    return all(made)


AGAIN = 1.0
"""Seconds after which another Ctrl-C is a second one. Launchers send the first one on, so it comes twice."""


class _StopRequest:
    """Handles signals: the first sets an event and is told of; a second Ctrl-C interrupts at once."""

    def __init__(self, event: threading.Event) -> None:
        self._event, self._process, self._first = event, os.getpid(), 0.0

    def __call__(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a forked reader of images, which ends with this process
            return
        if not self._event.is_set():
            self._event.set()
            self._first = time.monotonic()
            tell_stopping()
        elif number == signal.SIGINT and time.monotonic() - self._first > AGAIN:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turns `STOP_SIGNALS` into an event while the loop runs. Only the main thread gets signals.

    Raises:
        KeyboardInterrupt: Ctrl-C came a second time.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    ask = _StopRequest(event)
    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def compiled(wanted: bool, *backbones: Backbone) -> Iterator[None]:
    """Compiles the blocks of backbones inside the context.

    Blocks are compiled one by one. They are alike, so compilation is short, and hooks around them (registers,
    taps) stay outside. Blocks with hooks inside (test-time registers) are left out: alike blocks share
    compiled code, so a block would get the hooks of another.
    """
    blocks = [block for backbone in backbones for block in backbone.blocks if not _hooked_inside(block)]
    if not wanted:
        blocks = []
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _hooked_inside(block: nn.Module) -> bool:
    return any(
        module._forward_pre_hooks or module._forward_hooks
        for module in block.modules()
        if module is not block
    )
