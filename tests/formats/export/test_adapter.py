"""Adapter: what a run made, copied, and tried on its base before it is there."""

import json

import pytest
import torch
from families_transformers import FAMILIES
from safetensors.torch import load_file, save_file

import phreg
from phreg.backbones import resolve
from phreg.backbones.resolve import Base, weights_sha256
from phreg.demo import demo_model
from phreg.errors import PhregError
from phreg.formats.adapter import save_adapter
from phreg.formats.export import export
from phreg.formats.load import open_model
from phreg.registers import add_registers
from phreg.run_summary import RunSummary


@pytest.fixture
def run(saved, tmp_path):
    """A run, as far as an export is concerned, of the tiny model in `saved`."""
    original, base = resolve.load(saved)
    backbone, _ = resolve.load(saved)
    add_registers(backbone, 3)
    with torch.no_grad():
        backbone.model.norm.weight.mul_(2)
    folder = tmp_path / "run"
    run = RunSummary(readout="plain", recipe={})
    save_adapter(folder / "model", backbone, base, original.disk_state(), run, lambda _: "# A card\n")
    return folder


def test_the_adapter_is_copied_whole_and_loads_as_before(run, tmp_path):
    figures = phreg.export(run, tmp_path / "out", format="adapter")
    assert [figure.difference for figure in figures] == [0.0] * 3
    names = {"adapter.safetensors", "phreg.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    before, after = (
        json.loads((folder / "phreg.json").read_text()) for folder in (run / "model", tmp_path / "out")
    )
    assert {name: after[name] for name in before} == before
    assert [figure["claimed"] for figure in after["equality"]] == [True] * 3
    for name in names - {"phreg.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(phreg.load(tmp_path / "out")(images), phreg.load(run)(images))


def test_an_adapter_whose_base_has_changed_is_not_exported(run, saved, tmp_path):
    backbone, base = open_model(run)
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.bias"] += 1
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(PhregError, match=r"does not load: the adapter in .* was made for"):
        export(backbone, tmp_path / "out", "adapter", base=base)
    assert not (tmp_path / "out").exists()


def test_a_model_changed_since_is_no_longer_its_adapter(run, tmp_path):
    backbone, base = open_model(run)
    with torch.no_grad():
        backbone.registers.mul_(2)
    with pytest.raises(PhregError, match="another model: at its own size"):
        export(backbone, tmp_path / "out", "adapter", base=base)


def test_an_instance_has_no_adapter(tiny, tmp_path):
    model = add_registers(tiny(), 3)
    with pytest.raises(PhregError, match="not loaded from a run or an adapter"):
        phreg.export(model, tmp_path / "out", format="adapter")


def test_the_read_out_is_in_the_description(tmp_path):
    model = FAMILIES["clip-vision-projection"]()
    model.save_pretrained(tmp_path / "base")
    original, base = resolve.load(tmp_path / "base")
    backbone, _ = resolve.load(tmp_path / "base")
    add_registers(backbone, 3)
    run = RunSummary(readout="value-only", recipe={})
    save_adapter(tmp_path / "run" / "model", backbone, base, original.disk_state(), run, lambda _: "")
    figures = phreg.export(tmp_path / "run", tmp_path / "out", format="adapter")
    assert all(figure.claimed for figure in figures)
    assert json.loads((tmp_path / "out" / "phreg.json").read_text())["readout"] == "value-only"
    merged = phreg.export(tmp_path / "out", tmp_path / "merged", format="merged")
    assert all(figure.claimed for figure in merged)
    assert json.loads((tmp_path / "merged" / "phreg.json").read_text())["readout"] == "value-only"
    with pytest.raises(PhregError, match=r"read value-only.*exported as onnx or merged or adapter\."):
        phreg.export(tmp_path / "run", tmp_path / "remote", format="remote-code")


def test_a_run_on_the_demonstration_model_finds_it_again(tmp_path):
    original = resolve.adapt(demo_model())
    backbone = resolve.adapt(demo_model())
    add_registers(backbone, 2)
    base = Base("demo", "timm", None, weights_sha256(original.disk_state()))
    save_adapter(tmp_path / "run" / "model", backbone, base, original.disk_state(), None, lambda _: "")
    assert phreg.export(tmp_path / "run", tmp_path / "out", format="adapter")[0].difference == 0.0
