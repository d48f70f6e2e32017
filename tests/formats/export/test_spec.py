"""A format is one module and one line of a table: exporting, loading, showing and pushing follow from it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import huggingface_hub
import pytest
import torch
from families_timm import FAMILIES as TIMM
from families_transformers import FAMILIES as TRANSFORMERS
from safetensors.torch import load_file, save_file

import phreg
from phreg.errors import LoadError, PhregError
from phreg.formats import FORMATS, Format, publish
from phreg.formats.export.spec import all_specs, find_spec
from phreg.storage import OWN_FORMATS

ROOT = Path(__file__).parents[3]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def plain(monkeypatch):
    """Adds the line to the table."""
    monkeypatch.setitem(FORMATS, "plain", "plain_format")


def test_every_format_of_the_table_goes_by_its_name_there_and_is_a_choice_on_the_command_line():
    assert [spec.name for spec in all_specs()] == list(FORMATS) == list(get_args(Format))
    for name in FORMATS:
        assert find_spec(name).load_line.format(folder="here")
    assert {find_spec(recorded).name for recorded in OWN_FORMATS} == {"merged", "adapter"}


def test_a_format_that_is_added_is_exported_measured_and_loaded(plain, tmp_path):
    model = phreg.add_registers(TIMM["vit"](), 3)
    model.reg_token.mul_(3)
    figures = phreg.export(model, tmp_path / "out", format="plain")
    assert [figure.difference for figure in figures] == [0.0] * 3
    names = {"plain.safetensors", "registers.json", "read.lua", "phreg_export.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert torch.equal(phreg.load(tmp_path / "out")(IMAGES), model(IMAGES))
    shown = phreg.info(tmp_path / "out")
    assert (shown.format, shown.registers, shown.fits) == ("plain", 3, "unknown")
    assert [claimed for _, claimed in shown.sizes] == [True] * 3


def test_it_refuses_what_it_cannot_take_and_stands_among_the_alternatives(plain, tmp_path):
    with pytest.raises(
        PhregError, match=r"as 'plain': it is no model of timm\. It can be exported as .*merged"
    ):
        phreg.export(phreg.add_registers(TRANSFORMERS["vit"](), 3), tmp_path / "out", format="plain")
    with pytest.raises(PhregError, match=r"It can be exported as timm or onnx or merged or plain\."):
        phreg.export(phreg.add_registers(TIMM["vit"](), 3), tmp_path / "out", format="transformers")
    assert not list(tmp_path.iterdir())


def test_an_export_in_it_that_would_be_another_model_leaves_nothing_behind(plain, tmp_path):
    model = phreg.add_registers(TIMM["vit"](), 3)
    model.norm.eps = 0.5
    with pytest.raises(PhregError, match="as 'plain', and the folder would hold another model"):
        phreg.export(model, tmp_path / "out", format="plain")
    assert not list(tmp_path.iterdir())


def test_weights_changed_since_are_refused_as_in_any_format(plain, tmp_path):
    phreg.export(phreg.add_registers(TIMM["vit"](), 3), tmp_path / "out", format="plain")
    file = tmp_path / "out" / "plain.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LoadError, match="changed since"):
        phreg.load(tmp_path / "out")


def test_its_card_and_what_is_pushed_follow_from_it(plain, tmp_path):
    phreg.export(phreg.add_registers(TIMM["vit"](), 3), tmp_path / "out", format="plain")
    pushed = phreg.push(tmp_path / "out", "me/x", dry_run=tmp_path / "dry")
    assert set(pushed.files) == {
        "README.md", "phreg_export.json", "plain.safetensors", "read.lua", "registers.json"
    }  # fmt: skip
    text = (tmp_path / "dry" / "README.md").read_text()
    assert huggingface_hub.metadata_load(tmp_path / "dry" / "README.md")["library_name"] == "plain"
    for part in (
        "Without phreg, in plain as it is:",
        'plain.read("me/x")',
        "Nothing but tensors.",
        "With phreg:",
    ):
        assert part in text
    assert "*.lua" in publish.replaced()


def test_the_command_line_takes_it_and_says_what_loads_it(tmp_path):
    phreg.export(phreg.add_registers(TIMM["vit"](), 3), tmp_path / "out", format="merged")
    table = (  # as it would be with the line in it
        "import typing, phreg.formats as f; f.FORMATS['plain'] = 'plain_format'; "
        "f.Format = typing.Literal[tuple(f.FORMATS)]"
    )
    command = ["export", str(tmp_path / "out"), "--format", "plain", "--output", str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", f"{table}; from phreg import cli; cli.main({command})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = "".join(done.stdout.split())
    assert "loadedbackbyplain" in printed
    assert f'plain.read("{tmp_path / "again"}")' in printed
    assert (tmp_path / "again" / "plain.safetensors").is_file()


def test_showing_an_export_imports_no_model_library():
    code = (
        "import sys, phreg; phreg.info(sys.argv[1]); "
        "print([name for name in ('timm', 'transformers', 'open_clip') if name in sys.modules])"
    )
    export = ROOT / "tests" / "golden" / "0.1" / "vit" / "timm"
    done = subprocess.run([sys.executable, "-c", code, export], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
