"""README and the pages of docs/ are executed: commands become settings, Python is bound to real functions."""

import collections
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import transformers
from packaging.requirements import Requirement

import phreg
from phreg import api, cli, methods, settings
from phreg.backbones.resolve import adapt
from phreg.data.crops import centre_crops
from phreg.data.sources import open_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
]
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("phreg ")
]
PYTHON = [block for language, block in BLOCKS if language == "python"]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_one_that_the_program_takes(command, monkeypatch):
    called = []

    def record(*arguments, recipe=None, resume=False, observe=None, **settings):
        methods.resolve(recipe, settings)
        called.append(arguments)
        raise phreg.PhregError("not run in this test")

    monkeypatch.setattr(api, "distill", record)
    monkeypatch.setattr(api, "quickstart", record)
    for verb in (
        "phreg.api.inspect",
        "phreg.api.export",
        "phreg.api.push",
        "phreg.api.evaluate",
        "phreg.formats.info.info",
    ):
        monkeypatch.setattr(verb, lambda *arguments, **settings: record(*arguments))
    lists = command in ("phreg recipes", "phreg tasks")
    with pytest.raises(SystemExit) if not lists else pytest.MonkeyPatch.context():
        cli.main(shlex.split(command)[1:])
    assert called or lists


def test_there_are_commands_and_python_to_test():
    assert len(COMMANDS) >= 12
    assert len(PYTHON) >= 5


def test_readme_fits_on_a_few_screens():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 160 for line in lines)


def test_every_call_in_the_python_examples_fits_the_function():
    calls = re.findall(r"phreg\.(\w+)\((.*?)\)", "\n".join(PYTHON))
    assert {"distill", "load", "add_registers", "remove_registers", "denoise", "inspect"} <= {
        n for n, _ in calls
    }
    for name, arguments in calls:
        # Whatever an example names stands for something.
        placeholders = collections.defaultdict(object, _called=lambda *a, **k: (a, k))
        positional, keywords = eval(
            f"_called({arguments})", {"_called": lambda *a, **k: (a, k)}, placeholders
        )
        inspect.signature(getattr(phreg, name)).bind(*positional, **keywords)


def test_the_two_set_up_commands_stand_word_for_word():
    assert "python -m pip install -e . -c constraints.txt && phreg quickstart\n" in README
    assert 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest\n' in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_settings_are_listed_with_the_defaults_of_every_method(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    listed = hooks.settings()
    for key in settings.fields():
        assert f"| `{key}` |" in listed, key
    row = next(line for line in listed.splitlines() if line.startswith("| `registers` |"))
    assert "| 4; paper: 16; test-time: auto |" in row


@pytest.mark.slow
def test_the_documentation_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- settings" not in text
        assert not re.findall(r'(?:src|href)="(https?:[^"]*\.(?:js|css|woff2?|png))"', text), page


def test_constraints_pin_every_direct_dependency_within_its_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {name.lower().replace("-", "_"): version for name, version in pins.items()}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        pinned = pins[requirement.name.lower().replace("-", "_")]
        assert requirement.specifier.contains(pinned), requirement


LIMITS = {
    "inspect": "--count 8 --size 112",
    "distill": "--steps 2 --batch-size 4 --size 112 --sinks.images 8 --views.count 2 --measure.images 4 "
    "--measure.views 4 --measure.no-keep-best --data.workers 0",
    "export": "",
    "evaluate": "--set reading.size=112 steps=2",
}
"""What README's commands get besides, to end soon. Two steps gain nothing, and the last state is kept."""


@pytest.fixture
def at_home(real_data, tmp_path, monkeypatch):
    """A folder in which README's names stand for real weights and pictures."""
    for name in ("dinov2-small", "dinov2-base"):
        (tmp_path / "facebook").mkdir(exist_ok=True)
        (tmp_path / "facebook" / name).symlink_to(real_data / "models" / "dinov2-small")
    (tmp_path / "photos").mkdir()
    for photo in sorted((real_data / "imagenet_samples").glob("*.jpg"))[:12]:
        (tmp_path / "photos" / photo.name).symlink_to(photo)
    for split in ("images/train", "images/val", "masks/train", "masks/val"):
        folder = tmp_path / "VOCdevkit" / "VOC2012" / split
        folder.mkdir(parents=True)
        for file in sorted((real_data / "camvid" / split).iterdir())[:8]:
            (folder / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.real
def test_the_commands_of_readme_run_one_after_the_other_on_a_real_model(at_home):
    usage = README.partition("## Use it")[2].partition("```\n")[2].partition("```")[0].splitlines()
    assert [line.split()[1] for line in usage] == list(LIMITS)
    for line in usage:
        command = shlex.split(line)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "phreg", *command, *shlex.split(LIMITS[command[0]])],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    written = ["look/report.html", "dinov2-small-reg/config.json", "results/results.md"]
    assert all((at_home / file).is_file() for file in written)


@pytest.mark.slow
@pytest.mark.real
def test_the_python_of_readme_runs_on_a_real_model(at_home, monkeypatch):
    small = {"steps": 2, "batch_size": 4, "size": 112, "sinks": {"images": 8}, "data": {"workers": 0}}
    small |= {"views": {"count": 2}, "measure": {"images": 4, "views": 4, "keep_best": False}}
    monkeypatch.setattr(phreg, "distill", functools.partial(phreg.distill, **small))
    names = {}
    exec(PYTHON[0], names)
    assert type(names["model"]).__name__ == "Dinov2Model"
    stock = transformers.AutoModel.from_pretrained("dinov2-base-reg").eval()
    assert type(stock).__name__ == "Dinov2WithRegistersModel"
    images = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))  # the model's own size
    with torch.no_grad():
        pooled = [model(images).pooler_output for model in (names["model"], stock)]
    assert torch.allclose(*pooled, atol=1e-4)


@pytest.mark.slow
@pytest.mark.real
def test_what_readme_does_in_place_runs_on_a_real_model_with_artifacts(at_home, real_model):
    model = timm.create_model(f"local-dir:{real_model}", pretrained=True).eval()
    images = torch.cat(list(centre_crops(adapt(model), open_images("photos"), (224, 224))))
    names = {"phreg": phreg, "model": model, "images": images}
    exec(PYTHON[1], names)
    assert names["target"].shape == (12, 14, 14, 192)
    assert names["report"].outlier_rate == 0, "test-time registers are in place"
