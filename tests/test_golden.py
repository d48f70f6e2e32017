"""What an earlier phreg wrote loads as it did then: golden files of each version, by `golden/make.py`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import phreg
from phreg.backbones.resolve import adapt

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "photos").is_dir())

# Folders that phreg itself loads; "run" and "adapter" need their base, which lies beside them.
SAVED = [
    *(
        ("dinov2", kind)
        for kind in ("run", "adapter", "transformers", "remote-code", "merged", "save_pretrained")
    ),
    *(("vit", kind) for kind in ("run", "adapter", "timm", "merged")),
    *(("clip", kind) for kind in ("run", "adapter", "open_clip", "merged")),
]
STOCK = {"transformers", "timm", "open_clip"}
"""Exports that load as a class with registers of its own, which names its tensors otherwise."""

each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture
def golden(tmp_path):
    """Copies a version's files, and puts the copy where records say that the base lies."""

    def copy(version):
        shutil.copytree(GOLDEN / version, tmp_path / version)
        for file in (tmp_path / version).rglob("*.json"):
            file.write_text(file.read_text().replace("/golden", str(tmp_path / version)))
        return tmp_path / version

    return copy


@each_version
@pytest.mark.parametrize(("model", "kind"), SAVED)
def test_a_golden_file_loads_bit_equal(version, model, kind, golden):
    folder = golden(version)
    expected = load_file(folder / model / "expected.safetensors")
    loaded = phreg.load(folder / model / kind)
    state = {f"state.{name}": tensor for name, tensor in loaded.state_dict().items()}
    if kind not in STOCK:
        assert state.keys() == {name for name in expected if name.startswith("state.")}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    with torch.no_grad():
        features = adapt(loaded)(expected["images"])
    # 1e-5 of the largest value: another machine's kernels sum in another order.
    for name in ("patches", "pooled"):
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(getattr(features, name), expected[name], rtol=0, atol=1e-5 * scale)


@each_version
def test_a_golden_test_time_run_loads(version, golden):
    loaded = phreg.load(golden(version) / "demo" / "run")
    assert adapt(loaded).num_registers == 1


@each_version
@pytest.mark.parametrize(("model", "kind"), [*SAVED, ("dinov2", "onnx")])
def test_a_golden_record_is_shown(version, model, kind, golden):
    shown = phreg.info(golden(version) / model / kind)
    assert shown.registers == 2
    assert json.dumps(shown.to_json())
