"""What a training step costs: phreg's loop, the arithmetic it cannot do without, and the published loop.

All sides run in one process and take turns, so that whatever else the machine does slows them alike. phreg's
loop pauses where it reports a step, and there the others have their turn. A turn ends when the device is
done, and readers of images sleep while it is not their side's turn.

    loop ──reports a step──► [its readers sleep] floor ─► published [wake] ──► loop goes on

A turn is one step on a CPU, and several on a GPU, where the loop runs ahead of the device and would otherwise
be charged for every pause. Peak memory is measured in a process for each side.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sides import WARM_UP, Floor, Options, Side, distil, published, write_photos
from stopwatch import Reading, Stopwatch, per_step, read

import phreg
from phreg.training.runtime import compiled, computes_bf16, keep_freed_memory

SIDES = ("loop", "floor", "published")
STEPS = {"cpu": 20, "cuda": 64}
"""Timed steps of each side, where nothing else is asked for."""

Readings = dict[str, list[Reading]]


# -- taking turns --------------------------------------------------------------------------------------------


def take_turns(options: Options, photos: Sequence[Path], others: dict[str, Side]) -> Readings:
    """Lets phreg's loop and the other sides take turns.

    Returns:
        For each side a step's share of each turn, those of the warm-up left out.
    """
    turn, last = options.turn, options.turn * options.turns
    taken: Readings = {name: [] for name in ("loop", *others)}
    loop_readers: list[Any] = []
    resumed: Reading | None = None

    def pause(step: int) -> None:
        nonlocal resumed
        if step % turn or step > last:  # the step after the last turn is reported too
            return
        paused = read(options.device)
        if resumed is None:
            loop_readers.extend(active_children())
        else:
            taken["loop"].append(per_step(resumed, paused, turn))
        send(signal.SIGSTOP, loop_readers)
        for name, side in others.items():
            send(signal.SIGCONT, side.readers)
            started = read(options.device)
            for _ in range(turn):
                side.step()
            taken[name].append(per_step(started, read(options.device), turn))
            send(signal.SIGSTOP, side.readers)
        send(signal.SIGCONT, loop_readers)
        resumed = read(options.device)

    try:
        distil(options, photos, last + 1, pause)
    finally:  # nobody can end a process that sleeps
        send(signal.SIGCONT, active_children())
    # The loop's own first turn was over before the first pause, and was not timed.
    left_out = {name: WARM_UP[options.device] - (name == "loop") for name in taken}
    return {name: readings[left_out[name] :] for name, readings in taken.items()}


def send(number: signal.Signals, readers: Iterable[Any]) -> None:
    """Signals reader processes."""
    for process in readers:
        os.kill(process.pid, number)


def contest(options: Options, photos: Sequence[Path]) -> dict[str, Any]:
    """Times the sides in turns."""
    floor = Floor(options)
    others: dict[str, Side] = {"floor": floor}
    if options.published:
        others["published"] = published(options, photos)
    with compiled(options.compile, floor.original, floor.student):
        return figures(options, take_turns(options, photos, others))


def figures(options: Options, taken: Readings) -> dict[str, Any]:
    """Sums up: medians and quartiles over turns; ratios are of two sides in the same turn."""
    columns = {name: np.array(readings).T for name, readings in taken.items()}
    seconds = {name: column[0] for name, column in columns.items()}
    ratios = {"loop_to_floor": quartiles(seconds["loop"] / seconds["floor"])}
    if "published" in seconds:
        ratios["published_to_loop"] = quartiles(seconds["published"] / seconds["loop"])
    return {
        "images_per_second": {name: quartiles(options.batch_size / time) for name, time in seconds.items()},
        "seconds_per_step": {name: quartiles(time) for name, time in seconds.items()},
        "ratios": ratios,
        "page_faults_per_step": {name: quartiles(column[1]) for name, column in columns.items()},
        "system_seconds_per_step": {name: quartiles(column[2]) for name, column in columns.items()},
    }


def quartiles(values: Float[np.ndarray, " turns"]) -> dict[str, float]:
    """Takes median and quartiles."""
    names = ("lower_quartile", "median", "upper_quartile")
    return dict(zip(names, np.percentile(values, [25, 50, 75]).round(4).tolist(), strict=True))


# -- what takes further runs ---------------------------------------------------------------------------------


def details(options: Options, photos: Sequence[Path]) -> dict[str, Any]:
    """Measures the parts of a step, each side's peak memory and, on a CPU, the allocator as it comes."""
    sides = [side for side in SIDES if options.published or side != "published"]
    found: dict[str, Any] = {
        "parts_seconds_per_step": parts(options, photos),
        "peak_memory_mib": {side: in_a_process(options, alone=side)["peak_memory_mib"] for side in sides},
    }
    if options.device == "cpu" and options.keep_freed_memory:
        record = in_a_process(options, keep_freed_memory=False)
        found["allocator_as_it_comes"] = {
            key: value
            for key, value in record.items()
            if key in ("ratios", "images_per_second") or "per_step" in key
        }
    return found


def parts(options: Options, photos: Sequence[Path]) -> dict[str, float]:
    """Runs the loop once more with a stopwatch; returns seconds a step by part, largest first."""
    warm, steps, watch = 2, min(options.steps, 8), Stopwatch(options.device)
    found: dict[str, float] = {}

    def pause(step: int) -> None:
        watch.lap()
        if step <= warm:
            watch.seconds.clear()
        if step == warm + steps:
            found.update({name: round(value / steps, 5) for name, value in watch.seconds.most_common()})

    with watch.on_the_loop():
        distil(options, photos, warm + steps + 1, pause)
    return found


def alone(options: Options, photos: Sequence[Path]) -> dict[str, float]:
    """Runs a few steps of one side and nothing else, for the peak memory of this process."""
    if options.alone == "loop":
        distil(options, photos, 3, lambda _: None)
    else:
        if options.device == "cpu" and options.keep_freed_memory:
            keep_freed_memory()
        side = Floor(options) if options.alone == "floor" else published(options, photos)
        for _ in range(3):
            side.step()
    return {"peak_memory_mib": peak_memory(options.device)}


def peak_memory(device: str) -> float:
    """Peak memory of this process in MiB: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    # Not getrusage: its maximum is handed down from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["VmHWM"].split()[0]) / 2**10, 1)


def in_a_process(options: Options, **changes: Any) -> dict[str, Any]:
    """Runs this program anew, without details and with some options changed; returns its record."""
    flags = []
    for name, value in asdict(replace(options, **changes)).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    with TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, __file__, *flags, "--no-details", "--output", str(record)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(record.read_text())


# -- the record ----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Says what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cores() -> int:
    """Counts the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Names the versions of what decides the speed."""
    libraries = ("torch", "timm", "transformers", "accelerate", "numpy", "pillow")
    own = {"python": platform.python_version(), "phreg": phreg.__version__}
    return own | {name: version(name) for name in libraries}


def commit() -> str | None:
    """Names the commit measured; a plus sign marks changes since. None where git does not know."""
    program = shutil.which("git")
    if program is None:
        return None

    def ask(*question: str) -> str:
        command = [program, "-C", str(Path(__file__).parent), *question]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    found = ask("rev-parse", "--verify", "HEAD")
    return found + ("+" if ask("status", "--porcelain") else "") if found else None


def read_options(arguments: Sequence[str] | None = None) -> tuple[Options, bool, Path | None]:
    """Reads the command line: options, whether to measure details, and where to write the record."""
    switch = argparse.BooleanOptionalAction
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm architecture, or dinov2-base")
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step")
    parser.add_argument("--views", type=int, default=10, help="views an image")
    parser.add_argument("--registers", type=int, default=16, help="registers added")
    parser.add_argument("--steps", type=int, help=f"timed steps of each side; unset means {STEPS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="where to run")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="unset means as phreg chooses")
    parser.add_argument("--compile", action=switch, default=False, help="compile blocks of loop and floor")
    parser.add_argument("--workers", type=int, help="readers of each loop; unset means as phreg chooses")
    parser.add_argument("--published", action=switch, default=True, help="time the published loop too")
    parser.add_argument("--keep-freed-memory", action=switch, default=True, help="all sides, on a CPU")
    parser.add_argument("--alone", choices=SIDES, help="run one side, for its peak memory only")
    parser.add_argument("--details", action=switch, default=True, help="parts, memory, allocator: more runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = vars(parser.parse_args(arguments))
    output, further = given.pop("output"), given.pop("details")
    given["steps"] = given["steps"] or STEPS[given["device"]]
    given["precision"] = given["precision"] or ("bf16" if computes_bf16(given["device"]) else "fp32")
    given["workers"] = min(8, cores() - 1) if given["workers"] is None else given["workers"]
    return Options(**given), further, output


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and writes the record."""
    options, further, output = read_options(arguments)
    record: dict[str, Any] = {
        "settings": asdict(options),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    with TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos")
        if options.alone:
            record |= alone(options, photos)
        else:
            record |= contest(options, photos)
            record |= details(options, photos) if further else {}
    text = json.dumps(record, indent=2)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    print(text)
    return record


if __name__ == "__main__":
    main()
