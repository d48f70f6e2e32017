"""What does opening a model take in host memory? Linux alone: it reads /proc/self/status.

    python benchmarks/memory/opening.py MODEL... [--output FILE.json]

Each model is opened in a process of its own. Anonymous memory is what the process has for itself; mapped
pages are those of files, which the system shares between processes and takes back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

FIELDS = {"RssAnon": "anonymous", "RssFile": "mapped", "VmRSS": "all"}


def status() -> dict[str, float]:
    """Memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    said = dict(line.split(":", 1) for line in lines)
    return {name: int(said[field].split()[0]) / 1024 for field, name in FIELDS.items()}


def measure(model: str) -> dict[str, float | str]:
    """Opens a model in this process as `phreg distill` does; returns what it took, in MiB."""
    from phreg.backbones import open_clip, timm, transformers  # noqa: F401  (not counted: libraries)
    from phreg.formats.load import open_model

    peak, done = dict.fromkeys(FIELDS.values(), 0.0), threading.Event()

    def watch() -> None:
        while not done.is_set():
            for name, value in status().items():
                peak[name] = max(peak[name], value)
            time.sleep(0.0005)

    before, watching = status(), threading.Thread(target=watch)
    watching.start()
    try:
        backbone, _ = open_model(model)
    finally:
        done.set()
        watching.join()
    after = status()
    weights = sum(one.nbytes for one in backbone.model.parameters()) / 2**20
    result: dict[str, float | str] = {"model": Path(model).name, "weights": round(weights, 1)}
    for name in FIELDS.values():
        result[f"{name}_peak"] = round(peak[name] - before[name], 1)
        result[f"{name}_after"] = round(after[name] - before[name], 1)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measures models one by one, prints the results, and writes JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("models", nargs="+")
    options.add_argument("--output", type=Path)
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = options.parse_args(arguments)
    if asked.here:
        print(json.dumps(measure(asked.models[0])))
        return
    results = []
    for model in asked.models:
        program = [sys.executable, __file__, model, "--here"]
        said = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(said.splitlines()[-1]))
        print(results[-1])
    if asked.output:
        asked.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
