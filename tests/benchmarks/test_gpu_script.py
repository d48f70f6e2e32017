"""benchmarks/gpu.sh: every command of it runs, on a CPU with small models; so it cannot fail on a typo."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_every_part_runs_dry_and_writes_what_it_says(tmp_path):
    # The script takes the machine's own python3.
    (tmp_path / "bin").mkdir()
    python3 = tmp_path / "bin" / "python3"
    python3.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python3.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [SCRIPT, "--dry", tmp_path / "out"], env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    parts = re.findall(r"^== (\S+): status 0", done.stdout, flags=re.MULTILINE)
    assert parts == ["gpu-tests", "vit-b-518", "vit-b-518-compile", "memory-vit-l", "vit-l-518"]
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == sorted([f"{part}.log" for part in parts] + [f"{part}.json" for part in parts[1:]])
    for part in parts[1:]:
        json.loads((tmp_path / "out" / f"{part}.json").read_text())
    assert "collected" in (tmp_path / "out" / "gpu-tests.log").read_text()


def test_models_of_the_real_run_are_ones_that_the_benchmarks_know():
    text = SCRIPT.read_text()
    sides, memory = (
        (ROOT / "benchmarks" / name).read_text() for name in ("throughput/sides.py", "memory/run.py")
    )
    kinds, names = re.findall(r"--model dinov2-(\w+)", text), re.findall(r"--models (ViT\S+)", text)
    assert len(kinds) >= 3
    assert len(names) >= 1
    assert all(f'"{kind}": (' in sides for kind in kinds)
    assert all(f'"{name}": (' in memory for name in names)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
