"""ONNX: a graph that onnxruntime runs, at any batch and, where it can be, any size."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jaxtyping
import onnxruntime
import pytest
import torch
from families import FAMILIES

from phreg.backbones import resolve
from phreg.backbones.readout import set_readout
from phreg.errors import LoadError, PhregError
from phreg.formats.export import export, onnx
from phreg.registers import add_registers

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order; a missing register changes the first digit."""

# onnxscript calls what it deprecates itself, on the way through torch's exporter.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch):
    """Checking shapes at run time would fix them in the graph."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def patched(family):
    backbone, base = resolve.load(FAMILIES[family]())
    return add_registers(backbone, 3), base


def pictures(batch, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(backbone, folder, shapes):
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["patches", "pooled"]
    for shape in shapes:
        images = pictures(*shape)
        found = session.run(None, {"images": images.numpy()})
        for output, expected in zip(found, backbone(images), strict=True):
            assert torch.allclose(torch.from_numpy(output), expected, **ROUNDING)


SLOW = [
    "transformers/dinov2",
    "transformers/clip-vision",
    "transformers/siglip",
    "timm/vit",
    "open_clip/clip",
]


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_any_batch_and_any_size_come_out_as_from_the_model(family, tmp_path):
    backbone, base = patched(family)
    figures = export(backbone, tmp_path / "out", "onnx", base=base)
    assert len(figures) == 3
    assert all(figure.claimed for figure in figures)
    check(backbone, tmp_path / "out", [(1, 32, 32), (5, 32, 32), (2, 56, 24), (1, 16, 40)])


@torch.no_grad()
def test_a_dense_read_out_is_in_the_graph(tmp_path):
    backbone, base = patched("transformers/clip-vision-projection")
    set_readout(backbone, "value-only")
    export(backbone, tmp_path / "out", "onnx", base=base)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["readout"] == "value-only"
    assert described["size"] is None
    assert described["mean"] == list(backbone.spec.mean)
    assert backbone(pictures(1)).patches.shape[-1] == 16  # the joint space
    check(backbone, tmp_path / "out", [(1, 32, 32), (3, 24, 40)])


def test_a_model_of_one_size_gets_a_graph_of_one_size(tmp_path):
    backbone, base = patched("transformers/aimv2-vision")
    figures = export(backbone, tmp_path / "out", "onnx", base=base)
    assert [figure.size for figure in figures] == [(32, 32)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["size"] == [32, 32]
    check(backbone, tmp_path / "out", [(1, 32, 32), (3, 32, 32)])


def test_a_graph_holds_no_paths_of_the_disk_that_it_was_made_on(tmp_path):
    backbone, base = patched("timm/vit")
    export(backbone, tmp_path / "out", "onnx", base=base)
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert os.fsencode(Path(torch.__file__).parent) not in content
    assert os.fsencode(Path(__file__).parents[3]) not in content


@pytest.mark.slow
def test_a_graph_that_is_not_equal_at_other_sizes_is_made_for_one_and_says_so(tmp_path, caplog):
    backbone, base = patched("transformers/vit-mae")
    figures = export(backbone, tmp_path / "out", "onnx", base=base)
    assert [figure.size for figure in figures] == [(32, 32)]
    assert "takes images of 32x32 alone" in caplog.text
    with pytest.raises(PhregError, match="takes the model's own size alone"):
        export(backbone, tmp_path / "other", "onnx", base=base, sizes=[(16, 16)])


def test_missing_packages_are_named_with_the_extra_that_brings_them(tmp_path, monkeypatch):
    spec = replace(onnx.SPEC, packages=("onnx", "no_such_package"))
    monkeypatch.setattr(onnx, "SPEC", spec)
    backbone, base = patched("timm/vit")
    with pytest.raises(
        PhregError, match=r"takes no_such_package, not installed.*pip install 'phreg\[onnx\]'"
    ):
        export(backbone, tmp_path / "out", "onnx", base=base)


def test_a_file_that_is_no_graph_or_images_that_do_not_fit_are_one_clear_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"half")
    with pytest.raises(LoadError, match="onnxruntime cannot read the graph"):
        onnx.load(tmp_path)
    graph = torch.nn.Conv2d(3, 2, 8, 8).eval()
    arguments = {"input_names": ["images"], "output_names": ["patches"], "verbose": False}
    torch.onnx.export(graph, (pictures(1),), tmp_path / "model.onnx", **arguments)
    with pytest.raises(LoadError, match="onnxruntime cannot run the graph"):
        onnx.load(tmp_path)(pictures(1, 16, 16))


def test_a_bf16_model_is_refused(tmp_path):
    backbone, base = patched("timm/vit")
    backbone.model.bfloat16()
    with pytest.raises(PhregError, match=r"torch\.bfloat16.*call model\.float\(\) first"):
        export(backbone, tmp_path / "out", "onnx", base=base)


def test_a_model_that_torch_cannot_write_leaves_the_reason_and_nothing_else(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no operator for that")

    monkeypatch.setattr(torch.onnx, "export", fail)
    backbone, base = patched("transformers/aimv2-vision")
    with pytest.raises(PhregError, match=r"no equal graph of it \(RuntimeError: no operator for that\)"):
        export(backbone, tmp_path / "out", "onnx", base=base)
    assert not list(tmp_path.iterdir())


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_is_equal_in_onnx(real_model, tmp_path):
    backbone, base = resolve.load(real_model)
    add_registers(backbone, 4)
    assert all(figure.claimed for figure in export(backbone, tmp_path / "out", "onnx", base=base))
