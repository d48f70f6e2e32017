"""README and the pages of docs/ are executed: commands become settings, Python is bound to real functions."""

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import phreg
from phreg import api, cli, methods, settings

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
        placeholders = {"model": object(), "images": object()}
        positional, keywords = eval(f"(lambda *a, **k: (a, k))({arguments})", placeholders)
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
