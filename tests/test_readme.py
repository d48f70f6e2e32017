"""README is executed: its commands become settings, its Python is bound to the real functions."""

import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import phreg
from phreg import api, cli, methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("phreg ")
]
PYTHON = [block for language, block in BLOCKS if language == "python"]


@pytest.mark.parametrize("command", COMMANDS)
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
    assert len(COMMANDS) >= 4
    assert len(PYTHON) >= 2


def test_every_call_in_the_python_examples_fits_the_function():
    calls = re.findall(r"phreg\.(\w+)\((.*?)\)", "\n".join(PYTHON))
    assert {"distill", "load", "add_registers", "remove_registers", "denoise", "inspect"} <= {
        n for n, _ in calls
    }
    for name, arguments in calls:
        placeholders = {"model": object(), "images": object()}
        positional, keywords = eval(f"(lambda *a, **k: (a, k))({arguments})", placeholders)
        inspect.signature(getattr(phreg, name)).bind(*positional, **keywords)


def test_the_two_set_up_commands_stand_word_for_word():
    assert "python -m pip install -e . -c constraints.txt && phreg quickstart\n" in README
    assert 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest\n' in README


def test_links_inside_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_constraints_pin_every_direct_dependency_within_its_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {name.lower().replace("-", "_"): version for name, version in pins.items()}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        pinned = pins[requirement.name.lower().replace("-", "_")]
        assert requirement.specifier.contains(pinned), requirement
