"""Two processes on a CPU: the same figures as one, and an error of one in both."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import phreg
from phreg.errors import PhregError
from phreg.evaluation.processes import ALONE, is_main_process, launched_processes

QUICK = {"reading": {"size": 32}, "device": "cpu", "batch_size": 2}
TASKS = {
    "dense-nn": {"bank_size": 40},
    "linear-segmentation": {"steps": 3, "train_batch_size": 2},
    "classification": {"methods": ["knn"], "neighbours": 3},
}

SCRIPT = """
import json, sys, phreg
from phreg.evaluation.features import FeatureReader

read, place = [], FeatureReader.place
FeatureReader.place = lambda *words: read.append(1) or place(*words)
asked = json.loads(sys.argv[1])
for task, (data, output, settings) in asked["tasks"].items():
    results = phreg.evaluate(
        asked["model"], baseline=asked["baseline"], task=task, data=data, output=output, **settings
    )
    print(json.dumps({task: {name: found.mean for name, found in results.records[0].figures.items()}}))
print(json.dumps({"read": len(read)}))
"""


@pytest.fixture
def data(tmp_path):
    """Seven pictures to learn from and five to be tested on, with masks; the same as two classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 5)):
        for number in range(count):
            width = 40 if number % 3 else 32  # of two canvases
            coarse = generator.integers(0, 256, (4, width // 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse.repeat(8, 0).repeat(8, 1))
            mask = Image.fromarray((coarse[..., 0] > 127).astype(np.uint8).repeat(8, 0).repeat(8, 1))
            for kind, image in (("images", picture), ("masks", mask)):
                path = tmp_path / "set" / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            path = tmp_path / "classes" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (tmp_path / "set" / "classes.txt").write_text("dark\nlight\n")
    return tmp_path


def asked(data, saved, other, folder):
    where = {"classification": "classes"}
    return {
        "model": str(saved),
        "baseline": str(other),
        "tasks": {
            task: (str(data / where.get(task, "set")), str(data / folder / task), QUICK | settings)
            for task, settings in TASKS.items()
        },
    }


def launch(words):
    """Runs the script in two processes, as a launcher does; returns what each printed and how it ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(words)],
            env=os.environ | facts | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [(*process.communicate(timeout=240), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_processes_have_the_figures_of_one_and_the_main_one_writes_them(data, saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"norm.weight": -weights["norm.weight"]}, other / "model.safetensors")
    alone = {
        task: phreg.evaluate(str(saved), baseline=str(other), task=task, data=of, output=to, **settings)
        for task, (of, to, settings) in asked(data, saved, other, "one")["tasks"].items()
    }
    ended = launch(asked(data, saved, other, "two"))
    # In turns of 2: of 7 pictures 4 and 3, of 5 pictures 3 and 2. Three tasks read both, of two models, and
    # two look for the baseline's artifacts in the 5.
    shares = [json.loads(printed.splitlines()[-1])["read"] for printed, *_ in ended]
    assert shares == [6 * (4 + 3) + 2 * 3, 6 * (3 + 2) + 2 * 2]
    assert [code for *_, code in ended] == [0, 0], ended[0][1] + ended[1][1]
    for task, found in alone.items():
        figures = {name: summary.mean for name, summary in found.records[0].figures.items()}
        for printed, *_ in ended:
            told = next(line[task] for line in map(json.loads, printed.splitlines()) if task in line)
            assert told == pytest.approx(figures, abs=1e-6), task
        written = json.loads((data / "two" / task / "results.json").read_text())
        assert written["digest"] == found.records[0].digest
        assert len(list((data / "two" / task / "runs").iterdir())) == 2, "one of each model"


def test_a_picture_that_one_process_cannot_read_ends_both_with_the_error(data, saved):
    (data / "classes" / "val" / "a" / "4.png").write_bytes(b"no picture")
    words = asked(data, saved, saved, "broken")
    words["tasks"] = {"classification": words["tasks"]["classification"]}
    for _, errors, code in launch(words):
        assert code == 1
        assert "4.png" in errors.splitlines()[-1]


def test_a_process_on_its_own_makes_everything_itself(monkeypatch):
    assert ALONE.gather(lambda: 3) == [3]
    assert ALONE.from_main(lambda: 4) == 4
    assert ALONE.device() is None
    with pytest.raises(PhregError, match="broken"):
        ALONE.from_main(lambda: (_ for _ in ()).throw(PhregError("broken")))
    with launched_processes() as processes:
        assert processes is ALONE
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()
