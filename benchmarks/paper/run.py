"""PH-Reg's recipe on a real model with real artifacts, and that a killed run ends where a whole one does.

    python benchmarks/paper/run.py MODEL IMAGES [--epochs 2] [--seed 0] [--output FILE.json]

Runs `phreg distill MODEL --images IMAGES --method paper` once whole, and once more killed with SIGKILL twice
and resumed; the two adapters must agree bit for bit. Writes the before/after figures and both facts as JSON.
"""

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


def distil(arguments: list[str], log: Path | None = None, kill_after: int | None = None) -> int | None:
    """Runs `phreg distill`, or kills it outright once so many steps are logged, and returns their number."""
    with subprocess.Popen([sys.executable, "-m", "phreg", "distill", *arguments]) as process:
        if log is None or kill_after is None:
            if process.wait():
                sys.exit(f"phreg distill ended with status {process.returncode}")
            return None
        while True:
            if process.poll() is not None:
                sys.exit("the run ended before it was killed; use more steps")
            steps = len(log.read_text().splitlines()) if log.exists() else 0
            if steps >= kill_after:
                process.send_signal(signal.SIGKILL)
                return steps
            time.sleep(0.05)


def main() -> None:
    """Runs both, compares them, and writes the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    settings = ["--method", "paper", "--epochs", str(options.epochs), "--seed", str(options.seed)]
    settings += [
        "--checkpoint-every",
        str(options.checkpoint_every),
        "--measure.images",
        "60",
        "--measure.views",
        "60",
    ]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        common = [options.model, "--images", options.images, *settings]
        started = time.perf_counter()
        distil([*common, "--output", str(whole)])
        seconds = time.perf_counter() - started
        steps = len((whole / "log.jsonl").read_text().splitlines())
        kills = []
        for kill_after in sorted(random.Random(options.seed).sample(range(1, steps - 1), 2)):
            resumed = ["--resume"] if kills else []
            kills.append(
                distil([*common, "--output", str(killed), *resumed], killed / "log.jsonl", kill_after)
            )
        distil([*common, "--output", str(killed), "--resume"])

        adapters = [load_file(run / "model" / "adapter.safetensors") for run in (whole, killed)]
        same = adapters[0].keys() == adapters[1].keys() and all(
            torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0]
        )
        description = json.loads((whole / "model" / "phreg.json").read_text())
        log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    record = {
        "command": [
            "phreg",
            "distill",
            Path(options.model).name,
            "--images",
            Path(options.images).name,
            *settings,
        ],
        "figures": description["figures"],
        "outcome": description["outcome"],
        "seconds_in_all": round(seconds, 1),
        "loss": {"first": log[0]["loss"], "last": log[-1]["loss"]},
        "killed_after_steps": kills,
        "killed_and_resumed_is_bit_identical": same,
        "versions": description["versions"],
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    sys.exit(0 if same else "the killed and resumed run differs from the whole one")


if __name__ == "__main__":
    main()
